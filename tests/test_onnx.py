"Test ONNX files: probabilities equal to those of torch, errors, and prediction without torch."

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import error_line, good, rows_of
from PIL import Image
from torch import nn

from dr_transfer.inference.card import ModelError
from dr_transfer.inference.onnx_file import OnnxModel, export_onnx
from dr_transfer.inference.predictions import predict_table
from dr_transfer.inference.saved_model import ImageModel, save_model
from dr_transfer.metrics.calibration import apply_temperature
from dr_transfer.metrics.class_sets import PredictionSets
from dr_transfer.metrics.decision import Decision
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import Body, create_head, get_head, head_inputs

ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

POINT = {
    'threshold': 0.5,
    'metric': 'sensitivity',
    'minimum': 0.9,
    'positives': 30,
    'negatives': 40,
    'sensitivity': 0.9,
    'specificity': 0.5,
}
DECISION = {'temperature': 1.7, 'cuts': None, 'operating': None, 'not_chosen': []}


def made(
    arch,
    size,
    *,
    n_stages=None,
    head='linear',
    views='quarter_turns',
    classes=('no', 'referable'),
    reader='photo',
    decision=None,
    weights='random',
):
    """A model with random BatchNorm statistics whose probabilities differ between images,
    so that each part affects the result
    """
    torch.manual_seed(0)
    stages = create_body(arch, weights, n_stages=n_stages)
    net = nn.Sequential(Body(stages), create_head(head, head_inputs(stages, head, size), len(classes)))
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.uniform_(-0.3, 0.3)
            m.running_var.uniform_(0.7, 1.4)
    if weights == 'random':
        net[1][3].weight.data.mul_(20)
    about = {
        'arch': arch,
        'stage': list(dict(stages.named_children()))[-1],
        'n_stages': stages.n_stages,
        'head': asdict(get_head(head)),
        'classes': list(classes),
        'task': 'dr',
        'target': 'referable',
        'size': size,
        'reader': reader,
        'fit': 'pad',
        'views': views,
        'mean': list(stages.spec.mean),
        'std': list(stages.spec.std),
        'decision': decision,
    }
    return ImageModel(net, about)


def random_images(n=5):
    "Colour fields with noise, wider than high, so that the reader changes them"
    rng = np.random.default_rng(1)
    return [
        np.uint8(np.linspace(*rng.uniform(0, 200, (2, 3)), 90)[None] + rng.uniform(0, 55, (70, 90, 3)))
        for _ in range(n)
    ]


@pytest.fixture(scope='module')
def small_model(tmp_path_factory):
    "A small model and its file"
    model = made('small_cnn', 48, reader='fundus', decision=DECISION)
    return model, export_onnx(model, tmp_path_factory.mktemp('onnx') / 'fundus.onnx')


# ---------------------------------------------------------------- the same probabilities


@pytest.mark.parametrize(
    'how',
    [
        dict(arch='efficientnet_lite0', size=64, weights=None),
        dict(arch='torchvision.alexnet', size=64, n_stages=2, head='cumulative', classes='01234'),
        dict(arch='small_cnn', size=32, head='dense', views='mirror_near'),
        dict(arch='test_vit', size=160, views='none'),
    ],
    ids=lambda h: h['arch'],
)
def test_the_same_probabilities_as_in_torch(tmp_path, how):
    model = made(**how)
    images = random_images()
    there = OnnxModel(export_onnx(model, tmp_path / 'm.onnx', images=images[:2]))
    p = model.probs(images)
    assert np.ptp(p, axis=0).max() > 1e-3, 'otherwise the test shows nothing'
    np.testing.assert_allclose(there.probs(images), p, atol=1e-4, rtol=0)
    np.testing.assert_allclose(there.probs(images[:1]), p[:1], atol=1e-4, rtol=0)  # n is variable


def test_four_turns_a_reader_and_a_temperature(small_model):
    model = small_model[0]
    images = random_images()
    there = OnnxModel(small_model[1])
    p = model.probs(images)
    np.testing.assert_allclose(there.probs(images), p, atol=1e-4, rtol=0)
    np.testing.assert_allclose(there.probs(images, calibrated=True), apply_temperature(p, 1.7), atol=1e-4, rtol=0)
    assert np.abs(apply_temperature(p, 1.7) - p).max() > 1e-3, 'otherwise the test shows nothing'
    assert np.abs(model.probs(images, 'none') - p).max() > 2e-4, 'otherwise the test shows nothing'
    assert there.probs([]).shape == (0, 2)


def test_a_table_of_predictions_with_the_decision(small_model, tmp_path):
    there = OnnxModel(small_model[1])
    sets = PredictionSets(('no', 'referable'), 0.9, (0.4, 0.4), False, False, 50)
    there.card = replace(there.card, decision=replace(Decision.from_dict({**DECISION, 'operating': POINT}), sets=sets))
    for i, a in enumerate(random_images(3)):
        Image.fromarray(a).save(tmp_path / f'{i}.png')
    (tmp_path / 'no.png').write_text('text')
    paths = sorted(map(str, tmp_path.iterdir()))
    t = predict_table(there, paths)
    want = predict_table(ImageModel(small_model[0].model, there.card), paths)
    assert t.decision.notna().sum() == 3
    assert (t.set != '').sum() == 3
    assert t.columns.tolist()[-4:] == ['decision', 'set', 'unlike', 'error']
    assert t.drop(columns=['p_no', 'p_referable']).equals(want.drop(columns=['p_no', 'p_referable']))
    np.testing.assert_allclose(t.p_referable[:3], want.p_referable[:3], atol=1e-4)


# ---------------------------------------------------------------- contents of the file


def test_the_file_describes_its_input_and_not_the_machine(small_model):
    import onnx

    model = small_model[0]
    proto = onnx.load(small_model[1])
    onnx.checker.check_model(proto, full_check=True)
    meta = {m.key: m.value for m in proto.metadata_props}
    assert json.loads(meta['classes']) == ['no', 'referable']
    assert (meta['size'], meta['reader'], meta['fit']) == (
        '48',
        'fundus',
        'pad',
    )
    assert json.loads(meta['about']) == model.about
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == ['n', 3, 48, 48]
    assert {n.domain for n in proto.graph.node} == {''}
    assert not any(t.external_data for t in proto.graph.initializer)  # known operations, and the weights are included
    raw = small_model[1].read_bytes()
    for word in (b'site-packages', b'dr_transfer/', b'.py', b'Traceback', sys.prefix.encode()):
        assert word not in raw, word


WITHOUT_TORCH = """
import sys
ABSENT = ('torch', 'torchvision', 'timm', 'fastai', 'fastcore', 'onnx', 'onnxscript')
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ABSENT:
            raise ImportError(name)
sys.meta_path.insert(0, Without())
from dr_transfer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_predicting_loads_no_torch(small_model, tmp_path):
    "In a process where torch cannot be imported at all, through the command."
    image = tmp_path / 'a.png'
    Image.fromarray(random_images(1)[0]).save(image)
    words = ['predict', str(small_model[1]), str(image), '--debug']
    r = subprocess.run([sys.executable, '-c', WITHOUT_TORCH, *words], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    head, row = r.stdout.splitlines()
    want = predict_table(small_model[0], [str(image)])
    assert head.split(',') == want.columns.tolist()
    assert abs(float(row.split(',')[3]) - want.p_referable[0]) < 1e-4


# ---------------------------------------------------------------- what raises an error


def test_a_file_with_other_probabilities_is_not_written(small_model, tmp_path, monkeypatch):
    import dr_transfer.inference.onnx_file as exporter

    other = made('small_cnn', 48, reader='fundus', decision=DECISION)
    other.card = replace(other.card, mean=(0.55,) * 3)  # another backbone with equal shapes
    monkeypatch.setattr(exporter, '_serialized', lambda *args: small_model[1].read_bytes())
    with pytest.raises(ValueError, match=r'differ from those of the model by up to 0.*no file was written'):
        export_onnx(other, tmp_path / 'm.onnx')
    assert list(tmp_path.iterdir()) == []


def test_one_path_is_not_a_list_of_images(small_model):
    model = OnnxModel(small_model[1])
    for function in (model.probs, model.outputs):
        with pytest.raises(ValueError, match='is one image or folder'):
            function('a.jpg')


def test_invalid_exports_are_errors(small_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r'does not end in \.onnx: give a name such as .*m\.onnx'):
        export_onnx(small_model[0], tmp_path / 'm.pt')
    before = small_model[1].read_bytes()
    with pytest.raises(ValueError, match='exists already'):
        export_onnx(small_model[0], small_model[1])
    assert small_model[1].read_bytes() == before
    (tmp_path / 'text.onnx').write_text('text')
    (tmp_path / 'cut.onnx').write_bytes(before[: len(before) // 2])
    for name, words in (
        ('text', 'cannot be read as ONNX'),
        ('cut', 'cannot be read as ONNX'),
        ('ghost', 'No such file'),
    ):
        with pytest.raises(ValueError, match=words):
            OnnxModel(tmp_path / f'{name}.onnx')
    import onnx

    proto = onnx.load(small_model[1])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / 'foreign.onnx')
    with pytest.raises(ModelError, match=r'it has no hash, because it is incomplete or another program wrote it'):
        OnnxModel(tmp_path / 'foreign.onnx')
    proto.metadata_props.add(key='format', value='dr_transfer onnx 1')
    onnx.save(proto, tmp_path / 'old.onnx')
    with pytest.raises(
        ModelError, match=r'written by dr_transfer 0.1, without a hash.*Make the file again with export_onnx'
    ):
        OnnxModel(tmp_path / 'old.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[onnx\]'"):
        OnnxModel(small_model[1])


def signed(data):
    "An ONNX file with a new hash, as an attacker would write it"
    from dr_transfer.inference.onnx_file import EMPTY_HASH, _hash, _hash_offset

    at = _hash_offset(data)
    return data[:at] + _hash(data, at) + data[at + len(EMPTY_HASH) :]


def test_a_change_of_any_byte_is_detected(small_model, tmp_path):
    "Bits of weights, of the graph and of the metadata, and names that change places."
    data = small_model[1].read_bytes()
    file = tmp_path / 'm.onnx'
    places = [*range(0, 200), *np.random.default_rng(0).integers(0, len(data), 300), *range(len(data) - 600, len(data))]
    for at in map(int, places):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ModelError):
            OnnxModel(file)
    assert data.count(b'["no", "referable"]') == 2
    for old, new in (
        (b'["no", "referable"]', b'["referable", "no"]'),
        (b'fundus', b'photos'),
        (b'"size": 48', b'"size": 84'),
    ):
        file.write_bytes(data.replace(old, new))
        with pytest.raises(ModelError, match='was changed after it was written'):
            OnnxModel(file)
    for longer in (data + b'\n', data[:-1], b'\n' + data, data * 2):
        file.write_bytes(longer)
        with pytest.raises(ModelError):
            OnnxModel(file)
    file.write_bytes(signed(data))
    assert file.read_bytes() == data
    assert OnnxModel(file).card == small_model[0].card


@pytest.mark.parametrize(
    'change, words',
    [
        ({'reader': 'os.system'}, "'reader' is 'os.system'"),
        ({'classes': ['a', 'b', 'c']}, 'the graph has the inputs and outputs'),
        ({'size': 64}, 'the graph has the inputs and outputs'),
        ({'classes': ['no', 'NO']}, 'differ only in case'),
        ({'classes': None}, "'classes' is missing"),
        ({'decision': {'temperature': 'warm'}}, "'decision.temperature' is 'warm'"),
        ({'mean': [float('nan')] * 3}, r"'mean\[0\]' is nan"),
        ({'head': []}, "'head' is"),
        ({'versions': {'dr_transfer': '0.9.9'}, 'size': 'big'}, "written by dr_transfer '0.9.9'"),
    ],
)
def test_changed_metadata_with_a_new_hash(small_model, tmp_path, change, words):
    import onnx

    proto = onnx.load(small_model[1])
    about = {k: v for k, v in {**small_model[0].about, **change}.items() if v is not None}
    next(m for m in proto.metadata_props if m.key == 'about').value = json.dumps(about)
    (tmp_path / 'm.onnx').write_bytes(signed(proto.SerializeToString()))
    with pytest.raises(ModelError, match=words):
        OnnxModel(tmp_path / 'm.onnx')


@pytest.mark.parametrize(
    'text, words',
    [
        ('', 'cannot be read'),
        ('[' * 10000, 'nested'),
        ('{"size": 1, "size": 2}', 'occurs twice'),
        ('3', "'description' is 3"),
    ],
)
def test_metadata_that_are_not_a_description(small_model, tmp_path, text, words):
    import onnx

    proto = onnx.load(small_model[1])
    next(m for m in proto.metadata_props if m.key == 'about').value = text
    (tmp_path / 'm.onnx').write_bytes(signed(proto.SerializeToString()))
    with pytest.raises(ModelError, match=words):
        OnnxModel(tmp_path / 'm.onnx')


def test_weights_that_are_nan_are_not_exported(tmp_path):
    bad = made('small_cnn', 48)
    bad.model[1][3].weight.data[1, 7] = float('inf')
    with pytest.raises(ModelError, match=r"the tensor '1.3.weight' has NaN or infinity in 1 of 256 values"):
        export_onnx(bad, tmp_path / 'm.onnx')
    assert list(tmp_path.iterdir()) == []


def test_the_command(small_model, tmp_path):
    folder = save_model(small_model[0], tmp_path / 'model')
    out = tmp_path / 'm.onnx'
    assert 'the same predictions as the model' in good('export', folder, '--out', out, '--runtime', 'bf16').out
    import onnx

    graphs = [onnx.load(f).graph.SerializeToString(deterministic=True) for f in (out, small_model[1])]
    assert graphs[0] == graphs[1]  # 32-bit numbers, for any runtime of the machine
    assert 'exists already' in error_line('export', folder, '--out', out)
    assert 'an ONNX file can only predict' in error_line('evaluate', out, tmp_path)
    Image.fromarray(random_images(1)[0]).save(tmp_path / 'a.png')
    a, b = (rows_of(good('predict', m, tmp_path / 'a.png', '--runtime', 'plain').out)[0] for m in (out, folder))
    assert a.keys() == b.keys()
    assert abs(float(a['p_no']) - float(b['p_no'])) < 1e-4
