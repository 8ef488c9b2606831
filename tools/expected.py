"""Measure what `dr_transfer check` says without labels against what labels show, where labels exist.

    export DR_TRANSFER_DATA=...          # the folder with flowers/ and dr/
    python tools/expected.py             # both parts; computes the features of about 10,000 images first
    python tools/expected.py dr          # one part: flowers or dr

A linear classifier is trained on frozen features of some images; others are its validation images, by patient or
photographer. It is checked on a third part of the same source, and on

    dr        each other source of messidor2, idrid and eyepacs; trained on one of them or two
    flowers   images of the third part with each change of acquisition (dr_transfer.data.acquisition)

There is a row for each pair and metric: the metric on the validation images, the estimates of each method with their
intervals, the true value, the distances from the training images, the drift of the image statistics and the verdict.
Then the mean absolute error of each method is printed. The results are written to nbs/results/expected.csv; the
constants of dr_transfer.evaluation.site_check follow from them. Models read one view, of the default stages.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from elsewhere import CHANGES, Candidate, FeatureReader, ImageSet, combinations_of, fitted_rows, read_dr, read_flowers
from threadpoolctl import threadpool_limits

from dr_transfer.data.image_statistics import image_statistics
from dr_transfer.data.tasks import get_task
from dr_transfer.evaluation.site_check import _verdict
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.features.unlike import training_distribution
from dr_transfer.metrics.classes import Classes, as_classes
from dr_transfer.metrics.decision import prediction_table, table_arrays
from dr_transfer.metrics.drift import drift_table
from dr_transfer.metrics.expected import expected_metrics
from dr_transfer.metrics.screening import metric_values
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'expected.csv'
METHODS = ('difference', 'confidence', 'threshold')
CANDIDATES = {'dr': Candidate('none', 'stages 4 to 7', 0.01), 'flowers': Candidate('', 'stages 6, 7 and neck', 0.01)}


@dataclass(frozen=True)
class Images:
    "Features, labels and statistics of images that are checked"

    x: np.ndarray  # Features (n, d)
    y: np.ndarray  # Class numbers (n,)
    groups: np.ndarray  # Patient or photographer (n,)
    statistics: pd.DataFrame | None = None  # From `image_statistics`; None: not compared


class Trained:
    "A classifier with its validation images"

    def __init__(self, classes: Classes, train: Images, valid: Images, candidate: Candidate):
        self.classes = classes
        self.model = fitted_rows(candidate, train.x, train.y)
        self.distribution = training_distribution(train.x, valid.x)
        self.valid = self.table(valid)
        self.reference = self.described(valid)

    def table(self, images) -> pd.DataFrame:
        "Predictions of images, with their classes and groups"
        names = [str(i) for i in range(len(images.x))]
        t = prediction_table(names, self.model.predict_proba(images.x), self.classes)
        return t.assign(target=[self.classes[k] for k in images.y], group=images.groups)

    def described(self, images) -> pd.DataFrame:
        "Statistics of images, their distance from the training images, and their groups"
        described = pd.DataFrame(index=range(len(images.x)))
        if images.statistics is not None:
            described = images.statistics.reset_index(drop=True)
        return described.assign(unlike=self.distribution.distance(images.x), group=images.groups)


def checked(trained, new, about, resamples=500) -> list[dict]:
    "Estimates for images, compared with their labels: a row for each metric"
    table, described = trained.table(new), trained.described(new)
    expected = expected_metrics(trained.valid, table.drop(columns='target'), trained.classes, resamples)
    drift = None
    if new.statistics is not None:
        drift = drift_table(trained.reference, described, resamples)
    verdict = _verdict(described.unlike.to_numpy(), drift, expected)
    true = metric_values(*table_arrays(table, trained.classes), trained.classes)
    rows = []
    for metric, estimates in expected.groupby('metric'):
        row = {**about, 'images': len(new.y), 'median unlike': described.unlike.median()}
        row |= {'fraction unlike': described.unlike.ge(1).mean(), 'verdict': verdict.words}
        row |= {'metric': metric, 'true': true[metric]}
        for r in estimates.itertuples():
            row |= {r.method: r.value, f'{r.method} low': r.low, f'{r.method} high': r.high}
        rows.append(row)
    print(*about.values(), verdict.words, sep=', ', flush=True)
    return rows


class Parts:
    "Divides images by group into training (half), validation (a quarter) and the others"

    def __init__(self, data: ImageSet, x: np.ndarray, statistics: pd.DataFrame | None):
        self.data, self.x, self.statistics = data, x, statistics

    def images(self, rows) -> Images:
        statistics = None if self.statistics is None else self.statistics.iloc[rows]
        return Images(self.x[rows], self.data.y[rows], self.data.groups[rows], statistics)

    def divided(self, rows) -> list:
        "Row numbers of training, validation and the others"
        y, groups = self.data.y[rows], self.data.groups[rows]
        valid, others, *training = (rows[test] for _, test in grouped_folds(y, groups, 4, seed=0))
        return [np.concatenate(training), valid, others]


def measure_dr(root) -> list[dict]:
    "Rows of each pair of sources"
    data = read_dr(root)
    x = FeatureReader(data).array(CANDIDATES['dr'])[:, 0]
    parts = Parts(data, x, image_statistics(data.images, 'fundus'))
    classes = get_task('dr').target().class_set()
    rows, models = [], {}
    for names, other in combinations_of(data.sources):
        name = ' and '.join(names)
        if name not in models:
            train, valid, same = parts.divided(np.flatnonzero(np.isin(data.sources, names)))
            models[name] = Trained(classes, parts.images(train), parts.images(valid), CANDIDATES['dr'])
            rows += checked(models[name], parts.images(same), {'trained on': name, 'checked on': 'the same'})
        new = parts.images(np.flatnonzero(data.sources == other))
        rows += checked(models[name], new, {'trained on': name, 'checked on': other})
    return rows


def measure_flowers(root) -> list[dict]:
    "Rows of other photographers, unchanged and with each change of acquisition"
    data = read_flowers(root)
    reader = FeatureReader(data)
    parts = Parts(data, reader.array(CANDIDATES['flowers'])[:, 0], None)
    train, valid, same = parts.divided(np.arange(len(data.y)))
    classes = as_classes([f'class {k}' for k in range(data.y.max() + 1)])
    trained = Trained(classes, parts.images(train), parts.images(valid), CANDIDATES['flowers'])
    about = {'trained on': 'flowers', 'checked on': 'the same'}
    rows = checked(trained, parts.images(same), about)
    new = np.isin(reader.changed_rows, same)
    some = reader.changed_rows[new]
    for change in CHANGES:
        x = reader.array(CANDIDATES['flowers'], change)[new, 0]
        images = Images(x, data.y[some], data.groups[some])
        rows += checked(trained, images, {**about, 'checked on': change})
    return rows


def summary(table) -> pd.DataFrame:
    "Mean absolute error of each method and of the validation metric, and how often its interval holds the true value"
    found = {}
    for metric, t in table.groupby('metric'):
        for method in ('validation', *METHODS):
            if method not in t or t[method].isna().all():
                continue
            within = (t[f'{method} low'] <= t.true) & (t.true <= t[f'{method} high'])
            error = (t[method] - t.true).abs().mean()
            found[metric, method] = {'mean absolute error': error, 'true value in the interval': within.mean()}
    return pd.DataFrame.from_dict(found, orient='index')


def main():
    "Measure, print and write the results"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=['dr', 'flowers'])
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = Path(
        os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with dr/ and flowers/')
    )
    rows = []
    with threadpool_limits(1, user_api='blas'):
        for part in a.parts:
            rows += {'dr': measure_dr, 'flowers': measure_flowers}[part](root)
    table = pd.DataFrame(rows)
    print(summary(table).round(3).to_string())
    with atomic_file(a.out) as file:
        write_csv(table.round(4), file)


if __name__ == '__main__':
    main()
