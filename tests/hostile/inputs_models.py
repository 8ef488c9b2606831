"Model folders and ONNX files that are damaged, or were made for an attack."

import hashlib
import json
import os
import pickle
import shutil

import numpy as np
from contract import must_fail
from inputs import ALL_CASES, PLAIN, case, need
from observe import Command

FIELDS = (
    'arch',
    'stage',
    'n_stages',
    'head',
    'classes',
    'task',
    'target',
    'size',
    'reader',
    'fit',
    'views',
    'mean',
    'std',
    'decision',
    'weights',
    'format',
    'tensors_sha256',
    'sha256',
)
DIGESTS = ('format', 'tensors_sha256', 'sha256')


def digest(about) -> str:
    "The digest of a description, as a model folder holds it: it guards against accidents, not against an author."
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def model(at, change=None, tensors=None, sign=True):
    "A copy of the trained run whose description or tensors were changed, with digests that fit."
    run = shutil.copytree(at.shared / 'flower_run', at.root / 'run')
    file = run / 'model' / 'model.json'
    about = json.loads(file.read_text())
    kept = {k: about.get(k) for k in DIGESTS}
    about.pop('sha256')
    if tensors:
        need('safetensors')
        from safetensors.numpy import load_file, save_file

        path = run / 'model' / 'model.safetensors'
        save_file({k: np.ascontiguousarray(v) for k, v in tensors(load_file(path)).items()}, path)
        about['tensors_sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
    if change:
        change(about)
    about['sha256'] = kept['sha256'] if not sign else digest(about)
    file.write_text(json.dumps(about))
    return run


def predicted(at, run, **more):
    "One good image, predicted with a model of this case."
    return at.predict(
        at.flower, model=run, images=[at.flower], named=('model', 'model.json', *more.pop('named', ())), **more
    )


# ---------------------------------------------------------------- model.json


@case('models', {f: f for f in FIELDS})
def field_missing(at, field):
    "A field of model.json is missing."
    run = model(at)
    about = json.loads((run / 'model' / 'model.json').read_text())
    about.pop(field, None)
    if field != 'sha256':
        about.pop('sha256')
        about['sha256'] = digest(about)
    (run / 'model' / 'model.json').write_text(json.dumps(about))
    return predicted(at, run, also=None if field in ('task', 'target', 'decision', 'weights') else must_fail)


VALUES = {
    'null': None,
    'text': 'x',
    'number': -7,
    'list': [None],
    'dict': {'a': 1},
    'bool': True,
    'path': '/etc/passwd',
    'nan': float('nan'),
}


@case(
    'models',
    {
        f'{f} {n}': (f, v)
        for f in FIELDS[:14]
        for n, v in VALUES.items()
        if ALL_CASES or n in ('null', 'dict', 'number')
    },
)
def field_of_another_type(at, what):
    "A field of model.json has another type."
    field, value = what
    return predicted(at, model(at, lambda about: about.update({field: value})))


def set_head(**values):
    "A change of the head."
    return lambda about: about['head'].update(values)


def set_field(**values):
    "A change of fields."
    return lambda about: about.update(values)


ATTACKS = {
    'wide head': set_head(hidden=[10**9]),
    'deep head': set_head(hidden=[8] * 20_000),
    'negative head': set_head(hidden=[-1]),
    'text in head': set_head(hidden=['x']),
    'dropout': set_head(dropout=7),
    'unknown of head': set_head(nope=1),
    'ordered': set_head(ordered='cumulative'),
    'flat head': set_head(flatten=True),
    'huge size': set_field(size=10**9),
    'no size': set_field(size=0),
    'fraction of size': set_field(size=47.5),
    'another size': set_field(size=64),
    'million classes': set_field(classes=[f'c{i}' for i in range(10**6)]),
    'no classes': set_field(classes=[]),
    'one class': set_field(classes=['daisy']),
    'three classes': set_field(classes=['daisy', 'roses', 'x']),
    'same classes': set_field(classes=['daisy', 'daisy']),
    'classes as text': set_field(classes='ab'),
    'numbers as classes': set_field(classes=[1, 2]),
    'empty class': set_field(classes=['', 'daisy']),
    'std 0': set_field(std=[0, 0, 0]),
    'std nan': set_field(std=[float('nan')] * 3),
    'std of two': set_field(std=[0.5, 0.5]),
    'negative std': set_field(std=[-1, -1, -1]),
    'huge mean': set_field(mean=[1e300] * 3),
    'mean infinite': set_field(mean=[float('inf')] * 3),
    'network to load': set_field(arch='hf-hub:nobody/nothing'),
    'path as network': set_field(arch='../../x'),
    'other network': set_field(arch='test_resnet'),
    'no such stage': set_field(stage='stage99'),
    'n_stages': set_field(n_stages=10**6),
    'views': set_field(views='quarter_turns'),
    'temperature 0': set_field(decision={'temperature': 0}),
    'temperature nan': set_field(
        decision={'temperature': float('nan'), 'cuts': None, 'operating': None, 'not_chosen': []}
    ),
    'temperature of text': set_field(decision={'temperature': 'x', 'cuts': None, 'operating': None, 'not_chosen': []}),
    'negative temperature': set_field(
        decision={'temperature': -1.0, 'cuts': None, 'operating': None, 'not_chosen': []}
    ),
    'cuts': set_field(decision={'temperature': 1.0, 'cuts': [9, 1], 'operating': None, 'not_chosen': []}),
    'threshold': set_field(
        decision={'temperature': 1.0, 'cuts': None, 'operating': {'threshold': 'x'}, 'not_chosen': []}
    ),
    'deep decision': set_field(decision=json.loads('[' * 500 + ']' * 500)),
    'pickle of reader': set_field(reader='os.system'),
    'newline in class': set_field(classes=['a\nb', 'c']),
}
MAY_WORK = {
    'same classes',
    'numbers as classes',
    'another size',
    'views',
    'dropout',
    'newline in class',
    'flat head',
    'ordered',
}


@case('models', ATTACKS)
def attack(at, change):
    "A value in model.json that uses all memory, or changes the predictions."
    return predicted(at, model(at, change))


@case(
    'models',
    {
        k: ATTACKS[k]
        for k in (
            'std 0',
            'std nan',
            'negative std',
            'temperature nan',
            'temperature of text',
            'negative temperature',
            'same classes',
            'no classes',
            'mean infinite',
        )
    },
)
def harm_is_detected(at, change):
    "Values with which no prediction can be correct: an error."
    return predicted(at, model(at, change), also=must_fail)


@case('models', {'swapped': ['roses', 'daisy'], 'other': ['a', 'b']})
def classes_changed_by_hand(at, classes):
    "The class names of a model were edited: its digest does not fit."
    return predicted(at, model(at, set_field(classes=classes), sign=False), also=must_fail)


JSONS = {
    'deep': b'[' * 200_000,
    'deep object': b'{"a":' * 200_000,
    'cut': None,
    'empty': b'',
    'array': b'[]',
    'number': b'7',
    'html': b'<html>',
    'utf-16': '{}'.encode('utf-16'),
    'long number': b'{"size": ' + b'9' * 100_000 + b'}',
    'twice': b'{"format": 1, "format": 2}',
    'nul': bytes(1000),
    'huge': b' ' * 50_000_000,
}


@case('models', JSONS)
def other_json(at, data):
    "model.json contains something else."
    run = model(at)
    file = run / 'model' / 'model.json'
    file.write_bytes(file.read_bytes()[:300] if data is None else data)
    return predicted(at, run, also=must_fail)


@case(
    'models',
    {
        f'{n} {k}': (n, k)
        for n in ('model.json', 'model.safetensors')
        for k in ('missing', 'fifo', 'folder', 'zero', 'dangling')
    },
)
def file_of_a_model(at, what):
    "A file of a model is a pipe, a folder or a link."
    name, kind = what
    run = model(at)
    path = run / 'model' / name
    path.unlink()
    if kind == 'fifo':
        os.mkfifo(path)
    if kind == 'folder':
        path.mkdir()
    if kind in ('zero', 'dangling'):
        path.symlink_to('/dev/zero' if kind == 'zero' else 'nowhere')
    return predicted(at, run, also=must_fail)


# ---------------------------------------------------------------- tensors


def scaled(factor):
    "All real tensors times a number."
    return lambda tensors: {k: v * np.float32(factor) if v.dtype == np.float32 else v for k, v in tensors.items()}


TENSORS = {
    'nan': scaled(np.nan),
    'infinite': scaled(np.inf),
    'none': lambda t: {},
    'one more': lambda t: {**t, 'more': np.zeros(3)},
    'whole numbers': lambda t: {k: v.astype(np.int32) for k, v in t.items()},
    'flat': lambda t: {k: v.reshape(-1) for k, v in t.items()},
    'renamed': lambda t: {f'x{k}': v for k, v in t.items()},
    'one lost': lambda t: dict(list(t.items())[1:]),
}


@case('models', TENSORS)
def tensors_changed(at, change):
    "Tensors that are not weights of this network, signed as if they were."
    return predicted(at, model(at, tensors=change), also=must_fail)


@case('models', {'doubles': np.float64, 'halves': np.float16})
def tensors_of_another_type(at, kind):
    "The weights as numbers of another precision: used, or an error."

    def change(tensors):
        return {k: v.astype(kind) if v.dtype == np.float32 else v for k, v in tensors.items()}

    return predicted(at, model(at, tensors=change))


@case('models')
def hashes_changed(at):
    "The hashes of the images that a model was trained on have another shape."
    return predicted(at, model(at, tensors=lambda t: {**t, 'seen': np.zeros((3, 5), np.float64)}))


def flipped(path, i, n=20):
    "Flip the bits of one byte of a file, at the i-th of n places."
    data = bytearray(path.read_bytes())
    data[int(len(data) * (i + 0.5) / n)] ^= 0xFF
    path.write_bytes(bytes(data))


PLACES = {str(i): i for i in range(20)}


@case('models', PLACES)
def tensors_flipped(at, i):
    "One byte of the tensors has other bits."
    run = model(at)
    flipped(run / 'model' / 'model.safetensors', i)
    return predicted(at, run, also=must_fail)


@case(
    'models', {'pickle': pickle.dumps(print), 'empty': b'', 'cut': None, 'huge header': (2**62).to_bytes(8, 'little')}
)
def other_tensors(at, data):
    "model.safetensors contains something else, signed as if it did not."
    run = model(at)
    path = run / 'model' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:5000] if data is None else data)
    file = run / 'model' / 'model.json'
    about = json.loads(file.read_text())
    about.pop('sha256')
    about['tensors_sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
    file.write_text(json.dumps({**about, 'sha256': digest(about)}))
    return predicted(at, run, also=must_fail)


@case('models', {'evaluate': 'evaluate', 'export': 'export'})
def nan_in_other_commands(at, command):
    "A model whose weights are not numbers, evaluated and exported."
    run = model(at, tensors=scaled(np.nan))
    if command == 'export':
        need('onnx')
        return Command(['export', run, *PLAIN, '--out', at.root / 'out.onnx'], also=must_fail)
    at.copy_flowers()
    return at.evaluate(model=run, also=must_fail)
