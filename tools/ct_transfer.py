"""Compare random initialisation with transfer for lymph nodes in CT, with the same number of steps for all.

    export DR_TRANSFER_DATA=...      # the folder with flowers/
    export DR_TRANSFER_WEIGHTS=...   # the folder with squeezenet1_1.safetensors
    python tools/ct_transfer.py      # an interrupted run goes on where it stopped

A small version of the study of Shin et al. (2016, arXiv:1602.03409). The images are three planes through a candidate,
as RGB, of synthetic volumes, at 64 pixels. The networks, and the images on which they were pretrained:

    cifarnet, alexnet, googlenet        the five flowers, because their ImageNet weights are not included
    squeezenet1_1, efficientnet_lite0   ImageNet

Each is trained in three ways:

    random initialisation   everything is trained
    fine-tuned              the same, from the pretrained weights: same steps, same batches, BatchNorm free in both.
                            Both are trained for 200 steps, and with the largest training set for 600 as well
    frozen                  a linear head on the pretrained features; it is solved, not trained in steps

The learning rate of each network and method is the best on candidates of other patients, who are in no training and
no test set that is reported: three are tried, and more while the best is at the end of the range. Each seed has
patients of its own, for training and for testing, so the 95 % intervals are t intervals over independent repetitions.
A row is written to nbs/results/ct_learning.csv after each training; ct_training.csv has the error during training with
the largest training set, and ct_rates.csv the rates that were tried. Images and pretrained weights are kept in the
cache (DR_TRANSFER_CACHE).
"""

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dr_transfer.data.ct_images import candidate_images
from dr_transfer.data.fundus import read_image
from dr_transfer.data.split import split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.views import VIEWS, normalize, stack_images
from dr_transfer.evaluation.experiments import first_images
from dr_transfer.features.classifiers import FeatureClassifier
from dr_transfer.metrics.scores import auc
from dr_transfer.models.backbones import create_body, save_weights
from dr_transfer.models.network import create_head
from dr_transfer.synthetic.ct import make_ct
from dr_transfer.utils.files import cache_folder
from dr_transfer.utils.places import atomic_file

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
SOURCES = {
    'cifarnet': 'flowers',
    'alexnet': 'flowers',
    'squeezenet1_1': 'ImageNet',
    'efficientnet_lite0': 'ImageNet',
    'googlenet': 'flowers',
}
RANDOM, FROZEN, TUNED = 'random initialisation', 'frozen', 'fine-tuned'
SIZES = (60, 200, 600)  # training candidates
STEPS, BATCH = 200, 16
LONGER = 600  # steps, with the largest training set only
PRETRAINING_STEPS = 1000  # on the flowers
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = RATES[2:5]  # tried in any case; others while the best is the lowest or the highest that was tried
SIZE = 64  # pixels
N_TRAIN, N_TEST = 50, 30  # patients, with 12 candidates each
CHOOSING = 1000  # seed of the patients for choosing rates; those of the seeds that are reported are 0, 1, ...
CHOOSING_SIZE = 200  # training candidates for choosing rates


def say(line):
    "Print a line with the time of day."
    print(time.strftime('%H:%M:%S'), line, flush=True)


@dataclass(frozen=True)
class Rows:
    "A CSV file of results that grows row by row"

    name: str

    @property
    def file(self):
        return RESULTS / f'{self.name}.csv'

    def read(self):
        "Return the rows so far."
        return pd.read_csv(self.file) if self.file.exists() else pd.DataFrame()

    def having(self, **key):
        "Return the rows with these values, as a table."
        t = self.read()
        for column, value in key.items():
            t = t[t[column] == value] if len(t) else t
        return t

    def add(self, rows):
        "Add rows, and write the file."
        t = pd.concat([self.read(), pd.DataFrame(rows)], ignore_index=True)
        with atomic_file(self.file) as f:
            t.to_csv(f, index=False)


LEARNING, TRAINING, TRIED = Rows('ct_learning'), Rows('ct_training'), Rows('ct_rates')


@dataclass(frozen=True)
class Images:
    "Images of candidates, with their classes and patients"

    x: torch.Tensor  # uint8 (n, 3, SIZE, SIZE)
    y: torch.Tensor  # 1 for a node (n,)
    patients: np.ndarray  # (n,)


@dataclass(frozen=True)
class Patients:
    "Synthetic patients, of whom some are for training and the others for testing"

    folder: Path
    seed: int

    @cached_property
    def table(self):
        "The candidates in random order, with `target` and `split`; no patient is in both parts."
        volumes = self.folder / f'volumes_{self.seed}'
        images = self.folder / f'images_{self.seed}'
        make_ct(volumes, n=N_TRAIN + N_TEST, seed=self.seed)
        candidate_images(volumes / 'candidates.csv', volumes, images, size=SIZE)
        t = label_table(images)
        is_train = t.group.rank(method='dense') <= N_TRAIN
        t = t.assign(target=t.label, split=np.where(is_train, 'train', 'test'))
        return t.sample(frac=1, random_state=self.seed).reset_index(drop=True)

    @cached_property
    def pixels(self):
        "All images (n, 3, SIZE, SIZE), in the order of the table."
        return stack_images([read_image(file, SIZE, fit='squish') for file in self.table.image])

    def images(self, split, n=None):
        "Return the images of a part, or n of those for training, each class in proportion."
        t = self.table if n is None else first_images(self.table, n)
        t = t[t.split == split]
        y = torch.tensor((t.target == 'node').to_numpy(), dtype=torch.long)
        return Images(self.pixels[t.index.to_numpy()], y, t.group.to_numpy())


@dataclass(frozen=True)
class Network:
    "A network and its pretrained weights"

    arch: str
    weights: Path | None = None  # None: those of ImageNet
    accuracy: float = float('nan')  # On flowers of other photographers

    def body(self, random, seed=0):
        "Return the convolutional part, with pretrained or random weights."
        torch.manual_seed(seed)
        body = create_body(self.arch, 'random' if random else self.weights)
        return body.to(memory_format=torch.channels_last)


def turned(x):
    "Turn each image by a random number of right angles."
    views = torch.randint(4, (len(x),))
    out = x.clone()
    for i, view in enumerate(VIEWS['quarter_turns'].functions):
        out[views == i] = view(x[views == i])
    return out


def mirrored(x):
    "Mirror each image with probability one half."
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def endless(n):
    "Yield batches of row numbers, in a new random order each time that all images have been used."
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(n)])
        yield order[:BATCH]
        order = order[BATCH:]


@torch.inference_mode()
def probabilities(
    body,
    head,
    x,  # Pixels (n, 3, SIZE, SIZE)
    views=VIEWS['quarter_turns'],  # Views that are averaged
):
    "Return the probability of a node, averaged over views."
    body.eval()
    head.eval()
    out = []
    for part in x.split(120):
        inputs = normalize(part, body.spec.mean, body.spec.std)
        total = 0
        for view in views.of(inputs):
            logits = head(body(view))
            total = total + logits.softmax(1)[:, 1]
        out.append(total / len(views))
    body.train()
    head.train()
    return torch.cat(out)


def metrics(p, test):
    "Return AUC and accuracy of probabilities."
    accuracy = float(((p > 0.5) == (test.y == 1)).float().mean())
    return {'auc': round(auc(test.y.numpy(), p.numpy()), 4), 'accuracy': round(accuracy, 4)}


def fitted(
    body,  # From `Network.body`; it is trained in place
    data,  # Images
    classes,  # Number of classes
    rate,  # Largest learning rate
    steps,  # Number of steps
    moved,  # Augmentation of a batch
    watch=None,  # Called with the step, the head and the loss
):
    "Train a body and a new linear head in steps; return the head. `watch` is called with the step, head and loss."
    head = create_head('linear', body.n_out, classes).train()
    body.train()
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.25)
    for step, rows in zip(range(1, steps + 1), endless(len(data.y))):
        x = normalize(moved(data.x[rows]), body.spec.mean, body.spec.std)
        loss = torch.nn.functional.cross_entropy(head(body(x)), data.y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(step, head, loss.item())
        if step % 500 == 0:
            say(f'{body.spec.name}: {step} of {steps} steps')
    return head


def train(
    network,  # Network
    method,  # RANDOM or TUNED
    rate,  # Largest learning rate
    data,  # Images for training
    seed,  # Of the weights and the batches
    steps,  # Number of steps
    test=None,  # Images for testing during training
):
    "Train everything in steps; return the trained parts, and the test error every twenty steps if wanted."
    body = network.body(method == RANDOM, seed)
    errors, losses = [], []

    def watch(step, head, loss):
        losses.append(loss)
        if test is not None and step % 20 == 0:
            found = metrics(probabilities(body, head, test.x, VIEWS['none']), test)
            error = round(1 - found['accuracy'], 4)
            errors.append({'steps': step, 'train_loss': round(np.mean(losses[-20:]), 4), 'error': error} | found)

    torch.manual_seed(seed)  # the same head and the same batches for each method
    head = fitted(body, data, 2, rate, steps, turned, watch)
    return body, head, errors


def flowers(root):
    "Return the flowers for training, and those of other photographers."
    t = split_table(label_table(root / 'flowers', verify=False), valid=0.2, seed=0)
    y = torch.tensor(t.label.astype('category').cat.codes.to_numpy(), dtype=torch.long)
    x = stack_images([read_image(file, SIZE) for file in t.image])
    parts = [(t.split == name).to_numpy() for name in ('train', 'valid')]
    return [Images(x[rows], y[rows], t.group.to_numpy()[rows]) for rows in parts]


@torch.inference_mode()
def flower_accuracy(body, head, data):
    "Return the fraction of flowers that are recognised."
    body.eval()
    head.eval()
    correct = 0
    for x, y in zip(data.x.split(120), data.y.split(120)):
        inputs = normalize(x, body.spec.mean, body.spec.std)
        logits = head(body(inputs))
        correct += int((logits.argmax(1) == y).sum())
    return correct / len(data.y)


def pretrained(root, arch, folder):
    "Return a network with its weights; those of the flowers are trained once, for about ten epochs."
    if SOURCES[arch] == 'ImageNet':
        return Network(arch)
    file = folder / f'{arch}.safetensors'
    note = folder / f'{arch}.txt'
    if not note.exists():
        data, others = flowers(root)
        body = Network(arch).body(random=True)
        head = fitted(body, data, 5, 1e-3, PRETRAINING_STEPS, mirrored)
        save_weights(body, file, overwrite=True)
        note.write_text(str(flower_accuracy(body, head, others)))
    network = Network(arch, file, float(note.read_text()))
    say(f'{arch}: accuracy {network.accuracy:.3f} on flowers of other photographers')
    return network


@torch.inference_mode()
def features(body, x):
    "Return the pooled features of all views (n, views, channels)."
    out = []
    for part in x.split(120):
        inputs = normalize(part, body.spec.mean, body.spec.std)
        views = VIEWS['quarter_turns'].of(inputs)
        pooled = [body(view).mean((2, 3)) for view in views]
        out.append(torch.stack(pooled, 1))
    return torch.cat(out).numpy()


def run(
    network,  # Network
    method,  # RANDOM, FROZEN or TUNED
    rate,  # Largest learning rate; None for FROZEN
    patients,  # Patients for training and testing
    n,  # Number of training candidates
    steps,  # Number of steps
    with_errors=False,  # Test during training as well?
):
    "Train on n candidates and test; return the metrics, and the errors during training."
    data, test = patients.images('train', n), patients.images('test')
    if method == FROZEN:
        body = network.body(random=False).eval()
        model = FeatureClassifier(seed=patients.seed).fit(features(body, data.x), data.y.numpy(), data.patients)
        return metrics(torch.tensor(model.predict_proba(features(body, test.x))[:, 1]), test), []
    body, head, errors = train(network, method, rate, data, patients.seed, steps, test if with_errors else None)
    return metrics(probabilities(body, head, test.x), test), errors


def try_rate(
    network,  # Network
    method,  # RANDOM or TUNED
    rate,  # Largest learning rate
    patients,  # Patients for choosing
):
    "Return the AUC with a learning rate, on the patients for choosing."
    key = {'arch': network.arch, 'method': method, 'rate': rate}
    known = TRIED.having(**key)
    if len(known):
        return known.auc.iloc[0]
    found, _ = run(network, method, rate, patients, CHOOSING_SIZE, STEPS)
    TRIED.add([key | {'images': CHOOSING_SIZE, 'steps': STEPS} | found])
    say(f'{network.arch}, {method}, learning rate {rate:g}: AUC {found["auc"]:.3f} on the patients for choosing')
    return found['auc']


def choose_rate(
    network,  # Network
    method,  # RANDOM or TUNED
    patients,  # Patients for choosing
):
    "Return the learning rate with the largest AUC on the patients for choosing, with a lower and a higher one tried."
    scores = {rate: try_rate(network, method, rate, patients) for rate in FIRST}
    while True:
        best = max(scores, key=scores.get)
        i = RATES.index(best)
        beside = [rate for rate in RATES[max(0, i - 1) : i + 2] if rate not in scores]
        if not beside:
            return best
        scores |= {rate: try_rate(network, method, rate, patients) for rate in beside}


def report(
    network,  # Network
    method,  # RANDOM, FROZEN or TUNED
    rate,  # Largest learning rate; None for FROZEN
    patients,  # Patients of one seed
    sizes,  # Numbers of training candidates
    steps,  # Number of steps
):
    "Train on each number of candidates, and write the results."
    steps = 0 if method == FROZEN else steps
    about = {'arch': network.arch, 'method': method, 'seed': patients.seed}
    for n in sizes:
        key = about | {'images': n, 'steps': steps}
        if len(LEARNING.having(**key)):
            continue
        found, errors = run(network, method, rate, patients, n, steps, with_errors=n == max(SIZES))
        if errors and not len(TRAINING.having(**about, of=steps)):
            TRAINING.add([about | {'of': steps, 'epoch': e['steps'] * BATCH / n} | e for e in errors])
        more = {
            'rate': rate,
            'test_ratio': 0,
            'source': SOURCES[network.arch],
            'source_accuracy': round(network.accuracy, 4),
        }
        LEARNING.add([key | found | more])
        say(f'{network.arch}, {method}, {n} candidates, {steps} steps, seed {patients.seed}: AUC {found["auc"]:.3f}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', default=list(SOURCES), metavar='NETWORK', help=', '.join(SOURCES))
    p.add_argument('--seeds', type=int, default=3, help='number of repetitions, each with patients of its own')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    data = os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/')
    folder = cache_folder() / 'ct_transfer'
    folder.mkdir(parents=True, exist_ok=True)
    networks = [pretrained(Path(data), arch, folder) for arch in a.networks]
    choosing = Patients(folder, CHOOSING)
    rates = {}
    for network in networks:
        for method in (RANDOM, TUNED):
            rates[network.arch, method] = choose_rate(network, method, choosing)
    repetitions = [Patients(folder, seed) for seed in range(a.seeds)]
    for patients, network, method in product(repetitions, networks, (RANDOM, FROZEN, TUNED)):
        report(network, method, rates.get((network.arch, method)), patients, SIZES, STEPS)
    for patients, network, method in product(repetitions, networks, (RANDOM, TUNED)):
        report(network, method, rates[network.arch, method], patients, SIZES[-1:], LONGER)


if __name__ == '__main__':
    main()
