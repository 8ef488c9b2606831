"""Compare all transfer plans and the advice of the advisor on every task, with three seeds, on test images.

    export DR_TRANSFER_DATA=...        # the folder with flowers/ and dr/
    # hours on two cores; an interrupted run can be resumed; writes nbs/results/plan_study.csv
    python tools/plan_study.py
    python tools/plan_study.py --show  # print the tables only
    # one seed; several processes may share the file, best with one core each (taskset)
    python tools/plan_study.py --seeds 1
    # on images that are in the training set of every seed, to choose learning rates and thresholds
    python tools/plan_study.py --tune --out FILE

There are four tasks on photographs (flowers; Messidor-2 referable and five grades; IDRiD referable), each with all
images and with 30 training images of each class, and two synthetic sets. The score is the accuracy for flowers and the
AUC for fundus images (for five grades the mean AUC of each grade against the rest). Each seed gives another split: 30 %
of the images, at most 600, are the test set; flowers are split by photographer. The advisor gets the training images
only. To save time on a CPU, images are small (flowers 128 pixels, fundus images 160), and for large sets some plans
have fewer epochs than usual (`EPOCHS`). Everything else is as in the plans. `scratch` has a small network of its own;
all other plans have the default backbone.
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
SEEDS = 3
MOST_TEST = 600
FEW = 30
ADVISED = 'advised'
COLUMNS = ['study', 'plan', 'seed', 'images', 'score', 'seconds', 'advised']


@dataclass(frozen=True)
class Study:
    "A set of images, a task and a target."

    name: str
    folder: str
    task: str
    target: str
    size: int
    few: bool = False


def studies(synthetic):
    "Return all studies; `synthetic` is the folder with the synthetic sets."
    real = [
        ('flowers', 'flowers', 'flowers', 'class', 128),
        ('Messidor-2 referable', 'dr/messidor2', 'dr', 'referable', 160),
        ('Messidor-2 grade', 'dr/messidor2', 'dr', 'grade', 160),
        ('IDRiD referable', 'dr/idrid', 'dr', 'referable', 160),
    ]
    return [
        *(Study(f'{s[0]}, {FEW} a class', *s[1:], few=True) for s in real),
        Study('synthetic flowers', f'{synthetic}/flowers', 'flowers', 'class', 128),
        Study('synthetic fundus images', f'{synthetic}/fundus', 'dr', 'referable', 160),
        *(Study(*s) for s in real),
    ]


def labelled(study, root, tune):
    "Return the images of a study; with `tune` only those that are in the training set of every seed."
    t = label_table(root / study.folder, verify=False)
    if not tune:
        return t
    study = replace(study, few=False)
    train = set(t.image)
    for seed in range(SEEDS):
        table = split(study, t, seed)
        train &= set(table[table.split == 'train'].image)
    return t[t.image.isin(train)].reset_index(drop=True)


def split(study, t, seed):
    "Return the table of a study: training images, 40 validation images for fastai, and test images."
    task = get_task(study.task)
    t = encode_target(t, task.target(study.target)).reset_index(drop=True)
    together = Together(task.reader)
    t = t.assign(group=together(t))
    labels = t.label
    t = split_table(t.assign(label=t.target), valid=0.3, seed=seed)
    t = t.assign(label=labels)
    train = t[t.split == 'train']
    if study.few:
        train = few_images(train, seed)
    rest = t[t.split == 'valid'].sample(frac=1, random_state=seed)
    valid = rest[:40]
    test = rest[40:]
    apart = ~test.group.isin(valid.group.dropna())
    test = test[apart][:MOST_TEST].assign(split='test')
    table = pd.concat([train, valid, test])
    return table.drop(columns='target').reset_index(drop=True)


def few_images(train, seed):
    "Return at most `FEW` random images of each class."
    parts = []
    for _, images in train.groupby('target'):
        n = min(len(images), FEW)
        parts.append(images.sample(n, random_state=seed))
    return pd.concat(parts)


def mean_auc(p, classes):
    "Return the mean AUC of each class against the rest, over the classes that occur."
    aucs = []
    for c in classes:
        y = p.target == c
        if 0 < y.sum() < len(p):
            aucs.append(auc(y.astype(int), p[f'p_{c}'].to_numpy()))
    return np.mean(aucs)


def run(study, table, plan, seed):
    "Train once: return the number of training images, the score on the test set, and the seconds."
    start = time.monotonic()
    n = int((table.split == 'train').sum())
    learn = build_learner(table, study.task, target=study.target, size=study.size, plan=plan, seed=seed)
    epochs = None
    if n >= LARGE:
        epochs = EPOCHS.get(getattr(plan, 'name', plan))
    fit(learn, epochs=epochs, say=lambda s: None)
    p = valid_predictions(learn, 'test')
    flowers = study.task == 'flowers'
    score = accuracy(p.target, p.prediction) if flowers else mean_auc(p, list(learn.dls.vocab))
    return n, score, time.monotonic() - start


def regrets(rows):
    "Return the points lost against the best plan of the same study (means of the seeds): studies by plans."
    t = rows.pivot_table(index='study', columns='plan', values='score', sort=False)
    plans = t.drop(columns=ADVISED, errors='ignore')
    best = plans.max(axis=1)
    return 100 * t.rsub(best, axis=0)


def interval(x):
    "Return the mean over seeds and the half width of its 95 % interval (Student's t), as text."
    n = len(x)
    mean = f'{x.mean():.3f}'
    if n < 2:
        return mean
    quantile = stats.t.ppf(0.975, n - 1)
    half = quantile * x.std(ddof=1) / n**0.5
    return mean if np.isnan(half) else f'{mean} ± {half:.3f}'


def read_rows(file):
    "Return the rows of the file; an empty table if the file does not exist."
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(file).fillna({'advised': ''})


def known_rows(file, study, seed):
    "Return the rows of a study and a seed, indexed by plan."
    rows = read_rows(file)
    rows = rows[rows.study == study.name]
    return rows[rows.seed == seed].set_index('plan')


def keep_row(file, row):
    "Add a row to the file and sort it by seed, study and plan; other processes may do the same at the same time."
    with FileLock(f'{file}.lock'):
        old = read_rows(file)
        rows = pd.DataFrame([row])
        if len(old):
            rows = pd.concat([old, rows], ignore_index=True)
        names = [s.name for s in studies('')]
        names += [*PLANS, ADVISED]
        order = {name: i for i, name in enumerate(names)}

        def place(column):
            return column if column.name == 'seed' else column.map(order)

        rows = rows.sort_values(['seed', 'study', 'plan'], key=place, kind='stable')
        with atomic_file(file) as f:
            rows.to_csv(f, index=False)


def show(rows):
    "Print scores, advised plans and regrets."
    scores = rows.pivot_table(index='study', columns='plan', values='score', aggfunc=interval, sort=False)
    print('score, mean of the seeds ± half the width of the 95 % interval\n', scores.to_string(), '\n')

    def names(plans):
        return ', '.join(sorted(set(plans)))

    advised = rows[rows.plan == ADVISED].groupby('study', sort=False).advised.agg(names)
    print('advised plans\n', advised.to_string(), '\n')
    r = regrets(rows)
    mean = r.mean().to_frame('mean').T
    most = r.max().to_frame('most').T
    r = pd.concat([r, mean, most])
    print('regret in points\n', r.round(1).to_string())


def do_plan(file, study, table, name, seed):
    "Run one plan of a study, or the advised one, and save its row, unless another process has done so."
    if name in known_rows(file, study, seed).index:
        return
    plan = name
    advised = ''
    if name == ADVISED:
        plan = advise(table, study.task, target=study.target, size=study.size, seed=seed).plan
        advised = plan.name
    done = known_rows(file, study, seed)
    if advised in done.index:
        n, score, seconds = done.loc[advised, ['images', 'score', 'seconds']]
    else:
        n, score, seconds = run(study, table, plan, seed)
    print(f'{study.name}, {name} {advised}, seed {seed}: {score:.4f}, {seconds:.0f} s', flush=True)
    row = {
        'study': study.name,
        'plan': name,
        'seed': seed,
        'images': int(n),
        'score': round(float(score), 4),
        'seconds': round(seconds),
        'advised': advised,
    }
    keep_row(file, row)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=[*range(SEEDS)])
    p.add_argument('--plans', nargs='+', default=[*PLANS, ADVISED])
    p.add_argument('--studies', nargs='+', help='names of studies (default: all)')
    p.add_argument('--tune', action='store_true', help='use only images that are in the training set of every seed')
    p.add_argument('--show', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'nbs' / 'results' / 'plan_study.csv')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    if a.show:
        raise SystemExit(show(read_rows(a.out)))
    if not os.environ.get('DR_TRANSFER_DATA'):
        p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    root = Path(os.environ['DR_TRANSFER_DATA'])
    with tempfile.TemporaryDirectory() as synthetic:
        make_flowers(f'{synthetic}/flowers', n=600, size=128, seed=7)
        make_dr(f'{synthetic}/fundus', n=600, size=160, seed=7)
        for seed, study in product(a.seeds, studies(synthetic)):
            if a.studies and study.name not in a.studies:
                continue
            known = known_rows(a.out, study, seed).index
            todo = [q for q in a.plans if q not in known]
            if todo:
                table = split(study, labelled(study, root, a.tune), seed + 100 * a.tune)
            for name in todo:
                do_plan(a.out, study, table, name, seed)
    show(read_rows(a.out))
