"""Evaluate `dr_transfer train` with its defaults on real photographs that were not used in training, with five seeds.

    export DR_TRANSFER_DATA=...            # the folder with flowers/ and dr/
    python tools/real_photographs.py       # prints the table and writes nbs/results/real_photographs.csv

Each seed gives another split (of the flowers by photographer) and another training. Models of Messidor-2 are also
tested on IDRiD, which comes from another country and camera and is not cropped, and on EyePACS, from many cameras.
Rows that the file already contains are not computed again. The first training of a task computes the features of its
images, the others read them from the cache. To measure the time of the first training, start with an empty cache
(DR_TRANSFER_CACHE).
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import pandas as pd

from dr_transfer.cli import main
from dr_transfer.utils.places import atomic_file

COLUMNS = ['task', 'plan', 'seed', 'metric', 'value', 'minutes']


def train(data, words, seed, out) -> float:
    "Run `dr_transfer train` and return the minutes that it took."
    start = time.monotonic()
    if main(['train', str(data), *words, '--seed', str(seed), '--out', str(out)]):
        raise SystemExit(1)
    return (time.monotonic() - start) / 60


def validation(run, metric) -> float:
    "A metric on the validation images of a run"
    return json.loads((run / 'record.json').read_text())['validation'][metric]


def auc_of(run, folder) -> float:
    "AUC for referable retinopathy of a run on the images of another set"
    from dr_transfer.inference.saved_model import load_model
    from dr_transfer.metrics.scores import auc

    other = pd.read_csv(folder / 'labels.csv')
    probs = load_model(run / 'model').probs([folder / 'images' / name for name in other.image])
    return auc((other.grade >= 2).astype(int), probs[:, 1])


def one_seed(root, task, plan, seed) -> list[tuple]:
    "Train once and return the rows (metric, value, minutes)."
    words = ['--plan', plan] if plan != 'default' else []
    with tempfile.TemporaryDirectory() as d:
        out = Path(d) / 'run'
        if task == 'flowers':
            minutes = train(root / 'flowers', words, seed, out)
            return [('accuracy, unseen photographers', validation(out, 'accuracy'), minutes)]
        minutes = train(root / 'dr' / 'messidor2', ['--task', 'dr', '--target', 'referable', *words], seed, out)
        return [
            ('AUC, unseen Messidor-2', validation(out, 'auc'), minutes),
            ('AUC, IDRiD', auc_of(out, root / 'dr' / 'idrid'), minutes),
            ('AUC, EyePACS', auc_of(out, root / 'dr' / 'eyepacs'), minutes),
        ]


def table(rows):
    "Return the mean and the standard deviation over the seeds."
    g = rows.groupby(['task', 'plan', 'metric'], sort=False)
    return (
        g.agg(
            mean=('value', 'mean'),
            std=('value', 'std'),
            min=('value', 'min'),
            seeds=('value', 'size'),
            minutes=('minutes', 'max'),
        )
        .round(3)
        .reset_index()
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--tasks', nargs='+', default=['flowers', 'dr'])
    p.add_argument('--plan', default='default')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'nbs' / 'results' / 'real_photographs.csv')
    a = p.parse_args()
    root = Path(
        os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    )
    rows = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=COLUMNS)
    for seed in range(a.seeds):
        for task in a.tasks:
            if ((rows.task == task) & (rows.plan == a.plan) & (rows.seed == seed)).any():
                continue
            new = [
                (task, a.plan, seed, m, round(float(v), 4), round(t, 1))
                for m, v, t in one_seed(root, task, a.plan, seed)
            ]
            rows = (
                pd.concat([rows, pd.DataFrame(new, columns=COLUMNS)], ignore_index=True)
                if len(rows)
                else pd.DataFrame(new, columns=COLUMNS)
            )
            with atomic_file(a.out) as f:
                rows.to_csv(f, index=False)
    print(table(rows).to_string(index=False))
