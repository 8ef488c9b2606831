"""Measure which recipes of a frozen network hold elsewhere: at home, under changes of acquisition, on another source.

    export DR_TRANSFER_DATA=...          # the folder with flowers/ and dr/
    python tools/elsewhere.py            # both parts; computes the features of about 20,000 images first
    python tools/elsewhere.py dr         # one part: flowers or dr

A candidate is a light correction (or features without and with one, side by side; or views of the image without and
with one), a set of stages and a strength of regularisation. For each of them:

    home      cross-validation by patient or photographer within each source, on the images as they are
    changed   the same folds, tested on images that were changed (dr_transfer.data.acquisition): mean over the changes
    elsewhere trained on one source, or on two, and tested on another: mean over the nine combinations (dr only)
    adapted   the same, with the features of each source standardised by its own mean and spread, without labels

The metric is accuracy for flowers and the AUC of referable retinopathy for dr. All candidates are listed, so you can
see what each way of choosing would have chosen. The results are written to nbs/results/elsewhere.csv. As in a plan,
the classifier is trained on all views of an image, and its probabilities are averaged over them. Changed images have
one view, and 'unchanged' is the same view of the same images.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from dr_transfer.data.acquisition import CHANGES, changed_images
from dr_transfer.data.fundus import corrects_light
from dr_transfer.data.sources import image_sources
from dr_transfer.data.table import label_table
from dr_transfer.data.views import LOCAL, VIEWS
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.features.extraction import image_features
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'elsewhere.csv'
STAGES = {
    'stages 4 to 7': ('stage4', 'stage5', 'stage6', 'stage7'),
    'stage 6': ('stage6',),
    'stages 6 and 7': ('stage6', 'stage7'),
    'stages 6, 7 and neck': ('stage6', 'stage7', 'neck'),
    'neck': ('neck',),
}
STRENGTHS = (1e-3, 1e-2, 1e-1)  # C of logistic regression
READERS = {
    'none': ('fundus',),
    'local': ('fundus_flat',),
    'colour': ('fundus_colour',),
    'none and local': ('fundus', 'fundus_flat'),
    'none, local': ('fundus_and_local',),
}  # 'none and local': features side by side; 'none, local': views of an image, as rows of one classifier


@dataclass(frozen=True)
class Candidate:
    "A recipe of a frozen network"

    correction: str  # Of light: a name in READERS; '' for flowers
    stages: str  # Name in STAGES
    C: float  # Inverse strength of regularisation


@dataclass(frozen=True)
class ImageSet:
    "Images of one task, with what is needed to score candidates"

    images: list  # Paths
    y: np.ndarray  # Class numbers (n,)
    groups: np.ndarray  # Patient or photographer (n,)
    sources: np.ndarray  # Name of the source (n,)
    size: int  # Pixels
    fit: str  # As in the task
    views: str  # Name in `VIEWS`
    positive: bool  # Is the metric an AUC?
    n_changed: int  # Images of each source that are changed, the same for all candidates

    def metric(self, probs, rows) -> float:
        "AUC or accuracy of probabilities (n, classes) for some rows"
        if self.positive:
            return float(roc_auc_score(self.y[rows], probs[:, 1]))
        return float((probs.argmax(1) == self.y[rows]).mean())


def read_flowers(root) -> ImageSet:
    "The flowers; their groups are photographers"
    t = label_table(root / 'flowers', verify=False)
    y = t.label.astype('category').cat.codes.to_numpy()
    source = np.full(len(t), 'flowers')
    return ImageSet(t.image.tolist(), y, t.group.to_numpy(object), source, 256, 'crop', 'mirror_near', False, 360)


def read_dr(root) -> ImageSet:
    "Three collections of fundus photographs, as sources"
    t = label_table([root / 'dr' / name for name in ('messidor2', 'idrid', 'eyepacs')], verify=False)
    y = (t.label.astype(int) >= 2).astype(int).to_numpy()
    groups = np.array([g if g is not None else f'image {i}' for i, g in enumerate(t.group)], object)
    return ImageSet(
        t.image.tolist(), y, groups, image_sources(t).to_numpy(object), 384, 'pad', 'quarter_turns', True, 60
    )


class FeatureReader:
    "Features of an image set, computed once and stored in the cache of the library"

    def __init__(self, data: ImageSet):
        self.data = data
        self.all = cache(self._all)
        rng = np.random.default_rng(0)
        names = np.unique(data.sources)
        some = [rng.permutation(np.flatnonzero(data.sources == name))[: data.n_changed] for name in names]
        self.changed_rows = np.sort(np.concatenate(some))

    def _all(self, reader, change):
        images = self.data.images
        if change:
            images = changed_images([images[i] for i in self.changed_rows], change)
        stages = sorted({s for names in STAGES.values() for s in names})
        views = 'none' if change else self.data.views
        if corrects_light(reader):
            views += LOCAL
        how = dict(size=self.data.size, reader=reader, fit=self.data.fit, views=views, stages=stages)
        return image_features(images, **how)

    def array(self, candidate, change=''):
        "Features (n, views, channels) of the stages of a candidate; of `changed_rows` if there is a change"
        readers = READERS.get(candidate.correction, ('photo',))
        x = [self.all(reader, change).numpy(STAGES[candidate.stages]) for reader in readers]
        return np.concatenate(x, 2)


def as_rows(x) -> np.ndarray:
    "All views as rows, those of an image next to each other"
    return x.reshape(-1, x.shape[-1])


def fitted_rows(candidate, x, y, weights=None):
    "Train the classifier of a candidate on rows of features (n, channels)"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=candidate.C, max_iter=1000, tol=1e-3))
    return model.fit(x, y, logisticregression__sample_weight=weights)


def fitted(candidate, x, y):
    "Train the classifier of a candidate on features (n, views, channels); an image counts once"
    views = x.shape[1]
    weights = np.full(len(y) * views, 1 / views)
    return fitted_rows(candidate, as_rows(x), np.repeat(y, views), weights)


def predicted(model, x) -> np.ndarray:
    "Probabilities (n, classes), averaged over the views"
    n, views, _ = x.shape
    return model.predict_proba(as_rows(x)).reshape(n, views, -1).mean(1)


def out_of_fold(data, candidate, x, changed, rows, changed_rows):
    "Probabilities of images of one source by models of other folds: of all of them, and of the changed ones"
    k = data.y.max() + 1
    probs = np.zeros((len(x), k))
    of_changed = {change: np.zeros((len(changed_rows), k)) for change in changed}
    for train, test in grouped_folds(data.y[rows], data.groups[rows], 3, seed=0):
        model = fitted(candidate, x[rows[train]], data.y[rows[train]])
        probs[rows[test]] = predicted(model, x[rows[test]])
        held_out = np.isin(changed_rows, rows[test])
        for change, values in changed.items():
            of_changed[change][held_out] = predicted(model, values[held_out])
    return probs, of_changed


def mean(scores) -> float:
    "Mean of the values of a dict or a list"
    values = scores.values() if isinstance(scores, dict) else scores
    return float(np.mean(list(values)))


def at_home(data, reader, candidate, x) -> dict:
    "Scores within the sources: on the images as they are, and under each change"
    changed = {change: reader.array(candidate, change) for change in CHANGES}
    n_views = len(VIEWS[data.views])
    changed['unchanged'] = x[reader.changed_rows][:, ::n_views]  # as it is, and perhaps with its light corrected
    home = {}
    under = {change: [] for change in changed}
    for source in np.unique(data.sources):
        rows = np.flatnonzero(data.sources == source)
        probs, of_changed = out_of_fold(data, candidate, x, changed, rows, reader.changed_rows)
        home[f'home, {source}'] = data.metric(probs[rows], rows)
        mine = np.isin(reader.changed_rows, rows)
        some = reader.changed_rows[mine]
        for change in changed:
            under[change].append(data.metric(of_changed[change][mine], some))
    means = {change: mean(values) for change, values in under.items()}
    decides = {
        'home': mean(home),
        'changed': mean([means[change] for change in CHANGES]),
    }
    return decides | home | means


def standardised(x, sources) -> np.ndarray:
    "Features with mean 0 and spread 1 within each source"
    out = np.empty_like(x)
    for source in np.unique(sources):
        own = x[sources == source]
        out[sources == source] = StandardScaler().fit_transform(as_rows(own)).reshape(own.shape)
    return out


def combinations_of(sources) -> list:
    "(training sources, test source): one or more sources, and another one"
    names = [str(name) for name in np.unique(sources)]
    pairs = [((a,), b) for a, b in permutations(names, 2)]
    if len(names) < 3:
        return pairs
    return pairs + [(tuple(n for n in names if n != b), b) for b in names]


def elsewhere(data, candidate, x) -> dict:
    "Score on each source of models that were trained on others"
    scores = {}
    for train, test in combinations_of(data.sources):
        rows = np.flatnonzero(np.isin(data.sources, train))
        new = np.flatnonzero(data.sources == test)
        model = fitted(candidate, x[rows], data.y[rows])
        probs = predicted(model, x[new])
        name = f'{" and ".join(train)} to {test}'
        scores[name] = data.metric(probs, new)
    return scores


def score_candidate(data, reader, candidate) -> dict:
    "Scores of a candidate: at home, under each change, and on sources that it was not trained on"
    x = reader.array(candidate)
    out = at_home(data, reader, candidate, x)
    if len(np.unique(data.sources)) < 2:
        return out
    scores = elsewhere(data, candidate, x)
    adapted = elsewhere(data, candidate, standardised(x, data.sources))
    means = {'elsewhere': mean(scores), 'adapted': mean(adapted)}
    of_adapted = {f'{name}, adapted': score for name, score in adapted.items()}
    return out | means | scores | of_adapted


def choices(table) -> pd.DataFrame:
    "What each way of choosing would choose, and what it gives elsewhere"
    rows = {}
    for way in ('home', 'changed', 'elsewhere', 'adapted'):
        if way in table and table[way].notna().all():
            rows[way] = table.loc[table[way].idxmax()]
    return pd.DataFrame(rows).T


def data_folder(parser) -> Path:
    "The folder with flowers/ and dr/; an error of the parser without it"
    return Path(
        os.environ.get('DR_TRANSFER_DATA') or parser.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    )


def write_part(path, task, rows):
    "Replace the rows of a task in a file of results"
    tables = [pd.DataFrame(rows)]
    if path.exists():
        old = pd.read_csv(path)
        tables.insert(0, old[old.task != task])
    with atomic_file(path) as f:
        write_csv(pd.concat(tables, ignore_index=True).round(4), f)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=['flowers', 'dr'])
    p.add_argument('--corrections', nargs='+', default=list(READERS), choices=list(READERS), help='for dr only')
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = data_folder(p)
    tables = [pd.read_csv(a.out, keep_default_na=False, na_values=[''])] if a.out.exists() else []
    for part in a.parts:
        data = {'flowers': read_flowers, 'dr': read_dr}[part](root)
        reader = FeatureReader(data)
        rows = []
        with threadpool_limits(1, user_api='blas'):
            for candidate in [
                Candidate(*c) for c in product(a.corrections if part == 'dr' else [''], STAGES, STRENGTHS)
            ]:
                rows.append({'task': part, **asdict(candidate), **score_candidate(data, reader, candidate)})
                first = list(rows[-1].values())[:7]
                print(*[f'{v:.3f}' if isinstance(v, float) else v for v in first], flush=True)
        table = pd.DataFrame(rows)
        print(choices(table).iloc[:, :7].to_string())
        tables = [t[(t.task != part) | ~t.correction.fillna('').isin(table.correction)] for t in tables] + [table]
        with atomic_file(a.out) as f:
            write_csv(pd.concat(tables, ignore_index=True).round(4), f)


if __name__ == '__main__':
    main()
