"Test that changed, truncated or invented descriptions raise an error that names the file and the field."

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest
from helpers import GRADES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dr_transfer.inference.card import CARD_FORMAT, FIELDS, MAX_CARD_BYTES, ModelCard, ModelError, card_text, read_card
from dr_transfer.metrics.decision import Decision
from dr_transfer.metrics.operating_point import OperatingPoint
from dr_transfer.utils.checks import check_class_names
from dr_transfer.utils.schema import SchemaError, from_dict, read_json, to_dict

POINT = {
    'threshold': 0.5,
    'metric': 'sensitivity',
    'minimum': 0.9,
    'positives': 30,
    'negatives': 40,
    'sensitivity': 0.9,
    'specificity': 0.5,
}
DATA = {
    'images': 240,
    'skipped': 0,
    'groups': 120,
    'leaks': {},
    'classes': {'train': {'0': 86, '4': 15}, 'valid': {'0': 22}},
    'fraction': {'train': 0.8, 'valid': 0.2},
    'fingerprint': '0123456789abcdef',
}
ABOUT = {
    'arch': 'small_cnn',
    'stage': 'stage3',
    'n_stages': 1,
    'head': {'hidden': [16], 'dropout': 0.0, 'flatten': False, 'ordered': 'cumulative'},
    'classes': list(GRADES),
    'task': 'dr',
    'target': 'grade',
    'size': 48,
    'reader': 'fundus',
    'fit': 'pad',
    'views': 'quarter_turns',
    'mean': [0.5, 0.5, 0.5],
    'std': [0.25, 0.25, 0.25],
    'decision': {'temperature': 1.5, 'cuts': [0.5, 1.5, 2.5, 3.5], 'operating': POINT, 'not_chosen': ['no reason']},
    'weights': {'kind': 'random', 'name': '', 'sha256': ''},
    'licence': '',
    'versions': {'python': '3.11.7', 'dr_transfer': '0.1.0'},
    'seed': 42,
    'training': {'plan': 'head', 'balance': 'none', 'data': DATA},
}


NAMES_OF_0_1_0 = {
    'n_stages': 'tap',
    'metric': 'wanted',
    'minimum': 'at_least',
    'not_chosen': 'refused',
    'skipped': 'set_aside',
    'fraction': 'share',
}


def renamed(value, names):
    "A description with other names of fields"
    if isinstance(value, dict):
        return {names.get(k, k): renamed(v, names) for k, v in value.items()}
    return [renamed(v, names) for v in value] if isinstance(value, list) else value


def stored(about, digest=True):
    "model.json in the format of version 0.1.0"
    about = json.loads(
        json.dumps({**about, 'format': 'dr_transfer model 2', 'tensors_sha256': about.get('tensors_sha256', '0' * 64)})
    )
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return json.dumps({**about, **({'sha256': sha256} if digest else {})}, indent=1, ensure_ascii=False)


def paths(value, at=()):
    "Return the path of every value in a description."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, v in inner:
        yield (*at, key)
        yield from paths(v, (*at, key))


def changed(value, path, change):
    "A description with another value at a place; `change` gets the object and the key"
    new = json.loads(json.dumps(value))
    inside = new
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return new


def error_of(file, data):
    "The ModelError of a model.json; None if it can be read. (A slow regular expression once took a minute.)"
    file.write_bytes(data if isinstance(data, bytes) else data.encode('utf-8', 'surrogatepass'))
    start = time.process_time()
    try:
        read_card(file)
    except ModelError as e:
        error = str(e)
    else:
        error = None
    assert time.process_time() - start < 1 or len(data) > 10**5
    assert error is None or (str(file) in error and '\n' not in error)
    return error


# ---------------------------------------------------------------- valid descriptions


def test_a_description_of_version_0_1_0_is_read(tmp_path):
    model = tmp_path / 'model.json'
    model.write_text(stored(renamed(ABOUT, NAMES_OF_0_1_0)))
    card = read_card(model)
    assert card.to_dict() == {**ABOUT, 'tensors_sha256': '0' * 64}
    assert set(FIELDS) <= set(ABOUT)
    assert card.decision == Decision(1.5, (0.5, 1.5, 2.5, 3.5), OperatingPoint(**POINT), ('no reason',))
    assert card.training.data.groups == 120
    model.write_text(card_text(card))
    assert read_card(model) == card
    written = json.loads(card_text(card))
    expected = json.loads(stored(ABOUT))
    own = ('format', 'sha256')
    assert {k: v for k, v in written.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}


@pytest.mark.parametrize(
    'change,graded',
    [
        ({'task': 'mine', 'target': 'stage'}, True),  # version 0.1.0 did this for any five classes with these names
        ({'task': 'mine', 'target': 'stage', 'decision': None}, False),
        ({'decision': None}, True),
        ({'classes': ['A', 'B', 'C', 'D', 'E'], 'decision': None}, False),
        ({'task': 'mine', 'decision': None, 'positive': {'name': 'late', 'classes': ['4']}}, False),
    ],
)
def test_grades_of_version_0_1_0_are_grades(change, graded):
    classes = ModelCard.from_dict({**ABOUT, **change}).class_set
    assert classes.are_grades == graded
    if graded:
        assert classes.positive == GRADES.positive


def test_fields_of_a_newer_version_are_kept(tmp_path):
    new = {
        **ABOUT,
        'colours': {'space': ['P3', None, 1.5]},
        'training': {**ABOUT['training'], 'hours': 3, 'data': {**DATA, 'patients': 'column pid'}},
    }
    (tmp_path / 'model.json').write_text(stored(new))
    card = read_card(tmp_path / 'model.json')
    assert card.more == {'colours': {'space': ['P3', None, 1.5]}}
    assert card.to_dict() == {
        **new,
        'tensors_sha256': '0' * 64,
    }


def test_an_undefined_metric_is_read(tmp_path):
    "0.1.0 wrote NaN for the specificity of a validation set without negatives."
    about = changed(ABOUT, ('decision', 'operating', 'specificity'), lambda o, k: o.update({k: float('nan')}))
    (tmp_path / 'model.json').write_text(stored(about))
    card = read_card(tmp_path / 'model.json')
    assert card.decision.operating.specificity is None
    assert '"specificity": null' in card_text(card)


# ---------------------------------------------------------------- invalid descriptions

REQUIRED = [(k,) for k in FIELDS] + [('decision', 'operating', k) for k in POINT]
TYPED = list(paths(ABOUT))


@pytest.mark.parametrize('path', REQUIRED, ids=lambda p: '.'.join(map(str, p)))
def test_each_field_removed(tmp_path, path):
    error = error_of(tmp_path / 'model.json', stored(changed(ABOUT, path, lambda o, k: o.pop(k))))
    assert f"the field '{'.'.join(path)}' is missing" in error


@pytest.mark.parametrize('field', ['sha256', 'tensors_sha256', 'format'])
def test_each_field_of_the_file_removed(tmp_path, field):
    about = json.loads(stored(ABOUT))
    del about[field]
    error = error_of(tmp_path / 'model.json', json.dumps(about))
    assert (f"the field '{field}' is missing" if field != 'format' else 'another format') in error


@pytest.mark.parametrize('path', TYPED, ids=lambda p: '.'.join(map(str, p)))
def test_each_field_with_a_wrong_type(tmp_path, path):
    "An object in the place of each value, and a list in the place of each object."
    error = error_of(
        tmp_path / 'model.json',
        stored(
            changed(ABOUT, path, lambda o, k: o.update({k: [[]]}) if isinstance(o, dict) else o.__setitem__(k, [[]]))
        ),
    )
    shown = path[0] + ''.join(f'[{k}]' if isinstance(k, int) else f'.{k}' for k in path[1:])
    assert f"the field '{shown}" in error
    assert 'expected: ' in error


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**9, -(10**9), 10**400, 0, 1, -1])
    | st.floats()
    | st.text(max_size=20)
    | st.just('\ud800')
    | st.just('\0')
    | st.just('../../x'),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=5), o, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(TYPED), ODD, st.booleans())
@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
def test_any_value_in_any_place(tmp_path, path, value, digest):
    "The description is read correctly, or a ModelError names the file; there is no other result."
    about = changed(ABOUT, path, lambda o, k: o.update({k: value}) if isinstance(o, dict) else o.__setitem__(k, value))
    try:
        data = stored(about, digest)
    except ValueError:
        return
    if error_of(tmp_path / 'model.json', data) is None:
        card = read_card(tmp_path / 'model.json')
        assert ModelCard.from_dict(json.loads(card_text(card))).to_dict().items() >= card.to_dict().items()


@given(st.data())
@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
def test_any_change_of_the_bytes(tmp_path, data):
    "Cut, longer, or with other bytes somewhere."
    good = stored(ABOUT).encode()
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    new = (
        good[:a]
        + data.draw(
            st.binary(max_size=8)
            | st.sampled_from(
                [b'NaN', b'1e999', b'-Infinity', b'{', b'"', b'null', b'\\ud800', b'9' * 5000, b'[' * 5000]
            )
        )
        + good[b:]
    )
    try:
        same = json.loads(new) == json.loads(good)
    except (ValueError, RecursionError):
        same = False
    assert (error_of(tmp_path / 'model.json', new) is None) == same


@pytest.mark.parametrize(
    'data, words',
    [
        (b'', 'Expecting value'),
        (b'[]', 'another format'),
        (b'null', 'another format'),
        (b'{"format": ["dr_transfer model 2"]}', 'another format'),
        (b'[' * 10**5, 'nested'),
        (b'{"a":' * 5000 + b'1' + b'}' * 5000, 'nested'),
        (stored({**ABOUT, 'new': json.loads('[' * 30 + ']' * 30)}), 'nested more than 20'),
        (stored(ABOUT).replace('"size"', '"size": 48, "size"'), "'size' occurs twice"),
        (stored(ABOUT).replace('"kind"', '"name": "", "kind"'), "'name' occurs twice"),
        (stored(ABOUT).replace('"size": 48', '"size": ' + '4' * 5000), '4300 digits'),
        (stored(ABOUT).replace('"size": 48', '"size": ' + '4' * 4000), "'size' is 44"),
        (stored(ABOUT).replace('"size": 48', '"size": NaN'), "'size' is nan"),
        (stored(ABOUT).replace('0.25', '1e999'), "'std[0]' is inf"),
        (b' ' * (MAX_CARD_BYTES + 1), 'bytes, more than the allowed'),
        (b'\xff\xfe', 'utf-8'),
        ('\ufeff' + stored(ABOUT), 'BOM'),
        (stored({**ABOUT, 'extra': {'deep': [float('nan')]}}), "'extra.deep[0]' is nan"),
        (stored({**ABOUT, 'x\ny': float('inf')}), 'expected: a number'),
    ],
    ids=range(18),
)
def test_files_that_are_not_descriptions(tmp_path, data, words):
    assert words in error_of(tmp_path / 'model.json', data)


@pytest.mark.parametrize(
    'change, words',
    [
        ({'classes': ['a', 'b']}, "'decision.cuts' is"),
        ({'decision': {'operating': POINT}, 'classes': ['a', 'b', 'c']}, "'decision.operating' is"),
        ({'decision': {'cuts': [1.0, 2.0]}}, '4 increasing numbers'),
        ({'decision': {'cuts': [4.0, 3.0, 2.0, 1.0]}}, '4 increasing numbers'),
        ({'decision': {'temperature': -1.0}}, 'from 0.001 to 1000.0'),
        ({'decision': {'temprature': 2.0}}, 'no field of this name'),
        ({'head': {'ordered': 'wavy'}}, "one of '', 'cumulative', 'regression'"),
        ({'head': {'hidden': [8] * 11}}, 'of length 0 to 10'),
        ({'size': True}, "'size' is True"),
        ({'seed': 1.5}, "'seed' is 1.5"),
        ({'classes': 'ab'}, "'classes' is 'ab'"),
        ({'classes': ['a']}, 'of length 2'),
        ({'arch': 'a' * 10**4}, "'arch' is"),
        ({'reader': ['fundus']}, "'reader' is"),
    ],
)
def test_inconsistent_fields(tmp_path, change, words):
    assert words in error_of(tmp_path / 'model.json', stored({**ABOUT, **change}))


@pytest.mark.parametrize(
    'names, words',
    [
        (['rose', 'Rose'], 'case or spaces'),
        (['a b', 'a  b'], 'case or spaces'),
        (['a', 'a'], 'occurs twice:'),
        (['', 'a'], 'is empty'),
        ([' ', 'a'], 'is empty'),
        ([0, 1], 'not text'),
        ([None, 'a'], 'not text'),
        (['a\tb', 'c'], 'cannot be printed'),
        (['a\x00', 'c'], 'cannot be printed'),
        (['\udc80', 'c'], 'cannot be printed'),
        (['Straße', 'STRASSE'], 'case'),
    ],
)
def test_ambiguous_class_names(names, words):
    with pytest.raises(ValueError, match=words):
        check_class_names(names)
    with pytest.raises(SchemaError, match="'classes"):
        ModelCard.from_dict({**ABOUT, 'decision': None, 'classes': names})


def test_advice_depends_on_the_version_of_the_file(tmp_path):
    "Copying again does not help if another version omitted a field."
    model = tmp_path / 'model.json'
    here = {**ABOUT, 'versions': {}}
    assert 'changed by hand' in error_of(model, stored({**here, 'size': 'x'}))
    error = error_of(model, stored({**ABOUT, 'versions': {'dr_transfer': '0.0.9'}, 'size': 'x'}))
    assert "written by dr_transfer '0.0.9'" in error
    assert 'opy' not in error
    assert 'Copy the original folder again' in error_of(model, stored(ABOUT)[:-40])
    assert 'changed after it was saved' in error_of(model, stored(ABOUT).replace('"size": 48', '"size": 64'))


# ---------------------------------------------------------------- paths that are not files


@pytest.mark.skipif(os.name == 'nt', reason='pipes')
def test_paths_that_are_not_regular_files_are_errors_at_once(tmp_path):
    file = tmp_path / 'model.json'

    def says():
        return pytest.raises(ModelError, match=r'model.json cannot be read: (it |No such|Too many)')

    with says():
        read_card(file)
    file.mkdir()
    with says():
        read_card(file)
    file.rmdir()
    os.mkfifo(file)
    with says():
        read_card(file)
    file.unlink()
    file.symlink_to(file)
    with says():
        read_card(file)
    file.unlink()
    file.symlink_to('/dev/zero')
    with says():
        read_card(file)


def test_reading_a_description_loads_no_torch():
    heavy = {'torch', 'fastai', 'timm', 'pydantic'}
    code = f'import sys, dr_transfer.inference.card; print(sorted({heavy} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == '[]'


def test_a_decision_is_restored():
    d = Decision(2.0, None, OperatingPoint(**POINT), ('why',))
    assert Decision.from_dict(json.loads(json.dumps(d.to_dict()))) == d
    assert d.to_dict() == {
        'temperature': 2.0,
        'cuts': None,
        'operating': POINT,
        'not_chosen': ['why'],
    }
    assert Decision.from_dict({}) == Decision()
    assert to_dict(None) is None
    assert from_dict(Decision, read_json(b'{"not_chosen": []}')) == Decision()
    for bad in (None, [], 'x', {'cuts': 3}, {'operating': []}):
        with pytest.raises(SchemaError, match="'decision"):
            Decision.from_dict(bad)


def test_the_format_of_0_1_0_is_read():
    assert CARD_FORMAT == 'dr_transfer model 3'
    names = {'n_stages': 'tap', 'runtime': 'setting'}
    old = {names.get(k, k): v for k, v in {**ABOUT, 'runtime': 'plain'}.items()}
    assert ModelCard.from_dict(old) == ModelCard.from_dict({**ABOUT, 'runtime': 'plain'})
