"""Measure what adapting a model to another site without labels does to its operating point, on real photographs.

    export DR_TRANSFER_DATA=...          # the folder with dr/
    python tools/adaptation.py           # computes the features of about 3,000 images first

A linear classifier is trained on one collection of fundus photographs, or on two, with a threshold for a sensitivity of
.90 in cross-validation. It is tested on another collection as it is, and with the features standardised by their mean
and spread there (dr_transfer adapt). The rows 'half of' are the same collection: trained on half of the patients and
tested on the others, also with other fractions of positive images. Nothing is chosen on the test images. The results
are written to nbs/results/adaptation.csv. The features are those that the task dr reads: the last four stages, of all
views, as the photographs are and with their light corrected.
"""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from elsewhere import (
    Candidate,
    FeatureReader,
    ImageSet,
    as_rows,
    combinations_of,
    data_folder,
    fitted,
    predicted,
    read_dr,
)
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from dr_transfer.evaluation.adaptation import feature_shift
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'adaptation.csv'
CANDIDATE = Candidate('none, local', 'stages 4 to 7', 0.01)
REQUIRED = 0.9  # sensitivity
WEIGHT_OF_TRAINING = 16  # images, as in dr_transfer.evaluation.adaptation


@dataclass(frozen=True)
class Trial:
    "Rows of the training and of the test images"

    name: str
    train: np.ndarray
    test: np.ndarray


def scored(model, x) -> np.ndarray:
    "Probability of the positive class (n,) from features (n, views, channels)"
    return predicted(model, x)[:, 1]


def threshold(data, x, rows) -> float:
    "Score that the required fraction of the positive images reach, in cross-validation"
    scores = np.zeros(len(rows))
    for train, test in grouped_folds(data.y[rows], data.groups[rows], 3, seed=0):
        model = fitted(CANDIDATE, x[rows[train]], data.y[rows[train]])
        scores[test] = scored(model, x[rows[test]])
    return float(np.quantile(scores[data.y[rows] == 1], 1 - REQUIRED))


def adapted(model, x):
    "The model with the mean and spread of the features of the test images (n, views, channels)"
    scaler, classifier = model
    rows = scaler.transform(as_rows(x))
    new = len(x) / (len(x) + WEIGHT_OF_TRAINING)
    here = copy.deepcopy(scaler)
    here.mean_ = scaler.mean_ + scaler.scale_ * new * rows.mean(0)
    here.scale_ = scaler.scale_ * np.sqrt(new * rows.var(0) + 1 - new)
    return make_pipeline(here, classifier)


def trial_row(data: ImageSet, x, trial) -> dict:
    "Sensitivity, specificity and AUC before and after"
    model = fitted(CANDIDATE, x[trial.train], data.y[trial.train])
    limit = threshold(data, x, trial.train)
    new, y = x[trial.test], data.y[trial.test]
    row = {
        'trained and tested on': trial.name,
        'images': len(y),
        'positive in training': data.y[trial.train].mean(),
        'positive here': y.mean(),
        'shift': feature_shift(as_rows(new), model[0].mean_, model[0].var_),
    }
    for name, of_name in (('', model), (', adapted', adapted(model, new))):
        scores = scored(of_name, new)
        row[f'sensitivity{name}'] = (scores[y == 1] >= limit).mean()
        row[f'specificity{name}'] = (scores[y == 0] < limit).mean()
        row[f'auc{name}'] = roc_auc_score(y, scores)
    return row


def with_fraction(data, rows, fraction, rng) -> np.ndarray:
    "The largest subset of rows with this fraction of positive images"
    positive = rows[data.y[rows] == 1]
    negative = rows[data.y[rows] == 0]
    n = min(len(positive) / fraction, len(negative) / (1 - fraction))
    some_positive = rng.choice(positive, int(n * fraction), replace=False)
    some_negative = rng.choice(negative, int(n * (1 - fraction)), replace=False)
    return np.concatenate([some_positive, some_negative])


def trials(data) -> list:
    "Other collections first, then halves of the same one"
    rng = np.random.default_rng(0)
    found = []
    for train, test in combinations_of(data.sources):
        rows = np.flatnonzero(np.isin(data.sources, train))
        others = np.flatnonzero(data.sources == test)
        found.append(Trial(f'{" and ".join(train)} to {test}', rows, others))
    for source in np.unique(data.sources):
        rows = np.flatnonzero(data.sources == source)
        patients = rng.permutation(np.unique(data.groups[rows]))
        first = np.isin(data.groups[rows], patients[: len(patients) // 2])
        here, there = rows[first], rows[~first]
        found.append(Trial(f'half of {source}', here, there))
        for fraction in (0.1, 0.6):
            some = with_fraction(data, there, fraction, rng)
            found.append(Trial(f'half of {source}, {fraction:.0%} positive', here, some))
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = data_folder(p)
    data = read_dr(root)
    x = FeatureReader(data).array(CANDIDATE)
    with threadpool_limits(1, user_api='blas'):
        table = pd.DataFrame([trial_row(data, x, trial) for trial in trials(data)]).round(4)
    print(table.to_string(index=False))
    with atomic_file(a.out) as f:
        write_csv(table, f)


if __name__ == '__main__':
    main()
