"Compare features of a frozen network with those by hand; test that they are computed once, and after changes."

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from learners import disturb
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn

from dr_transfer.data import content
from dr_transfer.data.fundus import read_image
from dr_transfer.data.views import VIEWS, correct_light, map_rows
from dr_transfer.features import extraction as features
from dr_transfer.features.boundary import boundary_maps, split_body
from dr_transfer.features.classifiers import FeatureClassifier
from dr_transfer.features.extraction import Features, extract_features, image_features, weights_digest
from dr_transfer.models import speed
from dr_transfer.models.backbones import create_body
from dr_transfer.models.head import Head
from dr_transfer.models.layout import POOLS
from dr_transfer.models.network import HEADS, AveragePool, Body, create_head, view_probs
from dr_transfer.models.networks import SmallCNN
from dr_transfer.models.registry import find_backbone
from dr_transfer.models.speed import RUNTIMES
from dr_transfer.models.stages import Stages, stage_names
from dr_transfer.utils import store

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((127 / 255,) * 3, (128 / 255,) * 3)
FIVE = (0.5,) * 3, (0.5,) * 3


def enlarged(x):
    "The central 78 %, enlarged with `interpolate`."
    n = x.shape[-1]
    e = round(n * 0.11)
    return torch.nn.functional.interpolate(x[..., e : n - e, e : n - e], (n, n), mode='bilinear', antialias=True)


TURNS = {
    'none': [lambda x: x],
    'mirror': [lambda x: x.flip(3)],
    'mirror_near': [lambda x: x, lambda x: x.flip(3), enlarged, lambda x: enlarged(x.flip(3))],
    'quarter_turns': [lambda x, k=k: torch.rot90(x, k, (2, 3)) for k in range(4)],
}
TURNS['mirror'].insert(0, TURNS['none'][0])


def after_light(turn):
    "A view of the image with corrected light."

    def view(x):
        return turn(correct_light(x))

    return view


for name, turns in list(TURNS.items()):
    TURNS[f'{name}+local'] = turns + [after_light(turn) for turn in turns]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "With one thread, a forked process computes the same bits and does not wait for threads that it does not have"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def arrays():
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8), np.ones((6, 6, 1), np.uint8)) for i in range(7)
    ]


@pytest.fixture(scope='module')
def paths(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i, a in enumerate(arrays):
        Image.fromarray(a).save(folder / f'{i}.png')
    return [str(folder / f'{i}.png') for i in range(len(arrays))]


@pytest.fixture(scope='module')
def stages():
    torch.manual_seed(0)
    return create_body('test_resnet', 'random')


@pytest.fixture
def body():
    return fresh()


def fresh(runtime='plain', arch='test_resnet', **kw):
    torch.manual_seed(0)
    return Body(create_body(arch, 'random', **kw), RUNTIMES[runtime])


def n_images(x):
    return int((x != x[..., :1, :1]).flatten(1).any(1).sum())  # black images that fill up a batch do not count


@contextmanager
def counting(body, act=None):
    "Count the images that pass the network, with all views, but without the blank image that determines the widths."
    computed = []

    def hook(m, args):
        if act:
            act(len(computed))
        if n_images(args[0]):
            computed.append(n_images(args[0]))

    handle = (body.stages[0] if isinstance(body.stages, nn.Sequential) else body.stages).register_forward_pre_hook(hook)
    try:
        yield computed
    finally:
        handle.remove()


@contextmanager
def counting_requests(body):
    "The features that the network computes: stage -> number of images, with all views"
    calls = []
    requests = Counter()
    pooled = body.pooled

    def spy(x, names, *a):
        if n_images(x):
            calls.extend((n, n_images(x)) for n in names)
        return pooled(x, names, *a)

    body.pooled = spy
    try:
        yield requests
    finally:
        del body.pooled
        for n, k in calls:
            requests[n] += k


def start_process(work):
    "Run `work` in a forked process and return its id"
    if not sys.platform.startswith('linux'):
        pytest.skip('no process can be copied with its threads')
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
    else:
        os._exit(0)
    finally:
        os._exit(1)


def exit_code(pid, seconds=60):
    "Return the exit code of another process"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def folders(f):
    return {k: s.folder for k, s in f.stores.items()}


def contents(f):
    return {f'{k} {p.name}': p.read_bytes() for k, d in folders(f).items() for p in d.iterdir() if p.name != 'lock'}


def times(f):
    return {p: p.stat().st_mtime_ns for d in folders(f).values() for p in (d, *d.iterdir())}


def part(complete, stages):
    return {k: v for k, v in complete.items() if k.split()[0].split('.')[0] in stages}


# ---------------------------------------------------------------- comparison with features by hand

PLACES = {
    'test_resnet': 'maxpool layer1 layer2 layer3 layer4',
    'test_efficientnet': 'bn1 blocks.0 blocks.1 blocks.2 blocks.3 bn2',
    'small_cnn': 'features.0 features.1 features.2 features.3',
    'squeezenet1_1': 'features.1 features.4 features.7 features.12',
    'mobilenet_v2': 'features.1 features.3 features.6 features.13 features.18',
    'test_vit': 'norm_pre blocks.1 blocks.3 blocks.4 norm',
}
NORMS = dict(zip(PLACES, (FIVE, IMAGENET, HALF, IMAGENET, IMAGENET, FIVE)))
SIZE = 72


def network(name):
    "The network of its library, with random weights and statistics"
    torch.manual_seed(3)
    net = (
        SmallCNN()
        if name == 'small_cnn'
        else torchvision.models.get_model(name, weights=None)
        if name in ('squeezenet1_1', 'mobilenet_v2')
        else timm.create_model(name)
    )
    disturb(net, convolutions=True)
    return net.eval()


def maps_at(net, places, x):
    "The outputs of some modules of a network"
    maps = {}

    def keep(place):
        def hook(module, inputs, output):
            maps[place] = output.clone()

        return net.get_submodule(place).register_forward_hook(hook)

    hooks = [keep(place) for place in places]
    net(x)
    for hook in hooks:
        hook.remove()
    return list(maps.values())


@torch.no_grad()
def by_hand(net, name, paths, views, size=SIZE):
    "One image and one view at a time: stage -> (images, views, pools, channels)"
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMS[name])
    places = PLACES[name].split()
    out = []
    for p in paths:
        a = np.asarray(ImageOps.fit(Image.open(p), (size, size), Image.Resampling.BICUBIC))
        x = ((torch.tensor(a).permute(2, 0, 1) / 255 - mean) / std)[None]
        for turn in TURNS[views]:
            maps = maps_at(net, places, turn(x))
            if name == 'test_vit':
                maps = [tokens[:, 1:].transpose(1, 2)[..., None] for tokens in maps]
            out.append([torch.stack([m.mean((2, 3)), m.amax((2, 3))], 1)[0] for m in maps])
    names = ['stem', *[f'stage{i}' for i in range(1, 9)]]
    each = {name: torch.stack(values) for name, values in zip(names, zip(*out))}
    return {name: values.unflatten(0, (len(paths), -1)).numpy() for name, values in each.items()}


def test_every_set_of_views_is_tested():
    assert set(TURNS) == set(VIEWS)


@pytest.mark.parametrize(
    'name,views',
    [(n, 'quarter_turns') for n in PLACES]
    + [('test_resnet', 'none'), ('test_resnet', 'mirror'), ('test_resnet', 'mirror_near')]
    + [('test_resnet', 'quarter_turns+local')],
)
def test_features_are_those_of_the_network(name, views, paths, tmp_path):
    net = network(name)
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    size = 160 if name == 'test_vit' else SIZE
    f = image_features(
        paths[:3],
        name,
        tmp_path / 'w.safetensors',
        'plain',
        size,
        views=views,
        pools=('mean', 'max'),
        folder=tmp_path,
        bs=2,
    )
    want = by_hand(net, name, paths[:3], views, size)
    assert list(f.stages) == list(want)
    assert f.views == len(TURNS[views])
    for stage, w in want.items():
        for i, pool in enumerate(('mean', 'max')):
            got = f.numpy(stage, pool)
            assert got.shape == (3, len(TURNS[views]), f.stages[stage])
            assert got.dtype == np.float32
            assert np.abs(got - w[:, :, i]).max() < 1e-4 * np.abs(w).max()
        scale = np.abs(w).max()
        assert np.abs(w[0] - w[1]).max() > 1e-3 * scale  # images, views and pools differ
        if views != 'none':
            assert np.abs(w[:, 0] - w[:, 1]).max() > 1e-3 * scale
        assert np.abs(w[:, :, 0] - w[:, :, 1]).max() > 1e-3 * scale


def test_the_neck_is_the_input_of_the_classifier(paths, tmp_path):
    net = network('tf_efficientnet_lite0')
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    f = image_features(
        paths[:2], 'efficientnet_lite0', tmp_path / 'w.safetensors', 'plain', 64, folder=tmp_path, pools=['mean', 'max']
    )
    x = torch.stack([torch.from_numpy(np.array(read_image(p, 64))).permute(2, 0, 1) for p in paths[:2]])
    x = (x.float() - 127) / 128
    with torch.no_grad():
        maps = net.forward_features(x)
        computed = net.forward_head(net.forward_features(x), pre_logits=True).numpy()
    assert list(f.stages)[-2:] == ['stage7', 'neck']
    assert f.stages['neck'] == 1280 == net.num_features
    assert np.abs(f.numpy('neck')[:, 0] - computed).max() < 1e-4 * np.abs(computed).max()
    assert np.abs(f.numpy('neck', 'max')[:, 0] - maps.amax((2, 3)).numpy()).max() < 1e-4 * maps.abs().max()
    assert np.abs(computed[0] - computed[1]).max() > 0.01 * np.abs(computed).max()


@pytest.mark.parametrize('bs', [1, 2, 7, 99, None])
def test_any_batch_size(bs, body, paths, tmp_path):
    want = extract_features(paths, body, 32, views='mirror', folder=tmp_path / '1', bs=3)
    f = extract_features(paths, body, 32, views='mirror', folder=tmp_path / '2', bs=bs)
    assert not {d.name for d in folders(f).values()} & {
        d.name for d in folders(want).values()
    }  # the batch size affects the last bits
    for k in f.stages:
        assert f.numpy(k) == pytest.approx(want.numpy(k), abs=1e-5)


@pytest.mark.parametrize('runtime', ['channels_last', 'bf16'])
def test_runtimes_give_nearly_the_same(runtime, body, paths, tmp_path):
    a, b = (extract_features(paths, x, 32, pools=('mean', 'max'), folder=tmp_path) for x in (body, fresh(runtime)))
    for k in a.stages:
        for p in ('mean', 'max'):
            x = a.numpy(k, p)
            y = b.numpy(k, p)
            assert y.dtype == np.float32
            assert np.abs(x - y).max() < (0.1 if runtime == 'bf16' else 1e-4) * np.abs(x).max()


def test_a_cut_network_gives_the_same(paths, tmp_path):
    "The same with some of its stages; the stores are the same"
    f = extract_features(paths, fresh(), 32, stages=['stem', 'stage1'], folder=tmp_path)
    cut = fresh(stage='stage1')
    with counting(cut) as computed:
        g = extract_features(paths, cut, 32, folder=tmp_path)
    assert not computed
    assert folders(g) == folders(f)
    assert list(g.stages) == ['stem', 'stage1']
    all_of_it = extract_features(paths, fresh(), 32, folder=tmp_path / 'all')
    for k in g.stages:
        assert np.array_equal(all_of_it.numpy(k), g.numpy(k))


def test_layers_after_the_last_stage_are_not_run(body, paths, tmp_path):
    ran = []
    for n, m in body.stages.named_children():
        m.register_forward_hook(lambda *a, n=n: ran.append(n))
    extract_features(paths, body, 32, stages='stage2', folder=tmp_path)
    assert set(ran) == {'stem', 'stage1', 'stage2'}


def test_a_body_in_training_mode(body, paths, tmp_path):
    "It is set to evaluation mode, and its statistics do not change"
    before = {k: v.clone() for k, v in body.state_dict().items()}
    want = extract_features(paths, body, 32, folder=tmp_path / '1')
    f = extract_features(paths, body.train(), 32, folder=tmp_path / '2')
    assert not body.training
    for k, v in body.state_dict().items():
        assert torch.equal(v, before[k])
    assert contents(f) == contents(want)


def test_a_network_that_does_not_accept_small_images(paths, tmp_path):
    stages = Stages(OrderedDict(stem=nn.Sequential(nn.Conv2d(3, 4, 70))))  # as inception_v3 does
    stages.spec = replace(find_backbone('small_cnn'), size=96)
    assert extract_features(paths[:1], Body(stages), 96, folder=tmp_path).stages == {'stem': 4}


# ---------------------------------------------------------------- results


def test_numpy(body, paths, tmp_path):
    f = extract_features(paths, body, 32, views='mirror', pools=('max', 'mean'), folder=tmp_path)
    assert len(f) == 7
    assert f.views == 2
    assert f.images == paths
    assert f.about['pools'] == ['max', 'mean']
    assert sum(f.stages.values()) == f.numpy().shape[-1]
    assert list(f.stages) == stage_names(body.stages)
    both = f.numpy(['stage3', 'stem'])  # concatenated in the requested order
    assert np.array_equal(both, np.concatenate([f.numpy('stage3'), f.numpy('stem')], -1))
    assert (f.numpy('stem', 'max') >= f.numpy('stem')).all()
    assert (f.numpy('stem', 'max') > f.numpy('stem')).any()
    f = extract_features(paths, body, 32, pools=('max', 'mean'), folder=tmp_path)
    mapped = f.numpy('stage1')  # of one view
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert isinstance(f.take(slice(2, 5)).numpy('stage1'), np.memmap)


def test_pandas(body, paths, tmp_path):
    f = extract_features(paths, body, 32, views='mirror', folder=tmp_path)
    t = f.pandas(['stem', 'stage2'])
    assert isinstance(t, pd.DataFrame)
    assert t.index.tolist() == paths
    assert t.index.name == 'image'
    assert t.columns.is_unique
    assert t.columns[0] == 'stem_000'
    assert t.columns[f.stages['stem'] + 3] == 'stage2_003'
    assert np.array_equal(t, f.numpy(['stem', 'stage2']).mean(1))
    assert f.pandas().shape == (7, sum(f.stages.values()))
    assert f.take([]).pandas('stem').shape == (0, f.stages['stem'])


@pytest.mark.parametrize(
    'rows',
    [
        [3, 1, 1],
        slice(1, 4),
        np.arange(7) % 2 > 0,
        [False] * 6 + [True],
        [-1],
        np.zeros(7, bool),
        np.array([2, 3, 5]),
    ],
    ids=str,
)
def test_take(body, paths, tmp_path, rows):
    f = extract_features(paths[::-1] + paths[:1], body, 32, folder=tmp_path)  # the last row repeats another
    assert np.array_equal(f.numpy('stage1')[7], f.numpy('stage1')[6])
    f = f.take(slice(7))
    g = f.take(rows)
    assert isinstance(g, Features)
    assert g.images == list(np.array(f.images)[np.arange(7)[rows]])
    assert len(g) == len(g.images)
    for k in g.stages:
        assert np.array_equal(g.numpy(k), f.numpy(k)[np.arange(7)[rows]])
    assert np.array_equal(g.take(slice(None, None, -1)).numpy('stem'), g.numpy('stem')[::-1])


def test_rows_follow_the_list(body, paths, tmp_path):
    "For any order in which they were computed"
    f = extract_features(paths[3:5], body, 32, folder=tmp_path)
    early = f.numpy('stage4').copy()
    order = [6, 3, 0, 3, 4, 1]
    g = extract_features([paths[i] for i in order], body, 32, folder=tmp_path)
    want = extract_features(paths, body, 32, folder=tmp_path / 'other')
    assert g.numpy('stage4') == pytest.approx(want.numpy('stage4')[order], abs=1e-5)
    assert np.array_equal(g.numpy('stage4')[1], g.numpy('stage4')[3])
    assert np.array_equal(f.numpy('stage4'), early)


def test_the_description(body, paths, tmp_path):
    "Everything that affects the values can be read from the folder"
    f = extract_features(
        paths, body, 48, fit='pad', views='mirror', stages=['stem', 'stage1'], pools=('max',), folder=tmp_path
    )
    want = {
        'arch': 'test_resnet',
        'size': 48,
        'fit': 'pad',
        'reader': 'photo',
        'pools': ['max'],
        'mean': [0.5] * 3,
        'std': [0.5] * 3,
        'runtime': 'fp32',
        'device': 'cpu',
        'batch': 4,
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'made by': features._MADE_BY,
    }
    assert {**want, 'views': 'mirror'}.items() <= f.about.items()
    assert list(f.stages) == ['stem', 'stage1']
    assert list(f.stores) == ['stem', 'stage1', 'stem.1', 'stage1.1']
    for (k, n), (i, view) in product(f.stages.items(), enumerate(('none', 'mirror-1'))):
        field = f'{k}.1' if i else k
        d = f.stores[field].folder
        about = json.loads((d / 'about.json').read_text())
        assert (
            about
            == f.stores[field].about
            == {
                **want,
                'views': view,
                'stage': k,
                'format': store.STORE_FORMAT,
                'weights': weights_digest(body, k),
                'fields': {field: [[1, 1, n], 'float32']},
            }
        )
        assert d.parent == tmp_path
        assert d.name.startswith(f'test_resnet-48px-{view}-{k}-')
        lines = [json.loads(line) for line in (d / 'images.jsonl').read_text().splitlines()]
        assert [line['name'] for line in lines] == [Path(p).name for p in paths]
        assert len({line['key'] for line in lines}) == 7
        assert np.array_equal(np.fromfile(d / f'{field}.bin', '<f4').reshape(7, n), f.numpy(k, 'max')[:, i])


def test_in_the_cache(body, paths, cache_dir):
    f = extract_features(paths[:1], body, 32)
    for d in folders(f).values():
        assert cache_dir in d.parents


def test_by_name(paths, tmp_path, monkeypatch):
    "By default, runtime and size are those of the backbone"
    requests = []

    def metric(model, size=224, **k):
        requests.append(size)
        return {'plain': 1, 'channels_last': 9, 'bf16': 1}

    monkeypatch.setattr(speed, 'measure_runtimes', metric)
    f = image_features(paths[:1], 'small_cnn', 'random', folder=tmp_path)
    assert requests == [160] == [f.about['size']]
    assert f.about['runtime'] == 'fp32, channels last'
    assert f.about['mean'] == list(HALF[0])
    assert list(f.stages.values()) == [32, 64, 128, 128]


# ---------------------------------------------------------------- sources


def test_files_and_images_are_the_same(body, arrays, paths, tmp_path):
    a = extract_features(paths, body, 32, folder=tmp_path / '1')
    forms = {
        'path': [Path(p) for p in paths],
        'bytes': [Path(p).read_bytes() for p in paths],
        'array': arrays,
        'PIL': [Image.fromarray(x) for x in arrays],
        'mixed': [paths[0], *arrays[1:3], *map(Image.open, paths[3:])],
        'view': [np.asfortranarray(x) for x in arrays],
    }
    for n, sources in forms.items():
        assert np.array_equal(extract_features(sources, body, 32, folder=tmp_path / n).numpy(), a.numpy()), n
    with counting(body) as computed:
        extract_features([*forms['path'], *forms['bytes']], body, 32, folder=tmp_path / '1')
    assert not computed  # a file is identified by its bytes
    with counting(body) as computed:
        extract_features(forms['PIL'], body, 32, folder=tmp_path / 'array')
    assert not computed


def test_images_of_other_modes(body, arrays, tmp_path):
    im = Image.fromarray(arrays[0])
    sources = [im, im.convert('L'), im.convert('RGBA'), im.convert('P'), arrays[0][..., 0]]
    f = extract_features(sources, body, 32, folder=tmp_path)
    assert np.isfinite(f.numpy()).all()
    assert {len(s) for s in f.stores.values()} == {4}  # colours and an opaque alpha are the same
    assert np.array_equal(f.numpy()[0], f.numpy()[2])
    assert not np.array_equal(f.numpy()[0], f.numpy()[1])
    assert f.pandas('stem').shape[0] == 5


def test_a_table_of_arrays(body, arrays, tmp_path):
    f = extract_features([arrays[0], arrays[0][::-1]], body, 32, folder=tmp_path)
    t = f.pandas('stem')
    assert t.index.ndim == 1
    assert [i is s for i, s in zip(t.index, f.images)] == [True] * 2
    assert np.array_equal(t, f.numpy('stem').mean(1))
    assert len(t.iloc[1:]) == 1
    assert t.reset_index(drop=True).index.tolist() == [0, 1]


def test_names_of_files(body, paths, tmp_path):
    "Names that are invalid on another system; only the content counts"
    x_folder = tmp_path / 'x'
    names = [
        'con.png',
        'a:b?*.png',
        'a\\b.png',
        ' space .png ',
        '-rf',
        'é ü 眼',
        'quote\'".png',
        'line\nbreak.png',
        os.fsdecode(b'\xff\xfe.png'),
    ]
    there = []
    x_folder.mkdir()
    for i, n in enumerate(names):
        try:
            shutil.copy(paths[i % 7], x_folder / n)
        except (OSError, UnicodeError):
            continue
        there.append((i % 7, str(x_folder / n)))
    want = extract_features(paths, body, 32, folder=tmp_path / 'plain')
    f = extract_features([p for _, p in there], body, 32, folder=tmp_path / 'strange')
    assert len(there) > 3
    assert f.pandas('stem').index.tolist() == [p for _, p in there]
    assert f.numpy() == pytest.approx(want.numpy()[[i for i, _ in there]], abs=1e-5)


# ---------------------------------------------------------------- computed once, and again after a change


def test_the_same_request_is_read(body, paths, tmp_path):
    with counting(body) as computed:
        a = extract_features(paths + paths[:3], body, 32, views='mirror', folder=tmp_path, bs=2)
        assert sum(computed) == 2 * 7  # duplicates once
        before = contents(a)
        for again in (paths, paths[::-1], paths[2:4]):
            extract_features(again, fresh(), 32, views='mirror', folder=tmp_path, bs=2)
        assert sum(computed) == 2 * 7
        assert contents(a) == before
        more = extract_features(
            paths,
            body,
            32,
            views='mirror',
            stages=None,
            pools=['mean'],
            reader='photo',
            fit='crop',
            folder=tmp_path,
            bs=2,
        )
        assert sum(computed) == 2 * 7
        assert folders(more) == folders(a)


CHANGES = {
    'size': dict(size=40),
    'fit': dict(fit='pad'),
    'squish': dict(fit='squish'),
    'reader': dict(reader='fundus'),
    'views': dict(views='mirror'),
    'view_set': dict(views='quarter_turns'),
    'pools': dict(pools=('max',)),
    'both pools': dict(pools=('mean', 'max')),
}


@pytest.mark.parametrize('name', CHANGES)
def test_other_options_are_computed(name, body, paths, tmp_path):
    a = extract_features(paths, body, folder=tmp_path, **{'size': 32})
    kept = contents(a)
    with counting(body) as computed:
        b = extract_features(paths, body, folder=tmp_path, **{'size': 32, **CHANGES[name]})
    shared = name in ('views', 'view_set')  # the first view is the image as it is
    assert sum(computed) == 7 * (b.views - shared)
    assert contents(a) == kept
    assert {*folders(a).values()} & {*folders(b).values()} == ({*folders(a).values()} if shared else set())
    if name in ('size', 'fit', 'squish'):
        assert not np.allclose(a.numpy('stem'), b.numpy('stem'), atol=1e-3)
    with counting(body) as computed:
        extract_features(paths, body, 32, folder=tmp_path)  # the first store still exists
    assert not computed


def test_another_normalisation_or_format_is_computed(body, paths, tmp_path):
    a = extract_features(paths, body, 32, folder=tmp_path)
    bodies = [fresh('channels_last'), fresh('bf16')]
    for change in (dict(mean=(0.5, 0.5, 0.4)), dict(std=(0.5, 0.6, 0.5))):
        bodies.append(fresh())
        bodies[-1].stages.spec = replace(body.stages.spec, **change)
    places = {*folders(a).values()}
    for b in bodies:
        with counting(b) as computed:
            places |= {*folders(extract_features(paths, b, 32, folder=tmp_path)).values()}
        assert sum(computed) == 7
    assert len(places) == 5 * len(a.stages)


@pytest.mark.parametrize('part', ['stem', 'stage2', 'stage4'])
@pytest.mark.parametrize('kind', ['weight', 'running_var'])
def test_a_changed_weight_is_detected(part, kind, body, paths, tmp_path):
    "From its stage on; earlier stages are read"
    a = extract_features(paths, body, 32, folder=tmp_path)
    name = next(n for n in body.stages.state_dict() if n.startswith(part) and n.endswith(kind))
    tensor = body.stages.state_dict()[name]
    old = tensor.view(-1)[0].item()
    tensor.view(-1)[0] = float(np.nextafter(np.float32(old), np.float32(9)))  # the smallest possible change
    with counting(body) as computed, counting_requests(body) as requests:
        b = extract_features(paths, body, 32, folder=tmp_path)
    later = list(a.stages)[list(a.stages).index(part) :]
    assert sum(computed) == 7
    assert requests == dict.fromkeys(later, 7)
    assert [k for k in a.stages if folders(a)[k] != folders(b)[k]] == later
    tensor.view(-1)[0] = old
    with counting(body) as computed:
        c = extract_features(paths, body, 32, folder=tmp_path)
    assert not computed
    assert folders(c) == folders(a)


def test_a_changed_weight_of_a_transformer_is_detected(arrays, tmp_path):
    body = fresh(arch='test_vit')
    extract_features(arrays[:2], body, 160, folder=tmp_path)
    with counting(body) as computed:
        extract_features(arrays[:2], body, 160, folder=tmp_path)
    assert not computed
    with torch.no_grad():
        next(body.parameters()).view(-1)[0] += 1
    with counting(body) as computed:
        extract_features(arrays[:2], body, 160, folder=tmp_path)
    assert sum(computed) == 2


def test_a_weight_that_is_not_used(body, paths, tmp_path):
    "After the last requested stage"
    extract_features(paths, body, 32, stages=['stem', 'stage2'], folder=tmp_path)
    with torch.no_grad():
        next(body.stages.stage3.parameters()).add_(1)
    with counting(body) as computed:
        extract_features(paths, body, 32, stages=['stem', 'stage2'], folder=tmp_path)
    assert not computed


def test_a_changed_weight_is_detected_for_any_order_of_stages(body, paths, tmp_path):
    extract_features(paths, body, 32, stages=['stage2', 'stem'], folder=tmp_path)
    with torch.no_grad():
        next(body.stages.stage2.parameters()).add_(1)
    with counting_requests(body) as requests:
        extract_features(paths, body, 32, stages=['stage2', 'stem'], folder=tmp_path)
    assert requests == {'stage2': 7}


def test_a_changed_image_is_detected(body, arrays, paths, tmp_path):
    f_folder = tmp_path / 'f'
    copies = [tmp_path / f'{i}.png' for i in range(7)]
    for p, q in zip(paths, copies):
        shutil.copy(p, q)
    a = extract_features(copies, body, 32, folder=f_folder).numpy().copy()
    changed = arrays[4].copy()
    changed[20, 20] ^= 255
    times = os.stat(copies[4])
    Image.fromarray(changed).save(copies[4])
    os.utime(copies[4], (times.st_atime, times.st_mtime))  # its date does not matter
    with counting(body) as computed:
        b = extract_features(copies, body, 32, folder=f_folder)
    assert sum(computed) == 1
    same = [np.array_equal(x, y) for x, y in zip(a, b.numpy())]
    assert same == [True] * 4 + [False] + [True] * 2
    shutil.copy(paths[4], copies[4])
    with counting(body) as computed:
        c = extract_features(copies, body, 32, folder=f_folder)
    assert not computed
    assert np.array_equal(c.numpy(), a)


# ---------------------------------------------------------------- the same bits in any batch


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def companies(images):
    "The images in different batches: (threads, indices)."
    n = len(images)
    return [(2, range(n)), (4, [n - 1]), (3, range(n - 1, -1, -1)), (1, [4, 5, 6, 1])]


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize(
    'arch, size',
    [
        ('test_resnet', 64),
        ('efficientnet_lite0', 64),
        ('test_vit', 160),
    ],
)
def test_features_do_not_depend_on_the_batch(arch, size, runtime, arrays, tmp_path):
    """Bit for bit: with other images, at another position in the batch, in an incomplete batch,
    and with other numbers of threads
    """
    body = fresh(runtime, arch)
    with threads(1):
        want = extract_features(arrays, body, size, folder=tmp_path / 'all').numpy()
    for k, (n, rows) in enumerate(companies(arrays)):
        with threads(n):
            got = extract_features([arrays[i] for i in rows], body, size, folder=tmp_path / str(k))
        assert np.array_equal(got.numpy(), want[list(rows)])


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_predictions_do_not_depend_on_the_batch(runtime, arrays):
    torch.manual_seed(0)
    model = nn.Sequential(
        Body(create_body('efficientnet_lite0', 'random', stage='neck'), RUNTIMES[runtime]),
        create_head('dense', 1280, 3),
    ).eval()

    def probs(rows):
        return view_probs(model, [arrays[i] for i in rows], lambda a: read_image(a, 64), *IMAGENET, 'mirror')

    with threads(1):
        want = probs(range(7))
    for n, rows in companies(arrays):
        with threads(n):
            assert np.array_equal(probs(rows), want[list(rows)])


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_maps_do_not_depend_on_the_batch(runtime, arrays, tmp_path):
    body = fresh(runtime, 'efficientnet_lite0')
    front, _ = split_body(body, 3)

    def maps(rows, folder):
        m = boundary_maps(
            [arrays[i] for i in rows], front, features.reading(body, 64, 'photo', 'crop', 'mirror'), folder
        )
        return m.arrays[0][m.rows]

    with threads(1):
        want = maps(range(7), tmp_path / 'all')
    for k, (n, rows) in enumerate(companies(arrays)):
        with threads(n):
            assert np.array_equal(maps(rows, tmp_path / str(k)), want[list(rows)])


def test_predictions_from_stored_features_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    head = create_head('dense', 1280, 3).eval()
    x = torch.randn(300, 1280)
    with threads(1):
        want = map_rows(head, x)
    for n, rows in ((2, [0]), (4, [299, 1]), (2, list(range(299, -1, -1))), (3, list(range(7, 200)))):
        with threads(n):
            assert torch.equal(map_rows(head, x[rows]), want[rows])
            assert torch.get_num_threads() == n
    assert map_rows(head, x[:0]).shape == (0, 3)


def test_the_same_bytes_after_the_cache_is_deleted(paths, tmp_path):
    "For any earlier requests"
    f_folder = tmp_path / 'f'
    want = contents(extract_features(paths, fresh(), 32, folder=f_folder))
    shutil.rmtree(f_folder)
    with threads(4):
        assert contents(extract_features(paths, fresh(), 32, folder=f_folder)) == want
    extract_features(paths[3:5], fresh(), 32, folder=tmp_path / 'g')
    g, f = (extract_features(paths, fresh(), 32, folder=tmp_path / d) for d in 'gf')
    assert np.array_equal(g.numpy(), f.numpy())


# ---------------------------------------------------------------- stored values are checked


def test_an_image_replaced_while_it_is_used(body, arrays, paths, tmp_path, monkeypatch):
    "Between hashing and reading: its features are not stored for the image that was replaced"
    f_folder = tmp_path / 'f'
    copies = [tmp_path / f'{i}.png' for i in range(3)]
    for p, q in zip(paths, copies):
        shutil.copy(p, q)
    keys = content.content_keys
    was = copies[1].read_bytes()

    def hashed(sources):
        out = keys(sources)
        shutil.copy(paths[6], copies[1])
        return out

    with monkeypatch.context() as m:
        m.setattr(content, 'content_keys', hashed)
        with pytest.raises(ValueError, match=r'1.png changed'):
            extract_features(copies, body, 32, folder=f_folder)
    want = extract_features([paths[0], paths[6], paths[2]], body, 32, folder=tmp_path / 'g').numpy()
    assert np.array_equal(extract_features(copies, body, 32, folder=f_folder).numpy(), want)
    copies[1].write_bytes(was)
    assert np.array_equal(
        extract_features(copies, body, 32, folder=f_folder).numpy()[1],
        extract_features(paths, body, 32, folder=tmp_path / 'g').numpy()[1],
    )


@pytest.mark.parametrize(
    'damaged_file',
    [lambda d: bytes(len(d)), lambda d: d[: len(d) // 2], lambda d: d[4:] + d[:4]],
    ids=['zeroed', 'cut', 'moved'],
)
def test_changed_values_are_computed_again(damaged_file, body, paths, tmp_path):
    f = extract_features(paths, body, 32, folder=tmp_path)
    want = f.numpy().copy()
    file = f.stores['stage2'].file('stage2')
    file.write_bytes(damaged_file(file.read_bytes()))
    with (
        counting(body) as computed,
        counting_requests(body) as requests,
        pytest.warns(UserWarning, match='damaged rows in .*stage2'),
    ):
        g = extract_features(paths, body, 32, folder=tmp_path)
    assert np.array_equal(g.numpy(), want)
    assert set(requests) == {'stage2'}
    assert 0 < sum(computed) <= 7


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_an_error_of_nan_features_names_the_weights(value, runtime, paths, tmp_path):
    "The images are not the cause, and nothing is stored."
    body = fresh(runtime)
    with torch.no_grad():
        next(body.stages.stage3.parameters()).view(-1)[0] = value
    with pytest.raises(ValueError, match=r"'test_resnet' at stage3.*the weights are NaN") as e:
        extract_features(paths, body, 32, folder=tmp_path)
    assert 'leave' not in str(e.value)
    for p in tmp_path.glob('*/*.bin'):
        assert not p.stat().st_size


def test_an_error_of_overflow_in_bf16_names_the_precision(paths, tmp_path):
    body = fresh('bf16')
    with torch.no_grad():
        for m in body.stages.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.fill_(1e30)
    with pytest.raises(ValueError, match=r"activations overflow.*runtime='plain'"):
        extract_features(paths, body, 32, folder=tmp_path)


def test_errors_of_classifiers_do_not_name_images(body, paths, tmp_path):
    f = extract_features(paths, body, 32, folder=tmp_path)
    x = f.numpy('stage1').copy()
    x[4] = np.nan
    f.array = lambda *a: x
    with pytest.raises(ValueError, match=r"1 of 7 images.*row 4.*weights of 'test_resnet' or the cache") as e:
        FeatureClassifier().fit(f, list('abababa'))
    assert str(tmp_path) in str(e.value)
    assert 'leave' not in str(e.value)


def test_probabilities_that_are_nan(stages, arrays):
    head = create_head('linear', 96, 3)
    with torch.no_grad():
        head[-1].weight[0, 0] = np.nan
    with pytest.raises(ValueError, match=r'not the images.*weights are damaged'):
        view_probs(nn.Sequential(Body(stages), head), arrays, read, MEAN, STD)


# ---------------------------------------------------------------- more stages, fewer stages, other images

HOW = dict(size=32, views='quarter_turns', pools=('mean', 'max'), bs=2)


@pytest.fixture(scope='module')
def complete(paths, tmp_path_factory):
    return contents(extract_features(paths, fresh(), folder=tmp_path_factory.mktemp('complete'), **HOW))


ALL = ['stem', 'stage1', 'stage2', 'stage3', 'stage4']


@pytest.mark.parametrize(
    'first',
    [
        ['stage3', 'stage1'],
        ['stage4'],
        [
            'stem',
            'stage1',
            'stage2',
            'stage3',
        ],
    ],
    ids='+'.join,
)
def test_more_stages(first, body, paths, tmp_path, complete):
    "Missing stages are computed for all images in one pass; stored stages are not changed"
    a = extract_features(paths, body, stages=first, folder=tmp_path, **HOW)
    before = times(a)
    with counting(body) as computed, counting_requests(body) as requests:
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    assert sum(computed) == 4 * 7
    assert requests == {k: 4 * 7 for k in ALL if k not in first}
    assert list(f.stages) == ALL
    assert contents(f) == complete
    assert times(a) == before
    assert {*folders(a).items()} <= {*folders(f).items()}
    with counting(body) as computed:
        extract_features(paths, body, folder=tmp_path, **HOW)
    assert not computed


@pytest.mark.parametrize('fewer', ['stem', ['stage4'], ['stage3', 'stem']], ids=str)
def test_fewer_stages(fewer, body, paths, tmp_path, complete):
    f = extract_features(paths, body, folder=tmp_path, **HOW)
    before = times(f)
    with counting(body) as computed:
        g = extract_features(paths[::-1], body, stages=fewer, folder=tmp_path, **HOW)
    assert not computed
    assert times(f) == before
    assert list(g.stages) == [k for k in ALL if k in fewer]
    assert contents(g) == part(complete, g.stages)
    assert np.array_equal(g.numpy(), f.take(slice(None, None, -1)).numpy(list(g.stages)))


def test_an_earlier_stage_afterwards(body, paths, tmp_path, complete):
    "Images pass only the stages up to the deepest one that is missing"
    extract_features(paths, body, stages='stage4', folder=tmp_path, **HOW)
    further = []
    body.stages.stage2.register_forward_pre_hook(lambda m, x: further.append(bool(x[0].any())))
    with counting(body) as computed:
        f = extract_features(paths, body, stages=['stage4', 'stage1'], folder=tmp_path, **HOW)
    assert sum(computed) == 4 * 7
    assert sum(further) <= 1
    assert contents(f) == part(complete, f.stages)  # the one image determines the widths


def test_more_views_afterwards(body, paths, tmp_path):
    "Features of the original images are not computed again with rotations; one view of many is found"
    want = extract_features(paths, body, 32, views='quarter_turns', folder=tmp_path / 'complete')
    with counting(body) as computed:
        straight = extract_features(paths[:5], body, 32, folder=tmp_path)
    with counting(body) as more:
        f = extract_features(paths[:5], body, 32, views='quarter_turns', folder=tmp_path)
    with counting(body) as all_of_it:
        g = extract_features(paths, body, 32, views='quarter_turns', folder=tmp_path)
    assert (sum(computed), sum(more), sum(all_of_it)) == (5, 3 * 5, 4 * 2)
    assert folders(straight).items() <= folders(f).items()
    assert np.array_equal(f.numpy()[:, :1], straight.numpy())
    assert f.numpy() == pytest.approx(want.numpy()[:5], abs=1e-5)
    assert g.numpy() == pytest.approx(want.numpy(), abs=1e-5)
    with counting(body) as computed:
        one = extract_features(paths, body, 32, folder=tmp_path)
    assert not computed
    assert np.array_equal(one.numpy(), g.numpy()[:, :1])
    assert isinstance(one.numpy('stage1'), np.memmap)
    with counting(body) as computed:
        m = extract_features(paths, body, 32, views='mirror', folder=tmp_path)
    assert sum(computed) == 7
    assert np.array_equal(m.numpy()[:, 0], g.numpy()[:, 0])


@pytest.mark.parametrize('views', VIEWS)
def test_the_first_view_is_the_image_as_it_is(views):
    "A store of the first view is used for each set of views"
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(VIEWS[views][0](x), x)


def test_a_stage_with_fewer_images(body, paths, tmp_path, complete):
    "Images that one store lacks are computed once; no store gets a row twice"
    extract_features(paths, body, stages=['stem', 'stage4'], folder=tmp_path, **HOW)
    extract_features(paths[:4], body, stages='stage2', folder=tmp_path, **HOW)
    with counting_requests(body) as requests, counting(body) as computed:
        f = extract_features(paths, body, stages=['stem', 'stage2', 'stage4'], folder=tmp_path, **HOW)
    assert sum(computed) == 4 * 3
    assert requests == {'stage2': 4 * 3}
    assert contents(f) == part(complete, f.stages)
    with counting_requests(body) as requests:
        g = extract_features(paths[2:], body, stages=['stage3'], folder=tmp_path, **HOW)
    with counting(body) as computed:
        h = extract_features(paths, body, folder=tmp_path, **HOW)
    assert requests == {'stage3': 4 * 5}
    assert sum(computed) == 4 * 7  # stage1 lacks all of them
    assert contents(f) == part(contents(h), f.stages)
    assert {len(s) for s in h.stores.values()} == {7}
    assert h.rows['stage3'].tolist() == [5, 6, 0, 1, 2, 3, 4]
    assert np.array_equal(h.numpy('stage3')[2:], g.numpy())
    want = extract_features(paths, body, folder=tmp_path / 'complete', **HOW)
    for k in ALL:
        assert h.numpy(k) == pytest.approx(want.numpy(k), abs=1e-5)
        assert h.take([6, 0]).numpy(k) == pytest.approx(want.numpy(k)[[6, 0]], abs=1e-5)


def test_stages_in_common_at_the_same_time(body, paths, tmp_path, complete):
    "Each stage is computed by one of the processes that need it, in any order."
    wishes = [['stage4', 'stem'], ['stem', 'stage2', 'stage4'], ['stage2', 'stage1'], None]
    with counting_requests(body) as requests, ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda s: extract_features(paths, body, stages=s, folder=tmp_path, **HOW), wishes))
    assert requests == dict.fromkeys(ALL, 4 * 7)
    for f in done:
        assert contents(f) == part(complete, f.stages)


def test_two_processes_with_stages_in_common(body, paths, tmp_path, complete):
    def work(stages):
        return lambda: extract_features(paths, body, stages=stages, folder=tmp_path, **HOW)

    assert [
        exit_code(p)
        for p in [start_process(work(s)) for s in (['stage4', 'stage1', 'stem'], ['stage1', 'stage3', 'stage4'])]
    ] == [0, 0]
    with counting_requests(body) as requests:
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    assert requests == {'stage2': 4 * 7}
    assert contents(f) == complete


# ---------------------------------------------------------------- interruptions


def stopping(at):
    def act(n):
        if n == at:
            raise KeyboardInterrupt

    return act


@pytest.mark.parametrize('at', [0, 1, 4, 6, 8, 12, 15])
def test_interrupted(at, body, paths, tmp_path, complete):
    "In any view of any batch: earlier batches are kept, and the final bytes are the same"
    with pytest.raises(KeyboardInterrupt), counting(body, stopping(at)):
        extract_features(paths, body, folder=tmp_path, **HOW)
    with counting(body) as computed:
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    assert sum(computed) == 4 * (7 - at // 4 * 2)
    assert contents(f) == complete


def test_killed(body, paths, tmp_path, complete):
    "In the last view of the second batch"

    def kill(n):
        if n == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        with counting(body, kill):
            extract_features(paths, body, folder=tmp_path, **HOW)

    assert exit_code(start_process(work)) == -signal.SIGKILL
    with counting(body) as computed:
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    assert sum(computed) == 4 * 5
    assert contents(f) == complete


def peak(f):
    "The peak memory during f(), in MB, and its result"
    try:
        Path('/proc/self/clear_refs').write_text('5')  # from now on
        out = f()
        return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1000, out
    except OSError:
        pytest.skip('the peak memory is not available here')


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    "From 300 to 800 images, stored values grow by 28 MB, and so does the peak if all of them are read"
    stages = Stages(
        OrderedDict(stem=nn.Sequential(nn.Conv2d(3, 900, 16)), stage1=nn.Sequential(nn.Conv2d(900, 900, 1, groups=900)))
    )
    stages.spec = find_backbone('small_cnn')
    rng = np.random.default_rng(0)  # many channels, but fast
    body = Body(stages)
    many = [tmp_path / f'{i}.ppm' for i in range(800)]
    for p in many:
        p.write_bytes(b'P6 24 24 255\n' + rng.integers(0, 256, 24 * 24 * 3, dtype=np.uint8).tobytes())

    def get(p):
        return extract_features(p, body, 16, views='quarter_turns', pools=('mean', 'max'), bs=25, folder=tmp_path)

    few, _ = peak(lambda: get(many[:300]))
    more, f = peak(lambda: get(many))
    held, _ = peak(lambda: [f.numpy().copy() for _ in range(2)])  # the first may use memory that was free
    assert sum(p.stat().st_size for d in folders(f).values() for p in d.iterdir()) > 44e6
    assert more - few < 10 < 16 < held - more


@pytest.mark.parametrize('damaged_file', ['stem.bin', 'stage3.bin', 'images.jsonl'])
@pytest.mark.parametrize('n', [-1, 3])
def test_incomplete_files(damaged_file, n, body, paths, tmp_path, complete):
    "A file of an unfinished extraction is shorter or longer than it should be"
    with pytest.raises(KeyboardInterrupt), counting(body, stopping(8)):
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    file = next(tmp_path.glob(f'*/{damaged_file}'))
    file.write_bytes(file.read_bytes() + b'{"k' if n > 0 else file.read_bytes()[:n])
    with counting(body) as computed:
        f = extract_features(paths, body, folder=tmp_path, **HOW)
    assert sum(computed) == 4 * (3 + (n < 0))
    if n > 0:
        assert contents(f) == complete
    one = extract_features(paths, body, folder=tmp_path / 'complete', **HOW)
    assert f.numpy() == pytest.approx(one.numpy(), abs=1e-5)


def test_two_at_the_same_time(body, paths, tmp_path, complete):
    with counting(body) as computed, ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: extract_features(paths, body, folder=tmp_path, **HOW), range(3)))
    assert sum(computed) == 4 * 7
    for f in done:
        assert contents(f) == complete
        assert np.array_equal(f.numpy(), done[0].numpy())


# ---------------------------------------------------------------- images that cannot be read


def damaged(data, how):
    return {
        'empty': b'',
        'text': b'not an image',
        'cut': data[: len(data) // 2],
        'page': b'<html>404</html>',
    }[how]


@pytest.mark.parametrize('how', ['empty', 'text', 'cut'])
def test_a_corrupt_image(how, body, paths, tmp_path, complete):
    "It is named, and earlier batches are kept; the extraction is resumed after a repair, or without the image"
    f_folder = tmp_path / 'f'
    copies = [tmp_path / f'{i}.png' for i in range(7)]
    for p, q in zip(paths, copies):
        shutil.copy(p, q)
    copies[5].write_bytes(damaged(copies[5].read_bytes(), how))
    with counting(body) as computed, pytest.raises(ValueError) as e:
        extract_features(copies, body, folder=f_folder, **HOW)
    assert str(copies[5]) in str(e.value)
    assert 'cannot be read' in str(e.value)
    assert sum(computed) in (4 * 4, 4 * 5)  # the next batch may be in progress
    with counting(body) as computed:
        kept = extract_features(copies[:4], body, folder=f_folder, **HOW)
    assert not computed
    shutil.copytree(f_folder, tmp_path / 'g')
    with counting(body) as computed:
        without = extract_features(copies[:5] + copies[6:], body, folder=tmp_path / 'g', **HOW)
    assert sum(computed) == 4 * 2
    assert len(without) == 6
    assert np.array_equal(without.numpy()[:4], kept.numpy())
    shutil.copy(paths[5], copies[5])
    with counting(body) as computed:
        f = extract_features(copies, body, folder=f_folder, **HOW)
    assert sum(computed) == 4 * 3
    assert contents(f) == complete


@pytest.mark.parametrize('what', ['nothing', 'a folder'])
def test_a_file_that_does_not_exist(what, body, paths, tmp_path):
    if what == 'a folder':
        (tmp_path / 'gone.png').mkdir()
    with pytest.raises(ValueError, match=r'gone.png'):
        extract_features([*paths, tmp_path / 'gone.png'], body, 32, folder=tmp_path)


def test_corrupt_bytes_are_not_printed(body, tmp_path):
    with pytest.raises(ValueError) as e:
        extract_features([bytes(100_000)], body, 32, folder=tmp_path)
    assert len(str(e.value)) < 1000


# ---------------------------------------------------------------- requests that raise an error


def test_unknown_names(body, paths, tmp_path):
    "Errors before anything is computed or written"
    x_folder = tmp_path / 'x'
    f = extract_features(paths[:1], body, 32, folder=tmp_path / 'f')
    calls = {
        'stage9': lambda: extract_features(paths, body, 32, stages='stage9', folder=x_folder),
        'min': lambda: extract_features(paths, body, 32, pools=('mean', 'min'), folder=x_folder),
        'half_turns': lambda: extract_features(paths, body, 32, views='half_turns', folder=x_folder),
        'neck': lambda: f.numpy('neck'),
        'max': lambda: f.numpy('stem', 'max'),
        'std': lambda: f.pandas('stem', 'std'),
        'list of images is empty': lambda: extract_features([], body, 32, folder=x_folder),
        'resnet1888': lambda: image_features(paths, 'resnet1888', 'random'),
    }
    for word, call in calls.items():
        with counting(body) as computed, pytest.raises(ValueError) as e:
            call()
        assert word in str(e.value), word
        assert not computed, word
        assert not x_folder.exists(), word
    for word, known in (('stage9', 'stage4'), ('min', 'max'), ('half_turns', 'quarter_turns'), ('max', 'mean')):
        with pytest.raises(ValueError) as e:
            calls[word]()
        assert known in str(e.value)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(reader='fundos'),
        dict(fit='corp'),
    ],
    ids=str,
)
def test_unknown_reader_or_fit(wrong, body, paths, tmp_path):
    with pytest.raises(ValueError) as e:
        extract_features(paths, body, 32, folder=tmp_path / 'x', **wrong)
    assert next(iter(wrong.values())) in str(e.value)
    assert 'repair' not in str(e.value)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(stages=[]),
        dict(pools=()),
        dict(size=0),
        dict(pools='max'),
    ],
    ids=str,
)
def test_empty_requests(wrong, body, paths, tmp_path):
    try:
        f = extract_features(paths, body, **{'size': 32, 'folder': tmp_path, **wrong})
    except ValueError as e:
        assert "unknown pool 'm'" not in str(e)
    else:
        assert f.about['pools'] == ['max']


def test_not_enough_disk_space(body, paths, tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(p)._replace(free=1000))
    with counting(body) as computed, pytest.raises(ValueError) as e:
        extract_features(paths, body, folder=tmp_path, **HOW)
    assert '7 images' in str(e.value)
    assert 'DR_TRANSFER_CACHE' in str(e.value)
    assert not computed
    monkeypatch.undo()
    assert len(extract_features(paths, body, folder=tmp_path, **HOW)) == 7


def test_a_cache_that_is_not_a_folder(body, paths, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'file'))
    with pytest.raises(ValueError, match='nothing can be written'):
        extract_features(paths, body, 32)


# ---------------------------------------------------------------- components

MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.3, 0.4)


def read(source):
    return read_image(source, 32)


@torch.no_grad()
def probs_by_hand(net, images, views):
    def tensor(s):
        return (
            torch.from_numpy(np.array(read(s))).permute(2, 0, 1)[None].float() / 255 - torch.tensor(MEAN)[:, None, None]
        ) / torch.tensor(STD)[:, None, None]

    return torch.stack(
        [torch.stack([net(t(tensor(s)))[0].softmax(-1) for t in TURNS[views]]).mean(0) for s in images]
    ).numpy()


@pytest.mark.parametrize('views', sorted(TURNS))
@pytest.mark.parametrize('bs', [None, 2])
def test_view_probs(stages, arrays, views, bs):
    torch.manual_seed(1)
    model = nn.Sequential(Body(stages), create_head('linear', 96, 3)).train()
    p = view_probs(model, arrays, read, MEAN, STD, views, bs=bs)
    assert not model.training
    assert p.shape == (7, 3)
    assert p.dtype == np.float32
    assert p.sum(1) == pytest.approx(np.ones(7), abs=1e-5)
    assert np.ptp(p, 0).max() > 1e-4
    assert p == pytest.approx(probs_by_hand(model, arrays, views), abs=1e-5)


def test_no_images(stages):
    assert len(view_probs(nn.Sequential(Body(stages), create_head('linear', 96, 2)), [], read, MEAN, STD)) == 0


def test_pooled_equals_the_pooled_maps(stages):
    x = torch.randn(3, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = Body(stages).pooled(x, ['stage1', 'stage4'], ('max', 'mean'))
        maps = stages.maps(x)
        bf16 = Body(stages, RUNTIMES['bf16']).pooled(x, ['stage4'])
    assert list(got) == ['stage1', 'stage4']
    assert set(POOLS) == {'mean', 'max'}
    assert bf16['stage4'].dtype == torch.float32
    for k, m in (('stage1', maps[1]), ('stage4', maps[4])):
        assert torch.equal(got[k][:, 0], m.flatten(2).max(2)[0])
        assert torch.allclose(got[k][:, 1], m.flatten(2).mean(2), atol=1e-5)
    Body(stages, RUNTIMES['plain']).stages.to(memory_format=torch.contiguous_format)  # restored for the other tests


def test_average_pool():
    x = torch.rand(2, 3, 4, 5)
    assert torch.allclose(AveragePool()(x), x.flatten(2).mean(2))
    assert torch.equal(AveragePool()(x[..., 0, 0]), x[..., 0, 0])


def test_linear_head_is_linear():
    torch.manual_seed(0)
    head = create_head('linear', 6, 4).eval()
    head[1].running_mean.normal_()
    head[1].running_var.uniform_(0.5, 2)
    a, b = torch.randn(2, 3, 6)
    with torch.no_grad():
        assert torch.allclose(
            head(0.3 * a + 0.7 * b), 0.3 * head(a) + 0.7 * head(b), atol=1e-5
        )  # affine: the weights sum to one
        maps = a[..., None, None].expand(-1, -1, 5, 5)
        assert torch.allclose(head(maps), head(a), atol=1e-5)
    assert head(a).shape == (3, 4)


@pytest.mark.parametrize(
    'name,widths,dropout',
    [
        ('linear', [6, 4], 0),
        ('dense', [6, 256, 4], 0.2),
        (Head((5, 7), 0.3), [6, 5, 7, 4], 0.3),
        ('flw', [6, 2048, 1024, 4], 0),
    ],
    ids=str,
)
def test_heads(name, widths, dropout):
    torch.manual_seed(0)
    head = create_head(name, 6, 4)
    linear, drops = ([m for m in head if isinstance(m, t)] for t in (nn.Linear, nn.Dropout))
    assert [(m.in_features, m.out_features) for m in linear] == list(pairwise(widths))
    assert {m.p for m in drops} == {dropout}
    assert len([m for m in head if isinstance(m, nn.ReLU)]) == len(linear) - 1
    assert isinstance(head[-1], nn.Linear)
    assert head.about == (HEADS[name] if isinstance(name, str) else name)
    for m in linear[:-1]:
        if m.weight.numel() > 1000:
            assert m.weight.std().item() == pytest.approx((2 / m.in_features) ** 0.5, rel=0.1)  # He et al. 2015
    x = torch.randn(8, 6, 1, 1)
    head(x).sum().backward()
    assert head(x).shape == (8, 4)
    for p in head.parameters():
        assert p.grad is not None


def test_a_head_on_all_positions():
    head = create_head(Head(flatten=True), 3 * 2 * 2, 5).eval()
    x = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        a = head(x)
        b = head(x.flip(3))
    assert a.shape == (2, 5)
    assert not torch.allclose(a, b, atol=1e-3)


def test_unknown_head():
    with pytest.raises(ValueError, match=r"unknown head 'lineal'.*linear"):
        create_head('lineal', 6, 4)


@pytest.mark.parametrize('name', sorted(RUNTIMES))
def test_a_body_in_each_runtime(name):
    torch.manual_seed(0)
    stages = create_body('test_resnet', 'random')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = stages(x)
        body = Body(stages, RUNTIMES[name])
        kinds = []
        hook = stages[-1].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
        out = body(x)
        hook.remove()
    assert out.dtype == torch.float32
    assert kinds == [torch.bfloat16 if name == 'bf16' else torch.float32]
    if name == 'plain':
        assert torch.equal(out, want)
    assert (out - want).norm() < (0.05 if name == 'bf16' else 1e-4) * want.norm()
    conv = next(
        m for m in stages.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.in_channels > 3
    )
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == RUNTIMES[name].channels_last


def test_training_has_its_own_runtime():
    torch.manual_seed(0)
    stages = create_body('test_resnet', 'random')
    x = torch.randn(2, 3, 64, 64)
    bf16 = RUNTIMES['bf16']
    plain = RUNTIMES['plain']
    body = Body(stages, bf16, plain)
    assert body.runtime(x) == plain  # gradients are needed
    with torch.no_grad():
        assert body.runtime(x) == bf16
    stages.requires_grad_(False)
    assert body.runtime(x) == bf16  # frozen: only a forward pass
    assert Body(stages.requires_grad_(True), bf16).runtime(x) == plain  # not yet known: plain


@pytest.mark.parametrize('source', ['photos', b'jpeg', Path('a.jpg')], ids=str)
def test_one_image_instead_of_a_list(body, source):
    with pytest.raises(ValueError, match='give a list'):
        extract_features(source, body, 32)


def test_other_versions_compute_again(body, paths, tmp_path, monkeypatch):
    a = extract_features(paths, body, 32, folder=tmp_path)
    monkeypatch.setattr(features, '_MADE_BY', features._MADE_BY + '.1')
    with counting(body) as computed:
        b = extract_features(paths, body, 32, folder=tmp_path)
    assert sum(computed) == 7
    assert not {*folders(a).values()} & {*folders(b).values()}
    assert 'torch' in a.about['made by']
