"""Measure the speed compared with plain fastai: each value is the ratio of two measurements in one run, on the same
machine, with the same network and images.

    export DR_TRANSFER_DATA=...                 # the folder with flowers/ and dr/
    python tools/benchmark.py                   # all parts; hours, most of them plain fastai
    python tools/benchmark.py extract scale     # some parts

    extract   features of every stage, from files, compared with `get_preds` of a plain `vision_learner`, and with the
              network alone on tensors in memory: unchanged, in its fastest format and precision, and as our copy with
              folded BatchNorm
    head      a head on the flowers with quarter turns as augmentation, 30 epochs and solved, compared with 30 frozen
              epochs of plain fastai (3 are run, times 10)
    tail      the last stage and the head, 5 epochs with quarter turns at 384 pixels on Messidor-2, compared with plain
              fastai and `freeze_to`
    steps     training steps of the body with fixed BatchNorm, images in memory, compared with the unchanged network
    scale     1,000, 10,000 and 100,000 synthetic images: time per image, and peak memory
    fundus    from a photograph of 4288 x 2848 pixels to a disc of 512, compared with opening and resizing with PIL,
              with the JPEG decoder alone, and with retinalysis-fundusprep from PyPI (if PEER_PYTHON is the path of a
              Python that has it)
    copies    search for near copies among 100,000 hashes
    large     the default head on synthetic features of 10,000, 50,000 and 100,000 images (4 views, 640 channels), `C`
              chosen on five folds, of the larger ones among two values: time of a pass through the features and
              peak memory, and what follows for 1,000,000 images; compared with scikit-learn on 2,000 images

The results are written to nbs/results/benchmark.csv, a row for each value.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ARCH = 'efficientnet_lite0'


@contextmanager
def fresh_cache():
    "Use an empty cache, except for the measured runtimes."
    old = os.environ.get('DR_TRANSFER_CACHE')
    with tempfile.TemporaryDirectory() as d:
        if old and (Path(old) / 'speed.json').exists():
            (Path(d) / 'speed.json').write_text((Path(old) / 'speed.json').read_text())
        os.environ['DR_TRANSFER_CACHE'] = d
        try:
            yield d
        finally:
            if old is None:
                os.environ.pop('DR_TRANSFER_CACHE')
            else:
                os.environ['DR_TRANSFER_CACHE'] = old


def seconds(f):
    "Call a function: return the seconds that it took, and its result."
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out


def plain_learner(table, size, folder, batch_tfms, metrics, splitter=None):
    "Return a fastai learner with default arguments, as in its documentation, with the same network and weights."
    from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, Normalize, Resize, vision_learner

    from dr_transfer.models.backbones import create_body
    from dr_transfer.models.registry import find_backbone

    spec = find_backbone(ARCH)
    ours = create_body(ARCH, stage='neck').state_dict()

    def train_valid(t):
        valid = (t.split == 'valid').to_numpy()
        return np.flatnonzero(~valid).tolist(), np.flatnonzero(valid).tolist()

    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=ColReader('image'),
        get_y=ColReader('target'),
        item_tfms=Resize(size),
        splitter=train_valid,
        batch_tfms=[*batch_tfms, Normalize.from_stats(spec.mean, spec.std)],
    )
    learn = vision_learner(
        block.dataloaders(table),
        spec.factory,
        pretrained=False,
        normalize=False,
        metrics=metrics,
        path=folder,
        **({'splitter': splitter} if splitter else {}),
    )
    own = learn.model[0].state_dict()
    assert len(own) == len(ours) and all(a.shape == b.shape for a, b in zip(own.values(), ours.values()))
    learn.model[0].load_state_dict(dict(zip(own, ours.values())))
    learn.freeze()
    return learn


def flowers(root, seed=42):
    "Return the table of the flowers, split by photographer."
    from dr_transfer.data.leaks import split_data
    from dr_transfer.data.tasks import get_task

    return split_data(root / 'flowers', get_task('flowers'), get_task('flowers').target(), seed=seed)


def bare_networks(stages):
    "Return a copy of the unchanged network for each format and precision."
    from dr_transfer.models.speed import RUNTIMES

    nets = {}
    for s in RUNTIMES.values():
        layout = torch.channels_last if s.channels_last else torch.contiguous_format
        nets[s] = copy.deepcopy(stages).eval().to(memory_format=layout)
    return nets


def run_bare(nets, runtime, tensors):
    "Compute the output of a network for all batches."
    with torch.inference_mode(), runtime.cast():
        for x in tensors:
            nets[runtime](runtime.place(x))


def cosines(features, others):
    "Return the cosine of two feature vectors for each image."
    pairs = zip(features, others)
    return [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]


def read_batches(paths, size, spec, bs=8):
    "Read images into normalised batches."
    from dr_transfer.data.fundus import read_image
    from dr_transfer.data.views import normalize, stack_images

    batches = []
    for i in range(0, len(paths), bs):
        images = [read_image(p, size) for p in paths[i : i + bs]]
        batches.append(normalize(stack_images(images), spec.mean, spec.std))
    return batches


def alternate(functions, rounds, n):
    "Call the functions in turn: return the images per second of each round, and the results of the last one."
    rates = {name: [] for name in functions}
    out = {}
    for _ in range(rounds):
        for name, f in functions.items():
            t, out[name] = seconds(f)
            rates[name].append(n / t)
    return rates, out


def extract(root, n=512, rounds=9):
    "Measure feature extraction."
    from dr_transfer.features.extraction import extract_features
    from dr_transfer.models.backbones import create_body
    from dr_transfer.models.network import Body
    from dr_transfer.models.speed import get_runtime

    table = flowers(root).sample(n, random_state=0).assign(split='valid').reset_index(drop=True)
    table.loc[:31, 'split'] = 'train'
    paths = table.image.tolist()
    size = 256
    with tempfile.TemporaryDirectory() as d:
        plain = plain_learner(table, size, d, [], [])
        dl = plain.dls.test_dl(table)
        stages = create_body(ARCH, stage='neck')
        body = Body(stages, get_runtime('auto', stages, ARCH, size)).eval()
        tensors = read_batches(paths, size, stages.spec)
        nets = bare_networks(stages)
        for s in nets:
            run_bare(nets, s, tensors[:2])
        best = min(nets, key=lambda s: seconds(lambda: run_bare(nets, s, tensors[:8]))[0])

        def bare():
            run_bare(nets, best, tensors)

        def folded():
            with torch.inference_mode():
                for x in tensors:
                    body(x)

        def ours():
            with fresh_cache():
                return np.array(extract_features(paths, body, size).numpy('neck')[:, 0])

        def fastai():
            with plain.no_bar():
                return plain.get_preds(dl=dl)

        folded()
        functions = {'bare': bare, 'folded': folded, 'ours': ours, 'fastai': fastai}
        rates, out = alternate(functions, rounds, n)
        with torch.no_grad():
            theirs = plain.model[0].eval()(tensors[0]).mean((2, 3)).numpy()
        cos = cosines(out['ours'][:8], theirs)

    def against(other):
        ratio = np.divide(rates['ours'], rates[other])
        a = np.median(rates['ours'])
        b = np.median(rates[other])
        about = f'median of {rounds} rounds, {ratio.min():.2f} to {ratio.max():.2f}'
        return np.median(ratio), f'{about}; {a:.0f} and {b:.0f} images per second'

    return [
        ('features of every stage, from files, compared with plain get_preds', *against('fastai')),
        (
            f'features of every stage, from files, compared with the network alone at its fastest ({best})',
            *against('bare'),
        ),
        (
            'features of every stage, from files, compared with the network alone with folded BatchNorm',
            *against('folded'),
        ),
        ('similarity of the features (smallest cosine of 8 images)', min(cos), ''),
    ]


def head(root, epochs=3, of=30):
    "Measure the training of a head on frozen features."
    from fastai.metrics import accuracy

    from dr_transfer.core import build_learner, fit
    from dr_transfer.data.augment import QuarterTurns
    from dr_transfer.data.tasks import get_task
    from dr_transfer.training.plans import HEAD_PHASE, Plan

    table = flowers(root)

    def ours(plan):
        "Return the seconds, and the accuracy after the last epoch."
        t, learn = seconds(lambda: fit(build_learner(table, augment='quarter_turns'), plan, say=str))
        return t, learn.record.history[-1]['accuracy']

    with fresh_cache():
        t_steps, in_steps = ours(Plan('head in steps', (replace(HEAD_PHASE, epochs=of),)))
    with fresh_cache():
        t_solved, solved = ours('head')
    with tempfile.TemporaryDirectory() as d:
        plain = plain_learner(table, get_task('flowers').size, d, [QuarterTurns()], [accuracy])
        with plain.no_bar(), plain.no_logging():
            t_plain, _ = seconds(lambda: plain.fit_one_cycle(epochs, 2e-3))
    t_plain = t_plain * of / epochs
    theirs = float(plain.recorder.values[-1][-1])

    def about(t):
        return f'{t:.0f} s, features included, and {t_plain:.0f} s'

    return [
        (
            f'a head on the flowers, {of} epochs, compared with {of} frozen epochs of plain fastai ({epochs} run)',
            t_plain / t_steps,
            about(t_steps),
        ),
        ('a solved head on the flowers, compared with the same', t_plain / t_solved, about(t_solved)),
        (f'accuracy, unseen photographers, {of} epochs', in_steps, ''),
        ('accuracy, unseen photographers, solved', solved, ''),
        (f'accuracy, unseen photographers, plain fastai after {epochs} epochs', theirs, ''),
    ]


def tail(root, epochs=5, size=384):
    "Measure the training of the last stage and the head."
    from fastai.metrics import RocAucBinary

    from dr_transfer.core import build_learner, fit
    from dr_transfer.data.augment import QuarterTurns
    from dr_transfer.data.leaks import split_data
    from dr_transfer.data.tasks import get_task
    from dr_transfer.training.plans import Phase, Plan

    table = split_data(root / 'dr' / 'messidor2', get_task('dr'), get_task('dr').target('referable'))
    plan = Plan('last stage and head', (Phase(-2, epochs, 1e-3, lr_mult=20, wd=0.05),))
    with fresh_cache(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t_ours, learn = seconds(lambda: fit(build_learner(table, 'dr', size=size), plan, say=lambda s: None))
    ours = learn.record.history[-1]['auc']

    def splitter(model):
        blocks = dict(model[0].named_parameters())
        last = [p for k, p in blocks.items() if '.6.' in k or 'conv_head' in k or 'bn2' in k]
        ids = {id(p) for p in last}
        return [[p for p in blocks.values() if id(p) not in ids], last, list(model[1].parameters())]

    with tempfile.TemporaryDirectory() as d:
        plain = plain_learner(table, size, d, [QuarterTurns()], [RocAucBinary()], splitter=splitter)
        plain.freeze_to(1)
        with plain.no_bar(), plain.no_logging():
            t_plain, _ = seconds(lambda: plain.fit_one_cycle(epochs, slice(5e-5, 1e-3)))
    return [
        (
            f'last stage and head, {epochs} epochs at {size} pixels, compared with plain fastai',
            t_plain / t_ours,
            f'{t_ours:.0f} s and {t_plain:.0f} s',
        ),
        ('AUC, unseen Messidor-2, dr_transfer', ours, ''),
        ('AUC, unseen Messidor-2, plain fastai', float(plain.recorder.values[-1][-1]), ''),
    ]


def step(net, x):
    "Compute the gradients of one training step."
    net(x).square().mean().backward()


def steps(root, size=256, bs=32, rounds=5):
    "Measure training steps of the body."
    from dr_transfer.models.backbones import create_body
    from dr_transfer.models.network import Body
    from dr_transfer.models.speed import get_runtime, kept_memory

    plain = create_body(ARCH).eval().requires_grad_()
    body = Body(create_body(ARCH), train_runtime=get_runtime('auto', plain, ARCH, size, train=True)).eval()
    body.to(memory_format=torch.channels_last)
    x = torch.randn(bs, 3, size, size)
    times = {'plain': [], 'ours': []}
    for i in range(rounds + 1):
        for name, net in (('plain', plain), ('ours', body)):
            with kept_memory() if net is body else nullcontext():
                step(net, x)  # the first one after memory was returned
                t, _ = seconds(partial(step, net, x))
            if i:
                times[name].append(t)
    ratio = np.divide(times['plain'], times['ours'])
    ours = bs / np.median(times['ours'])
    theirs = bs / np.median(times['plain'])
    about = f'median of {rounds} rounds, {ratio.min():.2f} to {ratio.max():.2f}'
    about = f'{about}; {ours:.0f} and {theirs:.0f} images per second; {body.train_runtime}'
    return [('training steps, compared with the unchanged network', np.median(ratio), about)]


SCALE = """
import resource, sys, time
from pathlib import Path
from dr_transfer.features.extraction import image_features
files = sorted(Path(sys.argv[1]).rglob('*.jpg'))[:int(sys.argv[2])]
image_features(files[:8], 'small_cnn', 'random', 'plain', 32, folder=sys.argv[3] + '/warm')
start = time.perf_counter()
f = image_features(files, 'small_cnn', 'random', 'plain', 32, folder=sys.argv[3], bs=64)
print(len(f), time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
"""


def write_images(folder, n, size=40):
    "Write n small images, all different: patches of synthetic flowers with noise."
    from PIL import Image

    from dr_transfer.synthetic.flowers import make_flowers

    make_flowers(folder / 'source', n=20, size=128, seed=5)
    source = [np.asarray(Image.open(p, formats=('JPEG',))) for p in sorted((folder / 'source').rglob('*.jpg'))]
    rng = np.random.default_rng(0)
    for i in range(n):
        s = source[i % len(source)]
        y, x = rng.integers(0, s.shape[0] - size), rng.integers(0, s.shape[1] - size)
        a = s[y : y + size, x : x + size].astype(np.int16) + rng.integers(-9, 10, (size, size, 3), dtype=np.int16)
        d = folder / 'many' / f'{i // 1000:03d}'
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(d / f'{i:06d}.jpg')


def scale(root, sizes=(1000, 10_000, 100_000)):
    "Measure time and memory of feature extraction over the number of images."
    out = []
    with tempfile.TemporaryDirectory() as d:
        write_images(Path(d), max(sizes))
        for n in sizes:
            r = subprocess.run(
                [sys.executable, '-c', SCALE, f'{d}/many', str(n), f'{d}/store{n}'],
                capture_output=True,
                text=True,
                check=True,
            )
            count, s, mb = map(float, r.stdout.split())
            out += [
                (f'{n} synthetic images: milliseconds per image', 1000 * s / count, f'{s:.0f} s'),
                (f'{n} synthetic images: peak memory, MB', mb, ''),
            ]
    return out


PEER = """
import sys, time
from PIL import Image
import numpy as np
from rtnls_fundusprep.preprocessor import FundusPreprocessor
from rtnls_fundusprep.utils import open_image
prep, best = FundusPreprocessor(square_size=512), 1e9
for _ in range(4):
    start = time.perf_counter()
    for f in sys.argv[1:]: prep(open_image(f))
    best = min(best, time.perf_counter() - start)
print(best)
"""


def fundus(root, rounds=7):
    "Measure the preprocessing of fundus photographs."
    from PIL import Image

    from dr_transfer.data.fundus import read_disc

    files = sorted((root / 'dr' / 'idrid' / 'originals').iterdir())

    def decode(smaller=None):
        for f in files:
            with Image.open(f, formats=('JPEG',)) as im:
                if smaller:
                    im.draft('RGB', smaller)
                im.load()

    functions = {
        'ours': lambda: [read_disc(f, 512) for f in files],
        'pil': lambda: [Image.open(f, formats=('JPEG',)).convert('RGB').resize((512, 512)) for f in files],
        'decoder': decode,
        'decoder at a quarter': lambda: decode((1072, 712)),
    }
    times = {k: [] for k in functions}
    for i, (k, f) in ((i, w) for i in range(rounds + 1) for w in functions.items()):
        t, _ = seconds(f)
        if i:
            times[k].append(1000 * t / len(files))
    ms = {k: np.median(v) for k, v in times.items()}
    out = [
        (
            'disc of 512 pixels, compared with opening and resizing with PIL',
            np.median(np.divide(times['pil'], times['ours'])),
            f'{ms["ours"]:.0f} ms and {ms["pil"]:.0f} ms, one thread',
        ),
        (
            'disc of 512 pixels: time relative to the JPEG decoder alone',
            np.median(np.divide(times['ours'], times['decoder'])),
            f'{ms["decoder"]:.0f} ms for all pixels',
        ),
        (
            'disc of 512 pixels: time relative to the decoder at a quarter of the size',
            np.median(np.divide(times['ours'], times['decoder at a quarter'])),
            f'{ms["decoder at a quarter"]:.0f} ms',
        ),
    ]
    if os.environ.get('PEER_PYTHON'):
        r = subprocess.run(
            [os.environ['PEER_PYTHON'], '-c', PEER, *map(str, files)], capture_output=True, text=True, check=True
        )
        peer = 1000 * float(r.stdout.split()[-1]) / len(files)
        out.append(
            (
                'disc of 512 pixels, compared with retinalysis-fundusprep',
                peer / ms['ours'],
                f'{peer:.0f} ms, one thread, best of 4',
            )
        )
    return out


def copies(root):
    "Measure the search for near copies: its time, and which pairs it finds among random hashes and real photographs."
    from dr_transfer.data.near_pairs import near_pairs

    out = []
    for n in (100_000, 1_000_000):
        hashes = np.random.default_rng(0).integers(0, 256, (n, 32), dtype=np.uint8)
        hashes[-500:] = hashes[:500] ^ np.packbits(np.arange(256) < 40)
        t, pairs = seconds(partial(near_pairs, hashes))
        out.append((f'near copies among {n} hashes: seconds', t, f'{len(pairs)} of 500 pairs of 40 bits were found'))
    return out + [real_copies(root, name) for name in ('flowers', 'dr/messidor2', 'dr/idrid', 'dr/eyepacs')]


def real_copies(root, name) -> tuple:
    "Share of the near pairs of photographs that bit sampling finds; some are made by changing bits"
    from dr_transfer.data.leaks import image_hashes
    from dr_transfer.data.near_pairs import MAX_COPY_BITS, bit_sampling, each_with_each
    from dr_transfer.data.table import label_table

    own, _ = image_hashes(label_table(root / name, verify=False).image.tolist())
    rng = np.random.default_rng(0)
    masks = [np.packbits(rng.permutation(256) < bits) for bits in np.arange(len(own)) % 50]
    hashes = np.concatenate([own, own ^ np.stack(masks)])
    exact = {tuple(pair) for pair in each_with_each(hashes, MAX_COPY_BITS).tolist()}
    found = {tuple(pair) for pair in bit_sampling(hashes, MAX_COPY_BITS).tolist()}
    assert found <= exact
    share = len(found) / len(exact)
    return f'near copies among photographs, {name}: share that is found', share, f'{len(found)} of {len(exact)} pairs'


LARGE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from benchmark import large_features
from dr_transfer.features import classifiers, extraction, logistic

extraction._MAX_NUMBERS = 0  # small sets are read in blocks too
classifiers.C_VALUES = classifiers.C_VALUES[:int(sys.argv[4])]

def memory(kind):  # VmRSS: now; VmHWM: the peak. ru_maxrss begins with the memory of the process that started this one
    status = dict(line.split(':', 1) for line in open('/proc/self/status'))
    return int(status[kind].split()[0]) / 1024

def core_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

passes = 0
gradient = logistic.LogisticProblem.loss_gradient

def counted(*args):
    global passes
    passes += 1
    return gradient(*args)

logistic.LogisticProblem.loss_gradient = counted
features, y = large_features(sys.argv[2], int(sys.argv[3]))
before = memory('VmRSS')
with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')  # the peak begins here, after the checksums of the stores were compared
start, used = time.perf_counter(), core_seconds()
model = classifiers.FeatureClassifier().fit(features, y)
print(core_seconds() - used, time.perf_counter() - start, passes, before, memory('VmHWM'), model.estimator_.C)
"""
LARGE_STAGES = {'stage6': 256, 'stage7': 384}  # 640 channels


def large_features(folder, n, views='quarter_turns'):
    "Return synthetic features of n images, and their classes; they are written into stores unless they are there."
    from dr_transfer.features.extraction import Features, _field
    from dr_transfer.utils.store import ArrayStore, fill_rows

    rng = np.random.default_rng(0)
    channels = sum(LARGE_STAGES.values())
    y = rng.integers(0, 5, n)
    mixing = rng.normal(size=(64, channels)) / np.sqrt(np.arange(1, 65))[:, None]  # correlated channels
    means = 0.25 * rng.normal(size=(5, 64))
    stores = {}
    for v in range(4):
        for stage, d in LARGE_STAGES.items():
            field = _field(stage, v)
            about = {'arch': 'synthetic', 'pools': ['mean'], 'weights': 'none', 'view': v, 'stage': stage}
            stores[field] = ArrayStore(folder, field, about, {field: ((1, 1, d), 'float32')})

    def compute(images, fields, bs=1000):
        for i in range(0, len(images), bs):
            of = y[images[i : i + bs]]
            image = (means[of] + rng.normal(size=(len(of), 64))) @ mixing
            out = {}
            for v in range(4):
                x = np.maximum(image + 0.7 * rng.standard_normal(image.shape, np.float32), 0)
                parts = np.split(x[:, None, None], np.cumsum(list(LARGE_STAGES.values()))[:-1], -1)
                out |= {_field(stage, v): part for stage, part in zip(LARGE_STAGES, parts)}
            yield out

    keys = [f'{i:032x}' for i in range(n)]
    rows = fill_rows(list(stores.values()), keys, list(range(n)), compute, 1000)
    return Features(stores, dict(zip(stores, rows)), keys, views), y


def core_seconds(f):
    "Call a function: return the seconds of all cores that it took, and its result."
    start = time.process_time()
    out = f()
    return time.process_time() - start, out


def solved_by_scikit_learn(x, y, folds, values):
    "Choose C on folds, and fit logistic regression to all rows: return it, and the standardised rows."
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    views = x.shape[1]
    scaled = StandardScaler().fit_transform(x.reshape(-1, x.shape[2])).reshape(x.shape).astype(np.float64)

    def path(images):
        model = LogisticRegression(max_iter=5000, warm_start=True)
        rows = scaled[images].reshape(-1, x.shape[2])
        for C in values:
            yield model.set_params(C=C).fit(rows, y[images].repeat(views), np.full(len(rows), 1 / views))

    losses = np.zeros(len(values))
    for train, test in folds:
        for i, model in enumerate(path(train)):
            p = model.predict_proba(scaled[test].reshape(-1, x.shape[2])).reshape(len(test), views, -1).mean(1)
            losses[i] -= np.log(p[np.arange(len(test)), y[test]].clip(0.001)).sum() / len(y)
    *_, (_, model) = zip(range(losses.argmin() + 1), path(np.arange(len(y))))
    return model, scaled


def like_scikit_learn(n=2000):
    "Compare the default head with scikit-learn on each fold: time, and the loss that both minimise."
    from threadpoolctl import threadpool_limits

    from dr_transfer.features.classifiers import C_VALUES, FeatureClassifier, grouped_folds

    with tempfile.TemporaryDirectory() as d, threadpool_limits(1, user_api='blas'):
        features, y = large_features(d, n)
        x = features.numpy()
        ours, model = core_seconds(lambda: FeatureClassifier().fit(features, y))
        theirs, (own, scaled) = core_seconds(lambda: solved_by_scikit_learn(x, y, grouped_folds(y), C_VALUES))

    def loss(found):
        z = scaled @ found.coef_.T + found.intercept_
        log_p = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
        return -log_p[np.arange(n), :, y].mean() + (found.coef_**2).sum() / (2 * own.C * n)

    difference = loss(model.estimator_) - loss(own)
    about = f'{difference:.1e}; C = {model.estimator_.C:g} and {own.C:g}'
    return [
        (
            f'head on {n} images, compared with scikit-learn on each fold',
            theirs / ours,
            f'{ours:.0f} and {theirs:.0f} core seconds',
        ),
        (f'head on {n} images: loss minus that of scikit-learn, in 0.0001', difference / 1e-4, about),
    ]


def large(root, sizes=(10_000, 50_000, 100_000), aim=1_000_000):
    "Measure time and memory of the default head on features on disk; none of the sets is kept in memory."
    from dr_transfer.features.classifiers import C_VALUES

    out = like_scikit_learn()
    found = {}
    for n in sizes:
        values = len(C_VALUES) if n == sizes[0] else 2  # the number of passes is known from the first set
        with tempfile.TemporaryDirectory() as d:
            large_features(d, n)
            run = [sys.executable, '-c', LARGE, str(Path(__file__).parent), d, str(n), str(values)]
            r = subprocess.run(run, capture_output=True, text=True, check=True)
        core, s, passes, before, after, C = map(float, r.stdout.split())
        found[n] = core / passes, after, passes
        gb = n * 4 * sum(LARGE_STAGES.values()) * 4 / 1e9
        about = f'{gb:.2f} GB of features; {values} values of C, {passes:.0f} passes'
        out += [
            (f'head on {n} images: core seconds of a pass', core / passes, about),
            (f'head on {n} images: peak memory, MB', after, f'{before:.0f} MB before the head'),
        ]
        if n == sizes[0]:
            out.append((f'head on {n} images: core seconds', core, f'{s:.0f} s; C = {C:g}'))
        print(pd.DataFrame(out).to_string(index=False, header=False), flush=True)
    first, last = sizes[0], sizes[-1]
    slopes = [(b - a) / (last - first) for a, b in zip(found[first][:2], found[last])]
    core, mb = (value + slope * (aim - last) for value, slope in zip(found[last], slopes))
    about = f'extrapolated with the slope between {first} and {last} images'
    passes = found[first][2]
    return [
        *out,
        (f'head on {aim} images: core hours', core * passes / 3600, f'{about}, for {passes:.0f} passes'),
        (f'head on {aim} images: peak memory, MB', mb, about),
    ]


PARTS = {f.__name__: f for f in (extract, head, tail, steps, scale, fundus, copies, large)}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=[], help=', '.join(PARTS))
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'nbs' / 'results' / 'benchmark.csv')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    from dr_transfer.utils.files import unknown
    from dr_transfer.utils.places import atomic_file

    root = Path(
        os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    )
    rows = (
        pd.read_csv(a.out).fillna('') if a.out.exists() else pd.DataFrame(columns=['part', 'metric', 'value', 'about'])
    )
    for name in a.parts or PARTS:
        if name not in PARTS:
            raise SystemExit(str(unknown('part', name, PARTS)))
        new = pd.DataFrame(
            [(name, f, round(v, 3), about) for f, v, about in PARTS[name](root)],
            columns=['part', 'metric', 'value', 'about'],
        )
        rows = pd.concat([rows[rows.part != name], new], ignore_index=True) if len(rows) else new
        with atomic_file(a.out) as f:
            rows.to_csv(f, index=False)
        print(new.to_string(index=False), flush=True)
