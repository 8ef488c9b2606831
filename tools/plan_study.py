"""Which plan of transfer is best, and does the advisor find it? Every plan on every task, three seeds, on images not learnt from.

    export DR_TRANSFER_DATA=...        # the folder with flowers/ and dr/
    python tools/plan_study.py         # hours on two cores; goes on where it was stopped; keeps nbs/results/plan_study.csv
    python tools/plan_study.py --show  # the tables only
    python tools/plan_study.py --seeds 1   # some of it; several processes may share the file, best with one core each (taskset)
    python tools/plan_study.py --tune --out FILE  # on the images that every seed learns from: here rates and thresholds may be chosen

Four tasks on photographs (flowers; Messidor-2 referable and five grades; IDRiD referable), each whole and with 30 images a class to
learn from, and two drawn sets. Scores: accuracy for flowers, AUC for eyes, for five grades the mean of each grade against the rest. Each seed is another split: 30 % of the images, at most 600, are the test; flowers are split by
photographer. The advisor sees the training images only. To be affordable on a CPU the photographs are small (flowers 128 pixels, eyes 160)
and for large sets some plans have fewer epochs than their own (`EPOCHS`); everything else is as the plans have it.
"""

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from scipy import stats

from dr_transfer.core import build_learner, fit, valid_predictions
from dr_transfer.data.leaks import Together
from dr_transfer.data.split import split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task
from dr_transfer.metrics.scores import accuracy, auc
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.training.advisor import advise
from dr_transfer.training.plans import LARGE, PLANS
from dr_transfer.utils.places import atomic_file

EPOCHS = {'augmented_head': 5, 'flw': 5, 'scratch': 10}  # for a large set
SEEDS, MOST_TEST, FEW, ADVISED = 3, 600, 30, 'advised'


@dataclass(frozen=True)
class Study:
    name: str
    folder: str
    task: str
    target: str
    size: int
    few: bool = False


def studies(drawn):
    real = [
        ('flowers', 'flowers', 'flowers', 'class', 128),
        ('Messidor-2 referable', 'dr/messidor2', 'dr', 'referable', 160),
        ('Messidor-2 grade', 'dr/messidor2', 'dr', 'grade', 160),
        ('IDRiD referable', 'dr/idrid', 'dr', 'referable', 160),
    ]
    return (
        [Study(f'{s[0]}, {FEW} a class', *s[1:], few=True) for s in real]
        + [
            Study('drawn flowers', f'{drawn}/flowers', 'flowers', 'class', 128),
            Study('drawn eyes', f'{drawn}/eyes', 'dr', 'referable', 160),
        ]
        + [Study(*s) for s in real]
    )


def labelled(study, root, tune):
    "The images of a study; to choose rates and thresholds on, only those that every one of its seeds learns from and none is scored on"
    t = label_table(root / study.folder, verify=False)
    if not tune:
        return t
    tables = [split(replace(study, few=False), t, seed) for seed in range(SEEDS)]
    return t[t.image.isin(set.intersection(*(set(s[s.split == 'train'].image) for s in tables)))].reset_index(drop=True)


def split(study, t, seed):
    "The table of a study: test images, all others (or a few of each class) to learn from, and some on the side `valid`, which fastai needs"
    target = get_task(study.task).target(study.target)
    t = encode_target(t, target).reset_index(drop=True)
    t = t.assign(group=Together(get_task(study.task).reader)(t))
    t = split_table(t.assign(label=t.target), valid=0.3, seed=seed).assign(label=t.label)
    held, train = t[t.split == 'valid'].sample(frac=1, random_state=seed), t[t.split == 'train']
    valid, test = held[:40], held[40:]
    test = test[~test.group.isin(valid.group.dropna())][:MOST_TEST].assign(split='test')
    if study.few:
        train = pd.concat([g.sample(min(len(g), FEW), random_state=seed) for _, g in train.groupby('target')])
    return pd.concat([train, valid, test]).drop(columns='target').reset_index(drop=True)


def run(study, table, plan, seed):
    "Score on the test side, and seconds"
    start, n = time.monotonic(), int((table.split == 'train').sum())
    learn = build_learner(table, study.task, target=study.target, size=study.size, plan=plan, seed=seed)
    name = getattr(plan, 'name', plan)
    fit(learn, epochs=EPOCHS.get(name) if n >= LARGE else None, say=lambda s: None)
    p, classes = valid_predictions(learn, 'test'), list(learn.dls.vocab)
    probs = p[[f'p_{c}' for c in classes]].to_numpy()
    if study.task == 'flowers':
        score = accuracy(p.target, p.prediction)
    else:
        score = np.mean(
            [
                auc((p.target == c).astype(int), q)
                for c, q in zip(classes, probs.T)
                if 0 < (p.target == c).sum() < len(p)
            ]
        )
    return n, score, time.monotonic() - start


def regrets(rows):
    "Points lost against the best plan of the same study, means of the seeds, a row a study and a column a plan"
    t = rows.pivot_table(index='study', columns='plan', values='score', sort=False)
    return 100 * t.rsub(t.drop(columns=ADVISED, errors='ignore').max(axis=1), axis=0)


def interval(x):
    "Mean of some seeds and the half width of its 95 % interval (Student's t), as text"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return f'{x.mean():.3f} ± {half:.3f}' if half == half else f'{x.mean():.3f}'


def read_rows(file):
    return (
        pd.read_csv(file).fillna({'advised': ''})
        if file.exists()
        else pd.DataFrame(columns=['study', 'plan', 'seed', 'images', 'score', 'seconds', 'advised'])
    )


def keep_row(file, row):
    "One more row in the file, in the order of seeds, studies and plans; other processes may do the same"
    with FileLock(f'{file}.lock'):
        rows = read_rows(file)
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True) if len(rows) else pd.DataFrame([row])
        order = {n: i for i, n in enumerate([s.name for s in studies('')] + [*PLANS, ADVISED])}
        rows = rows.sort_values(
            ['seed', 'study', 'plan'], key=lambda c: c if c.name == 'seed' else c.map(order), kind='stable'
        )
        with atomic_file(file) as f:
            rows.to_csv(f, index=False)


def show(rows):
    "Scores, minutes and regrets, printed"
    print(
        'score, mean of the seeds ± half a 95 % interval\n',
        rows.pivot_table(index='study', columns='plan', values='score', aggfunc=interval, sort=False).to_string(),
        '\n',
    )
    print(
        'what was advised\n',
        rows[rows.plan == ADVISED]
        .groupby('study', sort=False)
        .advised.agg(lambda a: ', '.join(sorted(set(a))))
        .to_string(),
        '\n',
    )
    r = regrets(rows)
    print(
        'regret in points\n',
        pd.concat([r, r.mean().to_frame('mean').T, r.max().to_frame('most').T]).round(1).to_string(),
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=[*range(SEEDS)])
    p.add_argument('--plans', nargs='+', default=[*PLANS, ADVISED])
    p.add_argument('--studies', nargs='+', help='names of studies; all if left out')
    p.add_argument('--tune', action='store_true', help='on the images that no seed is scored on')
    p.add_argument('--show', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'nbs' / 'results' / 'plan_study.csv')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    if a.show:
        raise SystemExit(show(read_rows(a.out)))
    root = Path(
        os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    )
    with tempfile.TemporaryDirectory() as drawn:
        make_flowers(f'{drawn}/flowers', n=600, size=128, seed=7)
        make_dr(f'{drawn}/eyes', n=600, size=160, seed=7)
        for seed, study in product(a.seeds, studies(drawn)):
            if a.studies and study.name not in a.studies:
                continue

            def known():
                rows = read_rows(a.out)
                return rows[(rows.study == study.name) & (rows.seed == seed)].set_index('plan')

            todo = [q for q in a.plans if q not in known().index]
            table = split(study, labelled(study, root, a.tune), seed + 100 * a.tune) if todo else None
            for name in todo:
                if name in known().index:
                    continue  # another process was faster
                plan = (
                    advise(table, study.task, target=study.target, size=study.size, seed=seed).plan
                    if name == ADVISED
                    else name
                )
                advised, done = plan.name if name == ADVISED else '', known()
                n, score, seconds = (
                    done.loc[advised, ['images', 'score', 'seconds']]
                    if advised in done.index
                    else run(study, table, plan, seed)
                )
                print(f'{study.name}, {name} {advised}, seed {seed}: {score:.4f}, {seconds:.0f} s', flush=True)
                keep_row(
                    a.out,
                    {
                        'study': study.name,
                        'plan': name,
                        'seed': seed,
                        'images': int(n),
                        'score': round(float(score), 4),
                        'seconds': round(seconds),
                        'advised': advised,
                    },
                )
    show(read_rows(a.out))
