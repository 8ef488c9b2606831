"""Measure what `dr_transfer check` says without labels against what labels show, where labels exist.

    export DR_TRANSFER_DATA=...          # the folder with flowers/ and dr/
    python tools/expected.py             # both parts
    python tools/expected.py dr          # one part: flowers or dr

A model is trained on some images and checked on others, whose labels are then used to see what was true:

    dr        trained on one or two of messidor2, idrid and eyepacs; checked on a quarter of the patients of the same
              sources, which it was not trained on, and on each of the other sources
    flowers   trained on flowers; checked on a quarter of the photographers, unchanged and with each change of
              acquisition (dr_transfer.data.acquisition)

There is a row for each pair and metric: the metric on the validation images, the estimates of each method with their
intervals, the true value, the distances from the training images, the drift and the verdict. Then the mean absolute
error of each method is printed. The results are written to nbs/results/expected.csv; they are what the constants of
dr_transfer.evaluation.site_check are chosen from. A model has a frozen backbone and a new head.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from dr_transfer.core import build_learner, fit
from dr_transfer.data.acquisition import CHANGES, changed_images
from dr_transfer.data.sources import image_sources
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task
from dr_transfer.evaluation.site_check import SiteImages, check_site
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.inference.run import read_reference, read_validation, write_run
from dr_transfer.inference.saved_model import load_model
from dr_transfer.metrics.decision import table_arrays
from dr_transfer.metrics.screening import metric_values
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'expected.csv'
SOURCES = ('messidor2', 'idrid', 'eyepacs')
METHODS = ('difference', 'confidence', 'threshold')
MOST_CHANGED = 400  # images that are changed


@dataclass(frozen=True)
class Recipe:
    "How models are trained"

    task: str  # 'dr' or 'flowers'
    size: int | None = None  # Pixels; that of the task if None
    arch: str | None = None  # Backbone; the default if None
    weights: str | None = None  # As of `build_learner`

    def labelled(self, table) -> pd.DataFrame:
        "Add the classes of the task's first target"
        return encode_target(table, get_task(self.task).target())


@dataclass(frozen=True)
class Trained:
    "A model, and what its run says about its validation images"

    model: object
    reference: pd.DataFrame
    valid: pd.DataFrame
    name: str  # Of the images that it was trained on


def train(table, recipe, name) -> Trained:
    "Train a head on some images, and read its run"
    how = dict(task=recipe.task, size=recipe.size, arch=recipe.arch, weights=recipe.weights)
    learn = fit(build_learner(table.drop(columns='target'), **how), 'head')
    with tempfile.TemporaryDirectory() as d:
        write_run(learn, Path(d))
        return Trained(load_model(Path(d) / 'model'), read_reference(d), read_validation(d), name)


def held_out(table) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Divide a table by group: three quarters to train on, and a quarter"
    y = table.target.astype('category').cat.codes.to_numpy()
    groups = [f'image {i}' if g is None else g for i, g in enumerate(table.group)]
    rows, others = next(iter(grouped_folds(y, pd.Series(groups).to_numpy(object), 4, seed=0)))
    return table.iloc[rows].reset_index(drop=True), table.iloc[others].reset_index(drop=True)


def rows_of(trained, table, name, change='', resamples=500) -> list[dict]:
    "Check images, and compare the estimates with their labels: one row for each metric"
    images = table.image.tolist()
    images = changed_images(images, change) if change else images
    site = SiteImages(images, table.group.tolist())
    check = check_site(trained.model, site, trained.reference, trained.valid, resamples)
    y, probs = table_arrays(check.table.assign(target=table.target.tolist()), trained.model.classes)
    true = metric_values(y, probs, trained.model.classes)
    drift, unlike = check.drift, check.table.unlike
    about = {
        'trained on': trained.name,
        'checked on': name,
        'change': change,
        'images': len(table),
        'median unlike': unlike.median(),
        'fraction unlike': unlike.dropna().ge(1).mean(),
        'drift p': drift.p.min(),
        'drifted columns': int((drift.p < 0.05).sum()),
        'largest difference': drift.difference.abs().max(),
        'verdict': check.verdict.words,
    }
    rows = []
    for metric, estimates in check.expected.groupby('metric'):
        row = {**about, 'metric': metric, 'true': true[metric]}
        for r in estimates.itertuples():
            row |= {r.method: r.value, f'{r.method} low': r.low, f'{r.method} high': r.high}
        rows.append(row)
    print(f'{trained.name} -> {name} {change}: {check.verdict.words}', flush=True)
    return rows


def measure_dr(folders, recipe, **how) -> list[dict]:
    "Rows of each pair of sources: trained on one or two of them, checked on the same and on the others"
    table = recipe.labelled(label_table(folders))
    source = image_sources(table)
    names = list(dict.fromkeys(source))
    rows = []
    for chosen in [c for k in (1, 2) for c in combinations(names, k) if k < len(names)]:
        home, same = held_out(table[source.isin(chosen)].reset_index(drop=True))
        trained = train(home, recipe, ' + '.join(chosen))
        rows += rows_of(trained, same, 'the same', **how)
        for other in (n for n in names if n not in chosen):
            rows += rows_of(trained, table[source == other].reset_index(drop=True), other, **how)
    return rows


def measure_flowers(folder, recipe, **how) -> list[dict]:
    "Rows of held-out flowers, unchanged and with each change of acquisition"
    home, same = held_out(recipe.labelled(label_table(folder)))
    trained = train(home, recipe, 'flowers')
    some = same.sample(min(len(same), MOST_CHANGED), random_state=0).sort_index().reset_index(drop=True)
    rows = rows_of(trained, same, 'the same', **how)
    for change in CHANGES:
        rows += rows_of(trained, some, 'the same', change, **how)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help='flowers or dr (default: both)')
    parts = parser.parse_args().parts or ['dr', 'flowers']
    root = Path(os.environ['DR_TRANSFER_DATA'])
    rows = []
    if 'dr' in parts:
        rows += measure_dr([root / 'dr' / name for name in SOURCES], Recipe('dr'))
    if 'flowers' in parts:
        rows += measure_flowers(root / 'flowers', Recipe('flowers'))
    table = pd.DataFrame(rows)
    print(summary(table).round(3).to_string())
    if set(parts) == {'dr', 'flowers'}:
        with atomic_file(RESULT) as file:
            write_csv(table.round(4), file)


if __name__ == '__main__':
    main()
