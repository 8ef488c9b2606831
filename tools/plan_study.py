"""Which plan of transfer is best, and does the advisor find it? Every plan on every task, three seeds, on images not
learnt from.

    export DR_TRANSFER_DATA=...        # the folder with flowers/ and dr/
    # hours on two cores; goes on where it was stopped; keeps nbs/results/plan_study.csv
    python tools/plan_study.py
    python tools/plan_study.py --show  # the tables only
    # some of it; several processes may share the file, best with one core each (taskset)
    python tools/plan_study.py --seeds 1
    # on the images that every seed learns from: here rates and thresholds may be chosen
    python tools/plan_study.py --tune --out FILE

Four tasks on photographs (flowers; Messidor-2 referable and five grades; IDRiD referable), each whole and with 30
images a class to learn from, and two drawn sets. Scores: accuracy for flowers, AUC for eyes, for five grades the
mean of each grade against the rest. Each seed is another split: 30 % of the images, at most 600, are the test;
flowers are split by photographer. The advisor sees the training images only. To be affordable on a CPU the
photographs are small (flowers 128 pixels, eyes 160) and for large sets some plans have fewer epochs than their own
(`EPOCHS`); everything else is as the plans have it.
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
from dr_transfer.synthetic.fundus import make_dr, make_flowers
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
    return [
        *(Study(f'{s[0]}, {FEW} a class', *s[1:], few=True) for s in real),
        Study('drawn flowers', f'{drawn}/flowers', 'flowers', 'class', 128),
        Study('drawn eyes', f'{drawn}/eyes', 'dr', 'referable', 160),
        *(Study(*s) for s in real),
    ]


def labelled(study, root, tune):
    "The images of a study; with `tune` only those that every one of its seeds learns from and none is scored on"
    t = label_table(root / study.folder, verify=False)
    if not tune:
        return t
    tables = [split(replace(study, few=False), t, seed) for seed in range(SEEDS)]
    learnt = [set(s[s.split == 'train'].image) for s in tables]
    return t[t.image.isin(set.intersection(*learnt))].reset_index(drop=True)


def split(study, t, seed):
    "The table of a study: test images, all others (or a few of each class) to learn from, and some `valid` for fastai"
    target = get_task(study.task).target(study.target)
    t = encode_target(t, target).reset_index(drop=True)
    t = t.assign(group=Together(get_task(study.task).reader)(t))
    t = split_table(t.assign(label=t.target), valid=0.3, seed=seed).assign(label=t.label)
    train = t[t.split == 'train']
    held = t[t.split == 'valid'].sample(frac=1, random_state=seed)
    valid = held[:40]
    test = held[40:]
    test = test[~test.group.isin(valid.group.dropna())][:MOST_TEST].assign(split='test')
    if study.few:
        train = pd.concat([g.sample(min(len(g), FEW), random_state=seed) for _, g in train.groupby('target')])
    return pd.concat([train, valid, test]).drop(columns='target').reset_index(drop=True)


def mean_auc(p, classes):
    "AUC of each class against the rest, on average over those that occur"
    aucs = []
    for c in classes:
        y = p.target == c
        if 0 < y.sum() < len(p):
            aucs.append(auc(y.astype(int), p[f'p_{c}'].to_numpy()))
    return np.mean(aucs)


def run(study, table, plan, seed):
    "Score on the test side, and seconds"
    start = time.monotonic()
    n = int((table.split == 'train').sum())
    learn = build_learner(table, study.task, target=study.target, size=study.size, plan=plan, seed=seed)
    name = getattr(plan, 'name', plan)
    fit(learn, epochs=EPOCHS.get(name) if n >= LARGE else None, say=lambda s: None)
    p = valid_predictions(learn, 'test')
    flowers = study.task == 'flowers'
    score = accuracy(p.target, p.prediction) if flowers else mean_auc(p, list(learn.dls.vocab))
    return n, score, time.monotonic() - start


def regrets(rows):
    "Points lost against the best plan of the same study, means of the seeds, a row a study and a column a plan"
    t = rows.pivot_table(index='study', columns='plan', values='score', sort=False)
    return 100 * t.rsub(t.drop(columns=ADVISED, errors='ignore').max(axis=1), axis=0)


def interval(x):
    "Mean of some seeds and the half width of its 95 % interval (Student's t), as text"
    n = len(x)
    half = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return f'{x.mean():.3f}' if np.isnan(half) else f'{x.mean():.3f} ± {half:.3f}'


def read_rows(file):
    "What is in the file; a table without rows if there is none"
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(file).fillna({'advised': ''})


def known_rows(file, study, seed):
    "What is in the file of a study and a seed, by plan"
    rows = read_rows(file)
    return rows[(rows.study == study.name) & (rows.seed == seed)].set_index('plan')


def keep_row(file, row):
    "One more row in the file, in the order of seeds, studies and plans; other processes may do the same"
    with FileLock(f'{file}.lock'):
        rows = read_rows(file)
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True) if len(rows) else pd.DataFrame([row])
        names = [s.name for s in studies('')] + [*PLANS, ADVISED]
        order = {name: i for i, name in enumerate(names)}

        def place(column):
            return column if column.name == 'seed' else column.map(order)

        rows = rows.sort_values(['seed', 'study', 'plan'], key=place, kind='stable')
        with atomic_file(file) as f:
            rows.to_csv(f, index=False)


def show(rows):
    "Scores, minutes and regrets, printed"
    scores = rows.pivot_table(index='study', columns='plan', values='score', aggfunc=interval, sort=False)
    print('score, mean of the seeds ± half a 95 % interval\n', scores.to_string(), '\n')

    def names(plans):
        return ', '.join(sorted(set(plans)))

    advised = rows[rows.plan == ADVISED].groupby('study', sort=False).advised.agg(names)
    print('what was advised\n', advised.to_string(), '\n')
    r = regrets(rows)
    r = pd.concat([r, r.mean().to_frame('mean').T, r.max().to_frame('most').T])
    print('regret in points\n', r.round(1).to_string())


def do_plan(file, study, table, name, seed):
    "Run one plan of a study, or what is advised, and keep its row; what another process did is not done again"
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
            known = known_rows(a.out, study, seed).index
            todo = [q for q in a.plans if q not in known]
            if todo:
                table = split(study, labelled(study, root, a.tune), seed + 100 * a.tune)
            for name in todo:
                do_plan(a.out, study, table, name, seed)
    show(read_rows(a.out))
