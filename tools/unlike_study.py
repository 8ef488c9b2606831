"""Measure how well the distance `unlike` separates other kinds of images from unseen photographs of the training sites.

    export DR_TRANSFER_DATA=...          # the folder with flowers/ and dr/
    python tools/unlike_study.py         # all models; computes the features of about 2,500 images first
    python tools/unlike_study.py flowers # one model: messidor2, all_fundus or flowers

There are three models: fundus photographs of Messidor-2, of all three collections, and flowers. The images of each are
divided into four parts by patient or photographer. A model knows the images of two parts as its training images and
those of a third as its validation images, from which its limit follows, as in training. The fourth part is unseen, and
each part is once. The other images are photographs of the other domain (300), slices of synthetic CT, drawn shapes and
noise (240 each).

For each score there is a row for each model and kind of image, with means over the four parts:

    auc             AUC of the other images against the unseen photographs
    fpr             fraction of the unseen photographs that are flagged at the limit that flags 95 % of the other images
    flagged         fraction of the other images that are flagged at the limit of the model, where `unlike` is 1
    unseen flagged  fraction of the unseen photographs that are flagged there

`flagged, least` and `unseen flagged, most` are the worst of the four parts.

The scores are that of the library, the distance to the nearest training image, and the Mahalanobis distance with a
shrunk covariance, both of standardised features. Features have one view, of the default stages. The results are written
to nbs/results/unlike.csv.
"""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from elsewhere import Candidate, FeatureReader, ImageSet, read_dr, read_flowers
from PIL import Image, ImageDraw
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from dr_transfer.data.ct import Volume, three_windows
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.features.unlike import training_distribution
from dr_transfer.synthetic.ct import draw_ct
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'unlike.csv'
QUANTILE = 0.97  # of the validation images that are below the limit, as in dr_transfer.features.unlike
FUNDUS = Candidate('none', 'stages 4 to 7', 0.01)
FLOWERS = Candidate('', 'stages 6, 7 and neck', 0.01)
N_PHOTOGRAPHS = 300  # of the other domain
N_MADE = 240  # CT slices, shapes, noise: each
SIZE = 256  # pixels of shapes and noise
PATTERNS = ('normal', 'emphysema', 'fibrosis', 'ground_glass')


def ct_slices(n) -> list:
    "Slices of synthetic chests, ten of each, with three windows as colours"
    images = []
    for patient in range(-(-n // 10)):
        pattern = PATTERNS[patient % len(PATTERNS)]
        hu, truth = draw_ct(1000 + patient, pattern)
        chest = Volume(hu, truth['spacing'], truth['origin'])
        images += [three_windows(chest, z) for z in np.linspace(-60, 60, 10)]
    return images[:n]


def shapes(n) -> list:
    "Images with rectangles and ellipses of random colours"
    rng = np.random.default_rng(1)
    images = []
    for _ in range(n):
        background, *colors = map(tuple, rng.integers(0, 256, (9, 3)).tolist())
        image = Image.new('RGB', (SIZE, SIZE), background)
        draw = ImageDraw.Draw(image)
        for k, color in enumerate(colors):
            corners = rng.integers(0, SIZE, (2, 2))
            box = np.sort(corners, axis=0).ravel().tolist()
            paint = draw.rectangle if k % 2 else draw.ellipse
            paint(box, fill=color)
        images.append(image)
    return images


def noise(n) -> list:
    "Images whose pixels are independent, with another range of values each"
    rng = np.random.default_rng(2)
    images = []
    for _ in range(n):
        low, high = np.sort(rng.choice(257, 2, replace=False))
        pixels = rng.integers(low, high, (SIZE, SIZE, 3))
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images


MADE = {'synthetic CT': ct_slices, 'drawn shapes': shapes, 'noise': noise}


# ---------------------------------------------------------------- scores


class Library:
    "The distance that a saved model has, without its limit"

    def fit(self, x, valid):
        self.model = training_distribution(x, valid, QUANTILE)
        return self

    def distance(self, x):
        return self.model.distance(x) * self.model.limit


class Nearest:
    "Distance to the nearest training image, of standardised features"

    def fit(self, x, valid):
        self.scaler = StandardScaler().fit(x)
        self.model = NearestNeighbors(n_neighbors=1).fit(self.scaler.transform(x))
        return self

    def distance(self, x):
        return self.model.kneighbors(self.scaler.transform(x))[0][:, 0]


class Mahalanobis:
    "Distance under a Gaussian with a shrunk covariance, of standardised features"

    def fit(self, x, valid):
        self.scaler = StandardScaler().fit(x)
        self.model = LedoitWolf().fit(self.scaler.transform(x))
        return self

    def distance(self, x):
        squared = self.model.mahalanobis(self.scaler.transform(x))
        return np.sqrt(squared)


SCORES = {'library': Library, 'nearest image': Nearest, 'Mahalanobis': Mahalanobis}


def compared(unseen, other, limit) -> dict:
    "Metrics of the distances of unseen photographs and of other images"
    is_other = np.repeat([0, 1], [len(unseen), len(other)])
    distances = np.concatenate([unseen, other])
    finds_95 = np.quantile(other, 0.05, method='lower')
    return {
        'auc': roc_auc_score(is_other, distances),
        'fpr': (unseen >= finds_95).mean(),
        'flagged': (other >= limit).mean(),
        'unseen flagged': (unseen >= limit).mean(),
    }


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    "The images of a model and other images, as features"

    name: str
    x: np.ndarray  # Features of its photographs (n, d)
    y: np.ndarray  # Their classes (n,)
    groups: np.ndarray  # Their patients or photographers (n,)
    others: dict  # Name of a kind of image -> features (m, d)


def parts(model) -> list:
    "Rows of training, validation and unseen photographs, four times"
    folds = [test for _, test in grouped_folds(model.y, model.groups, 4, seed=0)]
    found = []
    for k in range(4):
        unseen, valid, *training = folds[k:] + folds[:k]
        found.append((np.concatenate(training), valid, unseen))
    return found


def measured_part(model, score, rows) -> dict:
    "Metrics of one score on one part: kind of image -> metrics"
    train, valid, unseen = (model.x[r] for r in rows)
    fitted = SCORES[score]().fit(train, valid)
    of_valid = fitted.distance(valid)
    of_unseen = fitted.distance(unseen)
    limit = np.quantile(of_valid, QUANTILE, method='higher')
    found = {}
    for kind, x in model.others.items():
        found[kind] = compared(of_unseen, fitted.distance(x), limit)
    return found


def measured(model) -> list[dict]:
    "A row for each score and kind of image"
    rows = []
    for score in SCORES:
        by_part = [measured_part(model, score, part) for part in parts(model)]
        for kind, x in model.others.items():
            t = pd.DataFrame([part[kind] for part in by_part])
            row = {
                'model': model.name,
                'score': score,
                'other images': kind,
                'unseen images': len(model.x),
                'n': len(x),
                **t.mean(),
                'flagged, least': t.flagged.min(),
                'unseen flagged, most': t['unseen flagged'].max(),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def features_of(images, data, candidate) -> np.ndarray:
    "Features of images as the model of a set reads them"
    none = np.full(len(images), '')
    read_so = replace(data, images=images, sources=none, n_changed=0)
    return FeatureReader(read_so).array(candidate)


def some(data: ImageSet, n) -> list:
    "Images of each source, equally many"
    rng = np.random.default_rng(0)
    names = np.unique(data.sources)
    chosen = []
    for name in names:
        rows = np.flatnonzero(data.sources == name)
        chosen += rng.permutation(rows)[: n // len(names)].tolist()
    return [data.images[i] for i in chosen]


def other_features(kind, photographs, data, candidate) -> dict:
    "Features of photographs of another domain, and of images that are made"
    features = {kind: features_of(photographs, data, candidate)}
    for name, make in MADE.items():
        features[name] = features_of(make(N_MADE), data, candidate)
    return features


def fundus_models(dr, flowers, names) -> list:
    "Models of one collection and of three"
    x = FeatureReader(dr).array(FUNDUS)
    others = other_features('flowers', some(flowers, N_PHOTOGRAPHS), dr, FUNDUS)
    models = []
    if 'messidor2' in names:
        rows = dr.sources == 'messidor2'
        models.append(Model('messidor2', x[rows], dr.y[rows], dr.groups[rows], others))
    if 'all_fundus' in names:
        models.append(Model('all_fundus', x, dr.y, dr.groups, others))
    return models


def flower_model(dr, flowers) -> Model:
    "Model of the flowers"
    x = FeatureReader(flowers).array(FLOWERS)
    others = other_features('fundus', some(dr, N_PHOTOGRAPHS), flowers, FLOWERS)
    return Model('flowers', x, flowers.y, flowers.groups, others)


def main():
    "Measure, print and write the results"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ['messidor2', 'all_fundus', 'flowers']
    p.add_argument('models', nargs='*', default=known, help=f'some of {", ".join(known)}')
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    data = os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    dr, flowers = read_dr(Path(data)), read_flowers(Path(data))
    models = []
    if {'messidor2', 'all_fundus'} & set(a.models):
        models += fundus_models(dr, flowers, a.models)
    if 'flowers' in a.models:
        models.append(flower_model(dr, flowers))
    with threadpool_limits(1, user_api='blas'):
        rows = [row for model in models for row in measured(model)]
    with atomic_file(a.out) as file:
        write_csv(pd.DataFrame(rows).round(4), file)


if __name__ == '__main__':
    main()
