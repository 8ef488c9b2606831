"Test the model folder: its contents, an exact round trip, no code execution, and errors for changed files."

import importlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Payload, cli, content, error_line, good, rows_of, table

FILES = ['model.json', 'model.safetensors']
pytestmark = pytest.mark.usefixtures('with_shared_cache')
NO_PICKLE = (pickle.UnpicklingError, AttributeError, EOFError, ImportError, LookupError, TypeError, ValueError)
MARKER = '.dr_transfer.json'  # marks that the folder may be replaced; a model is read without it


@pytest.fixture
def model(tmp_path, run):
    "A copy of the trained model, to be damaged."
    return shutil.copytree(run / 'model', tmp_path / 'model')


@pytest.fixture
def image(fundus_data):
    return sorted((fundus_data / 'images').iterdir())[0]


def edit(folder, **change):
    "Change fields of model.json and its hash, as an attacker would; `None` removes a field."
    from dr_transfer.inference.card import _digest

    about = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
    about.pop('sha256')
    about = {k: v for k, v in {**about, **change}.items() if v is not None}
    (folder / 'model.json').write_text(json.dumps({**about, 'sha256': _digest(about)}), encoding='utf-8')


def sign_tensors(folder):
    import hashlib

    edit(folder, tensors_sha256=hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest())


def fails(folder, image):
    "Return the error of a damaged model; library and command must agree, and no image is predicted."
    line = error_line('predict', folder, image)
    result = cli('predict', folder, image)
    assert result.out == ''
    return line


# ---------------------------------------------------------------- contents


def test_a_model_is_safetensors_and_json_only(run, weights):
    from safetensors.torch import load_file

    from dr_transfer.inference.card import FIELDS

    folder = run / 'model'
    assert sorted(p.name for p in folder.iterdir() if p.name != MARKER) == FILES
    about = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
    assert {k: about[k] for k in (*FIELDS, 'seed', 'format') if k not in ('mean', 'std')} == {
        'classes': ['no', 'referable'],
        'task': 'dr',
        'target': 'referable',
        'size': 64,
        'arch': 'test_resnet',
        'stage': 'stage4',
        'n_stages': 1,
        'head': {'hidden': [], 'dropout': 0.0, 'flatten': False, 'ordered': ''},
        'reader': 'fundus_and_local',
        'fit': 'pad',
        'views': 'quarter_turns+local',
        'seed': 3,
        'format': 'dr_transfer model 3',
    }
    import timm

    cfg = timm.get_pretrained_cfg('test_resnet')
    assert about['mean'] == list(cfg.mean)
    assert about['std'] == list(cfg.std)
    assert about['versions'] == json.loads((run / 'record.json').read_text())['versions']
    assert about['weights']['name'] == weights.name
    sd = load_file(folder / 'model.safetensors')
    source = load_file(weights)
    result = sum(v.numel() for v in sd.values())
    assert result > 1000
    assert sd['1.3.weight'].shape[0] == 2
    stem = next(v for k, v in sd.items() if k.endswith('conv1.0.weight') or k.endswith('conv1.weight'))
    assert any(v.shape == stem.shape and bool((v == stem).all()) for v in source.values()), (
        'the frozen body is not that of the weights file'
    )


def test_no_file_of_the_run_is_a_pickle(run):
    for name, data in content(run).items():
        assert not data.startswith((b'\x80', b'PK')), name
        with pytest.raises(NO_PICKLE):
            pickle.loads(data)


@pytest.mark.skipif(os.name == 'nt', reason='permissions')
@pytest.mark.parametrize(
    'name',
    ['.', 'record.json', 'predictions.csv', 'history.png', 'model', 'model/model.json', 'model/model.safetensors'],
)
def test_the_permissions_are_those_of_any_file(run, tmp_path, name):
    "Not those of a temporary one, which only its owner may read."
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    like = tmp_path / ('folder' if (run / name).is_dir() else 'file')
    assert (run / name).stat().st_mode & 0o777 == like.stat().st_mode & 0o777


# ---------------------------------------------------------------- round trip


def test_a_run_in_place_of_its_model(run):
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import load_model

    with pytest.raises(ModelError) as e:
        load_model(run)
    assert str(e.value).endswith(f'Give its model, {run / "model"}')


def test_saved_again_it_is_the_same(tmp_path, run):
    from dr_transfer.inference.saved_model import load_model, save_model

    again = tmp_path / 'deep' / 'again'
    a = load_model(run / 'model', runtime='plain')
    assert save_model(a, again) == again
    assert (again / 'model.safetensors').read_bytes() == (run / 'model' / 'model.safetensors').read_bytes()
    b = load_model(again, runtime='plain')
    result = dict(a.about.items())
    assert result == dict(b.about.items())
    assert (
        list(a.classes)
        == list(b.classes)
        == [
            'no',
            'referable',
        ]
    )
    for (k, x), (name, y) in zip(a.model.state_dict().items(), b.model.state_dict().items()):
        assert k == name
        assert x.equal(y)


def test_a_model_is_in_evaluation_mode_and_takes_any_image(run, fundus_data):
    "In evaluation mode the other images of a batch do not matter; paths, images and arrays are equivalent."
    from PIL import Image

    from dr_transfer.inference.saved_model import load_model

    m = load_model(run / 'model', runtime='plain')
    paths = sorted((fundus_data / 'images').iterdir())[:5]
    assert not m.model.training
    for x in m.model.modules():
        assert not x.training
    p = m.probs(paths)
    assert p.shape == (5, 2)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, np.concatenate([m.probs([i]) for i in paths]), atol=1e-5)
    np.testing.assert_allclose(
        m.probs([Image.open(i) for i in paths]), m.probs([np.asarray(Image.open(i)) for i in paths]), atol=1e-6
    )
    rng = np.random.default_rng(0)
    fields = [
        np.linspace(60, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
        + rng.integers(0, 60, (64, 64, 3), dtype=np.uint8) // 4
        for _ in range(3)
    ]
    turned = [np.rot90(a).copy() for a in fields]  # no border to be trimmed, no size to be changed
    np.testing.assert_allclose(m.probs(turned), m.probs(fields), atol=1e-5)  # the four turns are averaged
    one, other = (np.log(m.probs(images, views='none')) for images in (turned, fields))
    assert abs(one - other).max() > 1e-3, 'otherwise the test shows nothing'


def log_odds(p):
    return np.log(p[:, 1] / p[:, 0])


def test_the_runtime_of_the_training_is_chosen_again(run):
    from dr_transfer.inference.saved_model import load_model

    t = table(run / 'predictions.csv')
    p = load_model(run / 'model', 'auto').probs(t.image.tolist())
    np.testing.assert_allclose(p, t[['p_no', 'p_referable']], atol=1e-5, rtol=0)


@pytest.mark.parametrize('runtime', ['plain', 'channels_last', 'bf16'])
def test_a_model_keeps_the_runtime_of_its_training(tmp_path, fundus_data, weights, monkeypatch, runtime):
    "On another machine, or after the cache was deleted, another runtime may be the fastest."
    import dr_transfer.models.speed as speed
    from dr_transfer.core import build_learner
    from dr_transfer.inference.saved_model import load_model, save_model

    m_folder = tmp_path / 'm'
    learn = build_learner(fundus_data, 'dr', 'test_resnet', weights, size=64, runtime=runtime)
    save_model(learn, m_folder)
    monkeypatch.setattr(speed, 'fastest_runtime', lambda *a, **k: speed.Runtime(runtime != 'channels_last'))
    again = load_model(m_folder)
    assert again.card.runtime == runtime
    assert again.model[0].forward_runtime == speed.RUNTIMES[runtime]
    assert load_model(m_folder, 'plain').model[0].forward_runtime == speed.Runtime()


def test_a_model_without_a_runtime_uses_the_fastest(tmp_path, fundus_data, weights, monkeypatch):
    "A runtime that has no name, or a training on a GPU, or a model of version 0.1.0."
    import dr_transfer.models.speed as speed
    from dr_transfer.core import build_learner
    from dr_transfer.inference.saved_model import load_model, save_model

    learn = build_learner(fundus_data, 'dr', 'test_resnet', weights, size=64, runtime=speed.Runtime(False, True))
    save_model(learn, tmp_path / 'm')
    monkeypatch.setattr(speed, 'fastest_runtime', lambda *a, **k: speed.Runtime(True))
    again = load_model(tmp_path / 'm')
    assert again.card.runtime == ''
    assert again.model[0].forward_runtime == speed.Runtime(True)


def test_channels_last_gives_the_same(run):
    from dr_transfer.inference.saved_model import load_model

    images = table(run / 'predictions.csv').image.tolist()
    plain, other = (load_model(run / 'model', runtime).probs(images) for runtime in ('plain', 'channels_last'))
    np.testing.assert_allclose(other, plain, atol=1e-5, rtol=0)


def test_bf16_changes_the_features_little(run):
    """The effect on the probabilities depends on the weights of the head: the bound is on the log-odds, divided by the
    norm of these weights. With a norm of .73 (an epoch of SGD), .11 is a change of .02 of the probability."""
    from dr_transfer.inference.saved_model import load_model

    images = table(run / 'predictions.csv').image.tolist()
    plain, other = (load_model(run / 'model', runtime) for runtime in ('plain', 'bf16'))
    weight = plain.model[1][-1].weight.detach().float()
    steep = float((weight[1] - weight[0]).norm())
    moved = abs(log_odds(other.probs(images)) - log_odds(plain.probs(images))).max() / steep
    assert 0 < moved < 0.11


@pytest.mark.parametrize(
    'how',
    [
        dict(head='dense'),
        dict(head='flw'),
        dict(stage='stage2', n_stages=2),
        dict(plan='flw', augment='mirror_near'),
        dict(arch='test_vit'),
        dict(arch='efficientnet_lite0', weights=None),
    ],
    ids=lambda h: '-'.join(map(str, h.values())),
)
def test_any_head_at_any_stage_is_restored(tmp_path, fundus_data, weights, how):
    "The model is rebuilt from its description: the probabilities are the same, also after it is saved again."
    from dr_transfer.core import build_learner, predict_probs
    from dr_transfer.inference.saved_model import load_model, save_model
    from dr_transfer.utils.schema import to_dict

    learn = build_learner(
        fundus_data, **{**dict(task='dr', arch='test_resnet', weights='random', size=64, runtime='plain'), **how}
    )
    m = load_model(save_model(learn, tmp_path / 'm'), runtime='plain')
    images = sorted((fundus_data / 'images').iterdir())[:3]
    np.testing.assert_allclose(m.probs(images), predict_probs(learn, images), atol=1e-5)
    r = learn.record
    assert [m.about[k] for k in ('stage', 'n_stages', 'arch')] == [r.stage, r.n_stages, r.arch]
    assert m.about['head'] == to_dict(r.head)
    augment = how.get('augment', 'none' if 'plan' in how else 'quarter_turns')
    assert m.about['views'] == f'{augment}+local'
    assert m.model[1].about == learn.model[1].about
    assert (tmp_path / 'm' / 'model.safetensors').read_bytes() == (
        save_model(m, tmp_path / 'n') / 'model.safetensors'
    ).read_bytes()


def test_a_classifier_of_features_is_restored(tmp_path, fundus_data, weights):
    "Fitted on features, combined with its backbone, saved, and loaded."
    from dr_transfer.core import build_learner, classifier_learner
    from dr_transfer.features.classifiers import FeatureClassifier
    from dr_transfer.inference.saved_model import load_model, save_model
    from dr_transfer.training.stored import learner_features

    learn = build_learner(fundus_data, 'dr', 'test_resnet', weights, size=64, runtime='plain')
    t = learn.table
    f = learner_features(learn, t.image.tolist())
    c = FeatureClassifier('dense').fit(f, t.target, t.group)
    m = load_model(
        save_model(classifier_learner(c, fundus_data, 'dr', weights=weights, runtime='plain'), tmp_path / 'm'),
        runtime='plain',
    )
    assert m.about['head']['hidden'] == [256]
    assert m.about['views'] == 'quarter_turns+local'
    assert list(m.classes) == list(c.classes_)
    np.testing.assert_allclose(m.probs(t.image[:5]), c.predict_proba(f.take(range(5))), atol=1e-5)


# ---------------------------------------------------------------- written completely or not at all


@pytest.mark.parametrize('at', ['save_file', 'card_text'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
@pytest.mark.parametrize('old', [False, True])
def test_interrupted_saving(tmp_path, run, monkeypatch, at, error, old):
    from dr_transfer.inference import saved_model as bundle

    m = bundle.load_model(run / 'model', runtime='plain')
    if old:
        bundle.save_model(m, tmp_path / 'm')
    before = content(tmp_path)
    real = getattr(bundle, at)

    def half(*a):
        real(*a)
        raise error('the disk is full')

    monkeypatch.setattr(bundle, at, half)
    with pytest.raises(error):
        bundle.save_model(m, tmp_path / 'm', overwrite=old)
    assert content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ['m'][:old]


def test_an_existing_folder_is_kept(tmp_path, run):
    from dr_transfer.inference.saved_model import load_model, save_model

    m_folder = tmp_path / 'm'
    m = load_model(run / 'model', runtime='plain')
    m_folder.mkdir()
    (m_folder / 'model.json').write_text('old')
    for overwrite, words in ((False, 'exists already'), (True, 'was not created by dr_transfer')):
        with pytest.raises(ValueError, match=words):
            save_model(m, m_folder, overwrite=overwrite)
    assert content(tmp_path) == {'m/model.json': b'old'}
    from dr_transfer.utils.files import mark_folder

    mark_folder(m_folder, 'model')
    save_model(m, m_folder, overwrite=True)
    assert content(m_folder)['model.json'] != b'old'
    assert [
        sorted(p.name for p in m_folder.iterdir()),
        len(list(tmp_path.iterdir())),
    ] == [[MARKER, *FILES], 1]
    (m_folder / 'mine.txt').write_text('mine')
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r'mine.txt'):
        save_model(m, m_folder, overwrite=True)
    assert content(tmp_path) == before


# ---------------------------------------------------------------- nothing in it is run


def test_loading_uses_no_pickle_and_imports_nothing_by_name(run, image, monkeypatch):
    import torch

    good('predict', run, image)  # late imports are done

    def never(*a, **k):
        raise AssertionError('this must not be called')

    for module, name in (
        (pickle, 'load'),
        (pickle, 'loads'),
        (pickle, 'Unpickler'),
        (torch, 'load'),
        (pickle, '_Unpickler'),
        (importlib, 'import_module'),
        (os, 'system'),
    ):
        monkeypatch.setattr(module, name, never)
    result = len(rows_of(good('predict', run, image).out))
    assert result == 1


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('way', ['pickle', 'torch'])
@pytest.mark.parametrize('file', FILES)
def test_a_pickle_in_place_of_a_file(tmp_path, model, image, way, file, signed):
    import torch

    hit = tmp_path / 'hit'
    if way == 'pickle':
        (model / file).write_bytes(pickle.dumps(Payload(hit)))
    else:
        torch.save({'x': Payload(hit)}, model / file)
    data = (model / file).read_bytes()
    if way == 'torch':
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)
    hit.rmdir()  # pickle would run it
    if signed and file == 'model.safetensors':
        sign_tensors(model)
    fails(model, image)
    assert not hit.exists()


@pytest.mark.parametrize(
    'change, why',
    [
        ({'arch': '../../../etc/passwd'}, 'unknown backbone'),
        ({'arch': '/opt/evil.py'}, 'unknown backbone'),
        ({'arch': 'os.system'}, 'unknown backbone'),
        ({'arch': 'hf-hub:evil/model'}, 'unknown backbone'),
        ({'arch': 'local-dir:/tmp'}, 'unknown backbone'),
        ({'arch': 'timm.hf-hub:evil/model'}, 'unknown backbone'),
        ({'reader': 'os.system'}, "'reader' is 'os.system'; expected: text that is one of 'photo', "),
        ({'reader': '../evil'}, "'reader' is"),
        ({'reader': '__import__'}, "'reader' is"),
        ({'fit': 'eval'}, "'fit' is 'eval'"),
        ({'views': '__class__'}, "'views' is"),
        ({'format': 'dr_transfer model 99'}, 'another format'),
        ({'format': None}, 'another format'),
        ({'arch': 'test_vit'}, "the tensor '0.stages"),
        ({'arch': 'levit_128s'}, "'levit_128s'"),
        ({'classes': ['a', 'b', 'c']}, "the tensor '1.3.weight' has the shape (2, "),
        ({'classes': None}, "'classes' is missing"),
        ({'n_stages': 99}, 'n_stages=99'),
        ({'size': -1}, "'size' is -1; expected: a whole number from 16 to 4096"),
        ({'stage': '../x'}, 'unknown stage'),
        ({'stage': 'stage2'}, "the tensor '0.stages.stage"),
        ({'stage': None}, "'stage' is missing"),
        ({'head': None}, "'head' is missing"),
        ({'head': 'linear'}, "'head' is 'linear'; expected: an object"),
        ({'head': {'hidden': [7], 'dropout': 0.0, 'flatten': False}}, "the tensor '1.3.weight' has the shape"),
        (
            {'head': {'hidden': [], 'dropout': 0.0, 'flatten': False, 'layers': 'os.system'}},
            "'head.'layers'' is 'os.system'; expected: no field of this name",
        ),
        ({'views': 'mirror_far'}, "'views' is 'mirror_far'"),
        ({'format': 'dr_transfer model 1'}, 'use the version of dr_transfer that wrote it'),
        ({'tensors_sha256': None}, "'tensors_sha256' is missing"),
        ({'size': 10**6}, "'size' is 1000000"),
        ({'head': {'hidden': [10**9]}}, "'head.hidden[0]' is 1000000000"),
        ({'head': {'hidden': [100_000] * 10}}, "the tensor '1.3.weight'"),
        ({'classes': [f'class {i}' for i in range(10**6)]}, 'bytes, more than the allowed'),
        ({'classes': [f'class {i}' for i in range(20_000)]}, 'of length 2 to 10000'),
        ({'std': [0.2, 0, 0.2]}, "'std[1]' is 0"),
        ({'mean': [0.5, float('nan'), 0.5]}, "'mean[1]' is nan"),
        ({'classes': ['no', 'No ']}, 'differ only in case or spaces'),
        ({'decision': {'temperature': 0}}, "'decision.temperature' is 0"),
        ({'decision': {'operating': {'threshold': 0.5}}}, "'decision.operating.metric' is missing"),
        ({'arch': 'vit_7b_patch16_dinov3'}, 'would take too much memory'),
        ({'arch': 'timm.test_vit?embed_dim=100000'}, 'would take too much memory'),
        ({'arch': 'timm.test_vit?checkpoint_path=x.pth'}, 'checkpoint_path'),
        ({'arch': 'timm.test_vit?pretrained=true'}, 'pretrained'),
        ({'arch': 'timm.test_vit?foo=3'}, 'cannot be made with foo=3'),
    ],
)
def test_a_changed_description_with_a_new_hash(tmp_path, model, image, monkeypatch, change, why):
    "No name in it is a path, a module or an address: what is not in a table of the library is an error."
    import socket

    def never(*a, **k):
        raise AssertionError('it went to the network or ran something')

    for m, name in ((socket, 'create_connection'), (os, 'system'), (socket.socket, 'connect')):
        monkeypatch.setattr(m, name, never)
    edit(model, **change)
    line = fails(model, image)
    assert why in line
    assert 'AssertionError' not in line


def test_a_change_with_a_new_hash_is_accepted(model, image):
    "Check that the errors above come from the field and not from the hash."
    before = good('predict', model, image).out
    edit(model)
    assert good('predict', model, image).out == before
    edit(model, classes=['healthy', 'disease'])
    result = rows_of(good('predict', model, image).out)[0].keys()
    assert result >= {'p_healthy', 'p_disease'}


def test_an_unknown_reader_raises_an_error_in_the_library_too(model, image):
    from dr_transfer.inference.saved_model import load_model

    edit(model, reader='os.system')
    with pytest.raises(ValueError, match=r"'reader' is 'os.system'"):
        load_model(model, runtime='plain').probs([image])


# ---------------------------------------------------------------- missing or altered


@pytest.mark.parametrize('file', FILES)
def test_a_missing_file(model, image, file):
    (model / file).unlink()
    assert file in fails(model, image)
    assert 'missing' in fails(model, image)


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('how', ['first byte', 'middle byte', 'last byte', 'cut', 'longer', 'empty'])
def test_a_changed_file(model, image, file, how):
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import load_model

    data = bytearray((model / file).read_bytes())
    at = {'first byte': 0, 'middle byte': len(data) // 2, 'last byte': len(data) - 1}.get(how)
    if at is not None:
        data[at] ^= 1
    new = {'cut': data[:-7], 'longer': data + b' x', 'empty': b''}.get(how, data)
    (model / file).write_bytes(new)
    assert str(model / file) in fails(model, image) or str(model) in fails(model, image)
    with pytest.raises(ModelError):
        load_model(model)


@pytest.mark.parametrize(
    'field, value',
    [
        ('classes', ['referable', 'no']),
        ('size', 96),
        ('mean', [0.0, 0.0, 0.0]),
        ('reader', 'photo'),
        ('views', 'none'),
    ],
)
def test_one_field_changed_by_hand(model, image, field, value):
    about = json.loads((model / 'model.json').read_text())
    assert about[field] != value
    (model / 'model.json').write_text(json.dumps({**about, field: value}))
    assert 'changed after it was saved' in fails(model, image)


@pytest.mark.parametrize('text', ['[]', '"x"', 'null', '{}', '{"format": "dr_transfer model 1"}'])
def test_another_json(model, image, text):
    (model / 'model.json').write_text(text)
    assert str(model) in fails(model, image)


def test_a_truncated_json(model, image):
    (model / 'model.json').write_text('[' * 100000)
    fails(model, image)


def test_tensors_of_another_model(model, image, weights):
    shutil.copy(weights, model / 'model.safetensors')
    assert 'was changed' in fails(model, image)
    sign_tensors(model)
    fails(model, image)


def test_a_custom_head_cannot_be_saved(tmp_path, fundus_data, weights):
    "It cannot be rebuilt from a description, and pickle is not used."
    from torch import nn

    from dr_transfer.core import build_learner
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import image_model, save_model
    from dr_transfer.models.backbones import create_body

    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(create_body('test_resnet', 'random').n_out, 2)
    )
    learn = build_learner(
        fundus_data, task='dr', arch='test_resnet', weights=weights, size=64, runtime='plain', head=head
    )
    with pytest.raises(ModelError, match=r'custom head cannot be rebuilt.*use learn.export, or a head by name'):
        save_model(learn, tmp_path / 'm')
    with pytest.raises(ModelError):
        image_model(learn)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- small models, made on the spot

SMALL = {
    'arch': 'small_cnn',
    'stage': 'stage3',
    'n_stages': 1,
    'head': {'hidden': [], 'dropout': 0.0, 'flatten': False, 'ordered': ''},
    'classes': ['no', 'referable'],
    'task': 'dr',
    'target': 'referable',
    'size': 48,
    'reader': 'fundus',
    'fit': 'pad',
    'views': 'none',
    'mean': [0.5] * 3,
    'std': [0.5] * 3,
    'decision': None,
    'weights': {'kind': 'random', 'name': '', 'sha256': ''},
    'licence': '',
    'versions': {'dr_transfer': '0.1.0'},
    'seed': 42,
    'training': {'plan': 'head', 'balance': 'none', 'data': None},
}


def small():
    "A network as `SMALL` describes it"
    import torch

    from dr_transfer.models.backbones import create_body
    from dr_transfer.models.network import Body, create_head

    torch.manual_seed(1)
    stages = create_body('small_cnn', 'random')
    return torch.nn.Sequential(Body(stages), create_head('linear', stages.n_out, 2)).eval()


def test_a_model_that_version_0_1_0_trained(tmp_path):
    """It loads and decides as in 0.1.0, which made the folder (commit 27c354c) from synthetic images.

    0.1.0 did not write what is positive: for the grades of the task 'dr' it was grade 2 or more.
    """
    from PIL import Image

    from dr_transfer.inference.predictions import predict_table
    from dr_transfer.inference.saved_model import load_model, save_model
    from dr_transfer.synthetic.fundus import draw_fundus

    folder = Path(__file__).parent / 'model_0_1_0'
    then = pd.read_csv(folder / 'predictions.csv', dtype={'prediction': str, 'grade': int}, keep_default_na=False)
    names = [tmp_path / name for name in then.image]
    for grade, name in enumerate(names):
        Image.fromarray(draw_fundus(grade, seed=100 + grade, size=48)[0]).save(name)
    model = load_model(folder)
    assert model.card.class_set.positive.classes == ('2', '3', '4')
    for m in (model, load_model(save_model(model, tmp_path / 'again'))):
        now = predict_table(m, names)
        columns = [f'p_{c}' for c in m.classes]
        np.testing.assert_allclose(now[columns], then[columns], atol=1e-5)
        for column in ('prediction', 'grade', 'decision', 'error'):
            assert now[column].tolist() == then[column].tolist(), column


def write_as_0_1_0(folder, net, about=SMALL):
    "A model folder written word for word as version 0.1.0 wrote it, without the library"
    import hashlib

    from safetensors.torch import save_file

    folder.mkdir()
    save_file({k: v.detach().contiguous() for k, v in net.state_dict().items()}, folder / 'model.safetensors')
    about = {
        **about,
        'format': 'dr_transfer model 2',
        'tensors_sha256': hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest(),
    }
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (folder / 'model.json').write_text(
        json.dumps({**about, 'sha256': sha256}, indent=1, ensure_ascii=False), encoding='utf-8'
    )
    return folder


def test_a_folder_of_version_0_1_0_is_loaded(tmp_path):
    from dr_transfer.inference.saved_model import ImageModel, load_model

    net = small()
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    m = load_model(write_as_0_1_0(tmp_path / 'm', net), 'plain')
    np.testing.assert_array_equal(m.probs([image]), ImageModel(net, SMALL).probs([image]))
    assert m.seen is None
    assert m.about == {
        **SMALL,
        'training': m.about['training'],
        'tensors_sha256': m.card.tensors_sha256,
    }


@pytest.mark.parametrize(
    'name, value, words',
    [
        ('1.3.weight', float('nan'), 'NaN or infinity in 1 of 256'),
        ('0.stages.stem.features_0.0.weight', float('inf'), 'NaN or infinity'),
        ('1.1.running_var', -1.0, 'a variance below 0 in 1 of 128'),
    ],
)
def test_weights_that_are_nan_are_neither_saved_nor_loaded(tmp_path, name, value, words):
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import ImageModel, load_model, save_model

    net = small()
    name = (
        name
        if name in net.state_dict()
        else next(k for k in net.state_dict() if k.startswith('0.') and k.endswith('weight'))
    )
    net.state_dict()[name].view(-1)[0] = value
    for call in (
        lambda: save_model(ImageModel(net, SMALL), tmp_path / 'm'),
        lambda: load_model(write_as_0_1_0(tmp_path / 'old', net)),
    ):
        with pytest.raises(ModelError, match=f"the tensor '{name}' has {words}.*Train it again"):
            call()
    assert not (tmp_path / 'm').exists()


def test_a_learner_whose_training_diverged_is_not_saved(tmp_path, fundus_data, weights):
    import torch

    from dr_transfer.core import build_learner
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.run import write_run
    from dr_transfer.inference.saved_model import image_model

    learn = build_learner(fundus_data, task='dr', arch='test_resnet', weights=weights, size=64, runtime='plain')
    learn.model[1][3].weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"the learner: the tensor '1.3.weight' has NaN"):
        image_model(learn)
    with pytest.raises(ModelError, match=r"the tensor '1.3.weight' has NaN"):
        write_run(learn, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_image_without_probabilities_is_an_error(tmp_path, fundus_data):
    "Finite weights may overflow: the column `error` says so, and so does the exit code."
    net = small()
    net[1][3].weight.data.fill_(3e38)
    net[1][1].weight.data.fill_(3e38)
    images = sorted((fundus_data / 'images').iterdir())[:2]
    result = cli('predict', write_as_0_1_0(tmp_path / 'm', net), *images)
    assert result.code == 1
    for r in rows_of(result.out):
        assert 'returns no probabilities' in r['error']
        assert not r['prediction']


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('kind', ['folder', 'pipe', 'loop', 'device'])
@pytest.mark.skipif(os.name == 'nt', reason='pipes')
def test_paths_that_are_not_files_are_errors_at_once(tmp_path, file, kind):
    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import load_model

    folder = write_as_0_1_0(tmp_path / 'm', small())
    (folder / file).unlink()
    make = {
        'folder': lambda p: p.mkdir(),
        'pipe': os.mkfifo,
        'loop': lambda p: p.symlink_to(p),
        'device': lambda p: p.symlink_to('/dev/zero'),
    }[kind]
    make(folder / file)
    with pytest.raises(ModelError, match=f'{file} cannot be read: (it is .* not a regular file|Too many levels)'):
        load_model(folder)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda t: t.pop('1.3.bias'), r"'1.3.bias' has nothing in model.safetensors, and the shape \(2,\) of F32"),
        (lambda t: t.update(x=t['1.3.bias'].clone()), "'x' has the shape"),
        (lambda t: t.update({'1.3.bias': t['1.3.bias'].double()}), "'1.3.bias' has the shape .2,. of F64"),
        (lambda t: t.update(seen=t['1.3.bias'].clone()), "'seen' has the shape"),
        (lambda t: t.clear(), 'has nothing in model.safetensors'),
    ],
)
def test_tensors_that_do_not_match_the_description(tmp_path, spoil, words):
    from types import SimpleNamespace

    from dr_transfer.inference.card import ModelError
    from dr_transfer.inference.saved_model import load_model

    tensors = {k: v.clone() for k, v in small().state_dict().items()}
    spoil(tensors)
    with pytest.raises(ModelError, match=words):
        load_model(write_as_0_1_0(tmp_path / 'm', SimpleNamespace(state_dict=lambda: tensors)))
