"""Measure whether a head trained on changed images too holds better elsewhere, on photographs.

    export DR_TRANSFER_DATA=...               # the folder with flowers/ and dr/
    python tools/training_changes.py          # both parts; computes the features of about 17,000 images first
    python tools/training_changes.py flowers  # one part: flowers or dr

The head of the default (logistic regression on features of a frozen network) is trained on each image and on 0, 1 or 2
copies of it. Each copy has one change of acquisition (dr_transfer.data.acquisition), drawn at random. An image counts
once. Heads are tested at home in three folds by patient or photographer, and on sources that they were not trained on:

    home          test images as they are
    unchanged     some of them: those that are changed
    changed       the same with each change: mean over the changes
    not trained   the same, but copies with the change that is tested are left out in training
    elsewhere     for dr, other sources: mean over the combinations

The metric is accuracy for flowers and the AUC of referable retinopathy for dr. Each image has one view, for dr as it is
and with its light corrected. Nothing is chosen. The results are written to nbs/results/training_changes.csv.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from elsewhere import (
    STAGES,
    Candidate,
    FeatureReader,
    ImageSet,
    as_rows,
    combinations_of,
    data_folder,
    fitted_rows,
    mean,
    predicted,
    read_dr,
    read_flowers,
    write_part,
)
from threadpoolctl import threadpool_limits

from dr_transfer.data.acquisition import CHANGES, ChangedImage, changed_images
from dr_transfer.data.views import LOCAL
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.features.extraction import image_features

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'training_changes.csv'
RECIPES = {
    'flowers': (read_flowers, 'photo', 'none', 'stages 6, 7 and neck'),
    'dr': (read_dr, 'fundus_and_local', 'none' + LOCAL, 'stages 4 to 7'),
}
N_COPIES = (0, 1, 2)
STRENGTHS = (0.001, 0.01)  # C


@dataclass(frozen=True)
class Features:
    "Features of all images, of copies of them, and of test images with each change"

    data: ImageSet
    own: np.ndarray  # (n, views, channels)
    copies: np.ndarray  # (n, copies, views, channels)
    changes: np.ndarray  # Name of the change of each copy (n, copies)
    tested: np.ndarray  # Numbers of the images that are tested with each change
    changed: dict  # Change -> (tested, views, channels)

    def fit(self, rows, n_copies, C, without=''):
        "Train a head on some images and their first copies, without those of one change; an image counts once"
        x = np.concatenate([self.own[rows][:, None], self.copies[rows, :n_copies]], axis=1)
        used = np.ones(x.shape[:2], bool)
        used[:, 1:] = self.changes[rows, :n_copies] != without
        n_views = x.shape[2]
        n_rows = n_views * used.sum(axis=1)  # of each image
        image = np.repeat(np.nonzero(used)[0], n_views)
        y = self.data.y[rows]
        model = Candidate('', '', C)
        return fitted_rows(model, as_rows(x[used]), y[image], 1 / n_rows[image])


def drawn_changes(n) -> np.ndarray:
    "Names of two different changes for each of n images (n, 2)"
    rng = np.random.default_rng(0)
    names = np.array(list(CHANGES))
    return np.stack([rng.permutation(names)[: max(N_COPIES)] for _ in range(n)])


def read_features(task, root) -> Features:
    "Compute the features of a task; they are stored"
    read, reader, views, stages = RECIPES[task]
    data = read(root)
    how = dict(size=data.size, reader=reader, fit=data.fit, views=views, stages=STAGES[stages])

    def features(images):
        return image_features(images, **how).numpy(STAGES[stages])

    changes = drawn_changes(len(data.images))
    copies = []
    for names in changes.T:
        images = [ChangedImage(path, change) for path, change in zip(data.images, names)]
        copies.append(features(images))
    tested = FeatureReader(data).changed_rows
    to_change = [data.images[i] for i in tested]
    changed = {change: features(changed_images(to_change, change)) for change in CHANGES}
    return Features(data, features(data.images), np.stack(copies, axis=1), changes, tested, changed)


def out_of_fold(f, n_copies, C) -> tuple:
    "Probabilities by models of other folds: of all images; of changed ones; and without that change in training"
    k = f.data.y.max() + 1
    own = np.zeros((len(f.own), k))
    changed = {change: np.zeros((len(f.tested), k)) for change in CHANGES}
    not_trained = {change: np.zeros((len(f.tested), k)) for change in CHANGES}
    for source in np.unique(f.data.sources):
        rows = np.flatnonzero(f.data.sources == source)
        for train, test in grouped_folds(f.data.y[rows], f.data.groups[rows], 3, seed=0):
            model = f.fit(rows[train], n_copies, C)
            own[rows[test]] = predicted(model, f.own[rows[test]])
            here = np.isin(f.tested, rows[test])
            for change, x in f.changed.items():
                changed[change][here] = predicted(model, x[here])
                other = f.fit(rows[train], n_copies, C, without=change) if n_copies else model
                not_trained[change][here] = predicted(other, x[here])
    return own, changed, not_trained


def at_home(f, n_copies, C) -> dict:
    "Scores within the sources: mean over them, and over the changes"
    own, changed, not_trained = out_of_fold(f, n_copies, C)
    scores = {'home': [], 'unchanged': [], 'changed': [], 'not trained': []}
    for source in np.unique(f.data.sources):
        rows = np.flatnonzero(f.data.sources == source)
        mine = np.isin(f.tested, rows)
        some = f.tested[mine]
        scores['home'].append(f.data.metric(own[rows], rows))
        scores['unchanged'].append(f.data.metric(own[some], some))
        for change in CHANGES:
            scores['changed'].append(f.data.metric(changed[change][mine], some))
            scores['not trained'].append(f.data.metric(not_trained[change][mine], some))
    return {name: mean(values) for name, values in scores.items()}


def elsewhere(f, n_copies, C) -> dict:
    "Scores on sources that a head was not trained on, and their mean"
    scores = {}
    for train, test in combinations_of(f.data.sources):
        rows = np.flatnonzero(np.isin(f.data.sources, train))
        new = np.flatnonzero(f.data.sources == test)
        probs = predicted(f.fit(rows, n_copies, C), f.own[new])
        scores[f'{" and ".join(train)} to {test}'] = f.data.metric(probs, new)
    return {'elsewhere': mean(scores)} | scores if scores else {}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(RECIPES))
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = data_folder(p)
    for part in a.parts:
        f = read_features(part, root)
        rows = []
        with threadpool_limits(1, user_api='blas'):
            for C, n in product(STRENGTHS, N_COPIES):
                rows.append({'task': part, 'copies': n, 'C': C} | at_home(f, n, C) | elsewhere(f, n, C))
                print(*[f'{v:.4f}' if isinstance(v, float) else v for v in rows[-1].values()], flush=True)
        write_part(a.out, part, rows)


if __name__ == '__main__':
    main()
