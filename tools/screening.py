"""Measure screening for diabetic retinopathy on photographs that were not used in training.

    export DR_TRANSFER_DATA=...                 # the folder with dr/messidor2 and dr/idrid
    python tools/screening.py                   # all parts; about half an hour on two cores
    python tools/screening.py metrics cameras   # some parts

    metrics   referable DR on Messidor-2 in five folds; trained on Messidor-2 and tested on IDRiD; five grades on
              Messidor-2 in five folds
    gap       metrics on training images and on validation images, without and with augmentation, in five splits
    cameras   trained on one set and tested on the other: light correction x stages x views x regularisation strength

The results are written to nbs/results/screening.csv, gap.csv and cameras.csv. In `metrics`, nothing is chosen on the
photographs that a metric is computed on. `cameras` uses the same two sets: a recipe that is chosen by `cameras` for
IDRiD was chosen on IDRiD.
"""

import argparse
import os
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
C_VALUES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # C of logistic regression; the views of an image have a total weight of 1
STAGES = {'last': ['stage7'], 'last two': ['stage6', 'stage7'], 'last three': ['stage5', 'stage6', 'stage7']}
READERS = {'none': 'fundus', 'colour': 'fundus_colour', 'local': 'fundus_local'}


def _rows(name, m, minutes, wanted):
    return [
        {
            'metric': f'{name}: {k}',
            **m.loc[k, ['value', 'low', 'high']].round(4).to_dict(),
            'images': int(m.loc[k, 'images']),
            'minutes': round(minutes, 1),
        }
        for k in wanted
        if k in m.index
    ]


def metrics(root):
    "Yield the rows of screening.csv."
    from dr_transfer.core import build_learner, fit, valid_predictions
    from dr_transfer.data.table import label_table
    from dr_transfer.data.tasks import get_task
    from dr_transfer.evaluation.cross_validation import cross_validate, decide_across
    from dr_transfer.inference.saved_model import image_model
    from dr_transfer.metrics.decision import apply_decision, choose_decision
    from dr_transfer.metrics.screening import measure_table

    two, kept, quiet = (
        ['no', 'referable'],
        ('auc', 'sensitivity', 'specificity', 'accuracy', 'kappa', 'kappa at the cut points', 'calibration error'),
        lambda s: None,
    )
    for target, classes in (('referable', two), ('grade', get_task('dr').target('grade').class_set())):
        start = time.perf_counter()
        t = cross_validate(root / 'messidor2', 'dr', target, plan='head', say=quiet)
        t, _ = decide_across(t, classes, sensitivity=0.9)
        yield from _rows(
            f'Messidor-2, {target}, five folds', measure_table(t, classes), (time.perf_counter() - start) / 60, kept
        )
    start = time.perf_counter()
    learn = fit(build_learner(root / 'messidor2', 'dr', plan='head'), say=quiet)
    decision, model = choose_decision(valid_predictions(learn), two, sensitivity=0.9), image_model(learn)
    other = label_table(root / 'idrid')
    t = pd.DataFrame(model.probs(other.image.tolist()), columns=['p_no', 'p_referable']).assign(
        image=other.image, target=other.label.map(get_task('dr').target().of)
    )
    yield from _rows(
        'Messidor-2 to IDRiD, referable',
        measure_table(apply_decision(t, two, decision), two),
        (time.perf_counter() - start) / 60,
        kept,
    )


def gap(root):
    "Yield the rows of gap.csv."
    from dr_transfer.core import build_learner, fit, generalization_gap

    for augment in ('none', 'quarter_turns'):
        for seed in range(5):
            learn = fit(
                build_learner(root / 'messidor2', 'dr', plan='head', augment=augment, seed=seed), say=lambda s: None
            )
            t = generalization_gap(learn)
            yield {
                'augment': augment,
                'seed': seed,
                **{f'{k}, {row}': round(float(t.loc[row, k]), 4) for k in ('auc', 'accuracy') for row in t.index},
            }


def _fit_logistic(x, y):
    "Fit logistic regression on all views: return the scaler, and weights and intercept for each value of C."
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    flat = x.reshape(-1, x.shape[-1])
    scaler, model = StandardScaler().fit(flat), LogisticRegression(max_iter=1000, warm_start=True)
    flat, labels, weights = (
        scaler.transform(flat).astype(float),
        np.repeat(y, x.shape[1]),
        np.full(len(flat), 1 / x.shape[1]),
    )
    return scaler, [
        (m.coef_[0].copy(), m.intercept_[0])
        for m in (model.set_params(C=c).fit(flat, labels, weights) for c in C_VALUES)
    ]


def _mean_probability(fitted, x):
    "Return the mean probability over the views of each image, for each value of C."
    scaler, models = fitted
    flat = scaler.transform(x.reshape(-1, x.shape[-1]))
    return [(1 / (1 + np.exp(-(flat @ w + b)))).reshape(x.shape[:2]).mean(1) for w, b in models]


def cameras(root):
    "Yield the rows of cameras.csv."
    from dr_transfer.data.table import label_table
    from dr_transfer.features.classifiers import grouped_folds
    from dr_transfer.features.extraction import image_features
    from dr_transfer.metrics.scores import auc

    tables = {s: label_table(root / s) for s in ('messidor2', 'idrid')}
    y = {s: (t.label.astype(int) >= 2).to_numpy().astype(int) for s, t in tables.items()}
    folds = grouped_folds(y['messidor2'], n=5)
    for light, reader in READERS.items():
        f = {
            s: image_features(t.image.tolist(), size=384, reader=reader, fit='pad', views='quarter_turns')
            for s, t in tables.items()
        }
        for (stages, names), views in product(STAGES.items(), (1, 4)):
            x = {s: f[s].numpy(names)[:, :views] for s in f}
            out = {
                f'{a} to {b}': [auc(y[b], p) for p in _mean_probability(_fit_logistic(x[a], y[a]), x[b])]
                for a, b in (('messidor2', 'idrid'), ('idrid', 'messidor2'))
            }
            own = np.zeros((len(C_VALUES), len(y['messidor2'])))
            for train, test in folds:
                own[:, test] = _mean_probability(
                    _fit_logistic(x['messidor2'][train], y['messidor2'][train]), x['messidor2'][test]
                )
            out['messidor2, five folds'] = [auc(y['messidor2'], p) for p in own]
            for i, c in enumerate(C_VALUES):
                yield {
                    'light': light,
                    'stages': stages,
                    'views': views,
                    'C': c,
                    **{k: round(v[i], 4) for k, v in out.items()},
                }


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=['metrics', 'gap', 'cameras'])
    parts, root = p.parse_args().parts, Path(os.environ['DR_TRANSFER_DATA']) / 'dr'
    warnings.simplefilter('ignore')
    for part, f, file in (
        ('metrics', metrics, 'screening.csv'),
        ('gap', gap, 'gap.csv'),
        ('cameras', cameras, 'cameras.csv'),
    ):
        if part not in parts:
            continue
        rows = []
        for r in f(root):
            rows.append(r)
            pd.DataFrame(rows).to_csv(RESULTS / file, index=False)
            print(r, flush=True)


if __name__ == '__main__':
    main()
