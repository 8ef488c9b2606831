"ONNX files that are damaged, or whose description was changed by hand."

import json
import os
import pickle
import shutil

from contract import must_fail, read_rows
from inputs import case, need
from inputs_models import PLACES, flipped, predicted


def onnx(at):
    "A copy of the ONNX file."
    need('onnxruntime')
    need('onnx')
    return shutil.copy(at.shared / 'flowers.onnx', at.root / 'm.onnx')


@case('onnx', PLACES)
def onnx_flipped(at, i):
    "One byte of an ONNX file has other bits: an error, never another prediction."
    path = onnx(at)
    flipped(path, i)
    return predicted(at, path, culprit=('m.onnx',), also=same_or_error(at))


def same_or_error(at):
    "Check that a prediction, if there is one, is that of the undamaged model."
    want = read_rows((at.shared / 'good.csv').read_text().splitlines())[0]
    return lambda o: (
        []
        if o.code or abs(float(o.rows[0]['p_daisy']) - float(want['p_daisy'])) < 1e-3
        else [f'another prediction: {o.rows[0]}, not {want}']
    )


@case('onnx', {'empty': b'', 'html': b'<html>', 'cut': None, 'zeros': bytes(10_000), 'pickle': pickle.dumps(print)})
def other_onnx(at, data):
    "An ONNX file that contains something else."
    path = onnx(at)
    path.write_bytes(path.read_bytes()[:100_000] if data is None else data)
    return predicted(at, path, culprit=('m.onnx',), also=must_fail)


@case(
    'onnx',
    {
        'swapped classes': {'classes': ['roses', 'daisy']},
        'huge size': {'size': 10**9},
        'million classes': {'classes': ['c'] * 10**6},
        'no reader': {'reader': None},
        'temperature': {'decision': {'temperature': 'x'}},
        'list': None,
    },
)
def onnx_with_another_description(at, change):
    "The description in an ONNX file was changed by hand."
    path = onnx(at)
    import onnx as package

    proto = package.load(path)
    about = next(m for m in proto.metadata_props if m.key == 'about')
    about.value = '[]' if change is None else json.dumps({**json.loads(about.value), **change})
    package.save(proto, path)
    return predicted(at, path, culprit=('m.onnx',), also=must_fail)


@case('onnx', {k: k for k in ('fifo', 'folder', 'zero', 'dangling')})
def onnx_path(at, kind):
    "A model named .onnx that is not a file."
    path = at.root / 'm.onnx'
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    else:
        path.symlink_to('/dev/zero' if kind == 'zero' else 'nowhere')
    return predicted(at, path, culprit=('m.onnx',), also=must_fail)
