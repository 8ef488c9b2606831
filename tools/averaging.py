"""Measure what averaging the weights before and after fine-tuning does, at home and elsewhere, on real photographs.

    export DR_TRANSFER_DATA=...          # the folder with flowers/ and dr/
    python tools/averaging.py            # both parts; trains each network once
    python tools/averaging.py dr         # one part: flowers or dr
    python tools/averaging.py --changed  # half of the images are changed in training

A quarter of the patients or photographers of a collection are test images. On the others, the default head is solved,
and then everything is fine-tuned (plan fine_tune_averaged). There is a row for each fraction of the fine-tuned weights:

    loss      mean log loss on changed validation images; the plan chooses the fraction with the smallest
    home      the test images
    changed   the test images with each change of acquisition (dr_transfer.data.acquisition): mean over the changes
    NAME      another collection, for dr: trained on messidor2

The metric is accuracy for flowers and the AUC of referable retinopathy for dr. Each image has one view. Nothing is
chosen on test images. The results are written to nbs/results/averaging.csv.

With --changed, fine-tuning reads half of the images as another site could have made them: each time, one of the changes
is drawn at random. The head before it is the same. The results are written to nbs/results/averaging_changed.csv.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from elsewhere import data_folder, mean, write_part
from fasttransform import Transform
from sklearn.metrics import roc_auc_score

from dr_transfer.core import build_learner, fit
from dr_transfer.data.acquisition import CHANGES, ChangedImage, changed_images
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import ReadImage
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.models.network import view_probs
from dr_transfer.training.average import FRACTIONS, averaged, copied_weights

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
FOLDERS = {'flowers': ('flowers', ()), 'dr': ('dr/messidor2', ('dr/idrid', 'dr/eyepacs'))}
N_CHANGED = 150  # test images that are changed, each in every way


@dataclass(frozen=True)
class TestSet:
    "Images that are read once, and their class numbers"

    name: str
    images: list
    y: np.ndarray


class HalfChanged(Transform):
    "In training, read half of the images with a change of acquisition that is drawn each time"

    split_idx = 0

    def encodes(self, path):
        name = list(CHANGES)[int(torch.randint(len(CHANGES), ()))]
        return ChangedImage(path, name) if torch.rand(()) < 0.5 else path


def change_training(learn):
    "Change half of the training images of a learner, before they are read"
    steps = learn.dls.train_ds.tls[0].tfms.fs
    (at,) = [i for i, step in enumerate(steps) if isinstance(step, ReadImage)]
    steps.insert(at, HalfChanged())


def class_numbers(learn, labels) -> np.ndarray:
    "Numbers of the classes of labels"
    return np.array([learn.dls.vocab.o2i[learn.target.of(label)] for label in labels])


def read_all(learn, name, images, y) -> TestSet:
    "Read images as the network needs them"
    task = learn.task
    read = ReadImage(task.size, task.reader, task.fit).image
    with ThreadPoolExecutor(2) as pool:
        return TestSet(name, list(pool.map(read, images)), y)


def score(learn, test) -> float:
    "Accuracy, or the AUC of two classes"
    spec = learn.body.stages.spec
    probs = view_probs(learn.model, test.images, as_it_is, spec.mean, spec.std)
    if probs.shape[1] == 2:
        return float(roc_auc_score(test.y, probs[:, 1]))
    right = probs.argmax(1) == test.y
    return float(right.mean())


def as_it_is(image):
    "The images are read already"
    return image


def test_sets(learn, root, held_out, others) -> list[TestSet]:
    "Test images as they are, with each change, and of other collections"
    images = held_out.image.tolist()
    y = class_numbers(learn, held_out.label)
    order = np.random.default_rng(0).permutation(len(y))
    some = order[:N_CHANGED]
    to_change = [images[i] for i in some]
    sets = [read_all(learn, 'home', images, y)]
    for change in CHANGES:
        changed = changed_images(to_change, change)
        sets.append(read_all(learn, change, changed, y[some]))
    for folder in others:
        t = label_table(root / folder, verify=False)
        name = Path(folder).name
        y = class_numbers(learn, t.label)
        sets.append(read_all(learn, name, t.image.tolist(), y))
    return sets


def measure(root, task, changed=False) -> list[dict]:
    "Fine-tune once, with changed images if wanted; a row for each fraction"
    folder, others = FOLDERS[task]
    t = label_table(root / folder, verify=False)
    groups = t.group.where(t.group.notna(), t.image)
    folds = grouped_folds(t.label, groups.to_numpy(object), 4, seed=0)
    train, test = folds[0]
    own = t.iloc[train].reset_index(drop=True)
    learn = build_learner(own, task, seed=0)
    fit(learn, 'head')
    before = copied_weights(learn)
    sets = test_sets(learn, root, t.iloc[test], others)
    if changed:
        change_training(learn)
    after = fine_tuned(learn)
    losses = {row['fraction']: row['loss'] for row in learn.record.average_path}
    rows = []
    for fraction in FRACTIONS:
        learn.model.load_state_dict(averaged(before, after, fraction))
        scores = {test.name: score(learn, test) for test in sets}
        of_changes = [scores.pop(change) for change in CHANGES]
        row = {
            'task': task,
            'fraction': fraction,
            'chosen': fraction == learn.record.average,
            'loss': losses[fraction],
            'home': scores.pop('home'),
            'changed': mean(of_changes),
        }
        rows.append(row | scores)
        print(rows[-1], flush=True)
    return rows


def fine_tuned(learn) -> dict:
    "Weights after fine-tuning and before averaging"
    kept = {}

    def say(line):
        print(line, flush=True)
        if line.startswith('phase 2'):
            kept.update(copied_weights(learn))

    fit(learn, 'fine_tune_averaged', say=say)
    return kept


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(FOLDERS))
    p.add_argument('--changed', action='store_true', help='change half of the images in training')
    a = p.parse_args()
    root = data_folder(p)
    name = 'averaging_changed' if a.changed else 'averaging'
    for part in a.parts:
        write_part(RESULTS / f'{name}.csv', part, measure(root, part, a.changed))


if __name__ == '__main__':
    main()
