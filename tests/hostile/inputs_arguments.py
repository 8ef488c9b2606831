"Arguments that a command cannot use."

import json
import os
import pickle
import shutil

import numpy as np
from bombs import Payload
from contract import must_fail
from inputs import PLAIN, case, need
from observe import Command, table_beside
from PIL import Image

BAD_NUMBERS = (
    '-1',
    '0',
    '1',
    '1.5',
    '2',
    'nan',
    'inf',
    '-inf',
    '1e400',
    'text',
    '',
    '99999999999999999999',
    '0x10',
    '١٢',
    '1_0',
)
OPTIONS = {
    '--seed': ('-1', '99999999999999999999', 'text', 'nan', '1.5'),
    '--size': ('0', '-1', '1000000000', '15', '1.5', 'text', 'nan'),
    '--bs': ('0', '-1', '1', '1000000000', 'text'),
    '--epochs': ('0', '-1', 'text', '1.5'),
    '--valid': ('0', '1', '2', 'nan', '-0.1', 'inf', '1e-9', '0.999'),
    '--sensitivity': ('0', '1', '1.5', 'nan', '-1', 'text'),
    '--specificity': ('0', '1', '2', 'nan'),
    '--task': ('nope', '/etc/passwd', '', 'DR', '../x'),
    '--plan': ('nope', '', 'fine_tune[', '/etc'),
    '--arch': ('nope', '', '../../x', 'timm.nope', 'os.system', 'torchvision.nope', 'hf-hub:a/b'),
    '--target': ('nope', 'grade', ''),
    '--head': ('nope', 'cumulative', ''),
    '--balance': ('nope', ''),
    '--runtime': ('nope', 'bf17', ''),
    '--patient': ('nobody', '', 'image', 'grade'),
    '--nope': ('1',),
    '--overwrite': ('yes',),
}
PAIRS = {f'{k} {v!r}': (k, v) for k, values in OPTIONS.items() for v in values}


@case('arguments', PAIRS)
def train(at, pair):
    "A training with one value that may be wrong."
    option, value = pair
    task = ('--task', 'dr') if option != '--task' else ()
    data = at.fundus if task else at.flowers
    more = (f'{option}={value}',) if option != '--overwrite' else (option, value)
    return at.train(
        *task, *more, data=data, images=24 if task else 18, named=(option.strip('-'), repr(value), value or option)
    )


EVALUATE = {
    '--prevalence': ('2', '0', '1', '-1', 'nan', 'text'),
    '--resamples': ('0', '-1', '1', '99', 'text', '1.5'),
    '--patient': ('nobody', ''),
    '--labels': ('nowhere.csv', '', '/dev/null'),
}


@case('arguments', {f'{k} {v!r}': (k, v) for k, values in EVALUATE.items() for v in values})
def evaluate(at, pair):
    "An evaluation with one value that may be wrong."
    option, value = pair
    at.copy_fundus()
    return at.evaluate(f'{option}={value}', named=(option.strip('-'), value or option))


OTHERS = {
    'compare --metric nope': ('compare', '--metric', 'nope'),
    'compare no arch': ('compare', '--archs'),
    'compare --plans nope': ('compare', '--plans', 'nope'),
    'compare --archs twice': ('compare', '--archs', 'small_cnn', 'small_cnn'),
    'compare --resamples 0': ('compare', '--resamples', '0'),
    'compare --valid nan': ('compare', '--valid', 'nan'),
    'cross-validate --folds 0': ('cross-validate', '--folds', '0'),
    'cross-validate --folds 1': ('cross-validate', '--folds', '1'),
    'cross-validate --folds 1000': ('cross-validate', '--folds', '1000'),
    'cross-validate --folds -3': ('cross-validate', '--folds', '-3'),
    'cross-validate --folds two': ('cross-validate', '--folds', 'two'),
    'cross-validate --prevalence 7': ('cross-validate', '--prevalence', '7'),
    'advise --size 1': ('advise', '--size', '1'),
    'advise --valid 5': ('advise', '--valid', '5'),
}


@case('arguments', OTHERS)
def other_command(at, words):
    "A command with one value that may be wrong."
    command, *words = words
    out = at.root / ('out.html' if command == 'cross-validate' else 'out.png')
    small = {
        'compare': ('--archs', 'small_cnn', '--plans', 'head', '--epochs', '1'),
        'cross-validate': ('--arch', 'small_cnn', '--plan', 'head', '--epochs', '1'),
        'advise': ('--arch', 'small_cnn'),
    }[command]
    more = ('--resamples', '100') if command != 'advise' else ()
    return Command(
        [command, at.flowers, *small, '--weights', 'random', '--size', '48', *PLAIN, *more, '--out', out, *words],
        [out, table_beside(out)],
        named=tuple(w.strip('-') for w in words),
    )


@case('arguments')
def two_operating_points(at):
    "A sensitivity and a specificity together."
    words = ('--sensitivity', '0.9', '--specificity', '0.9')
    return at.train('--task', 'dr', *words, data=at.fundus, images=24, also=must_fail)


@case('arguments')
def operating_point_of_three_classes(at):
    "A sensitivity for three classes, none of which is positive."
    at.copy_flowers()
    shutil.copytree(at.data / 'daisy', at.data / 'lilies')
    for path in sorted((at.data / 'lilies').iterdir()):
        image = Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        image.save(path)
    return at.train('--sensitivity', '0.9', also=must_fail)


@case(
    'arguments',
    {
        'nothing': (),
        'unknown command': ('nope',),
        'path': ('/etc/passwd',),
        'option': ('--nope',),
        'train': ('train',),
        'predict': ('predict',),
        'predict run': ('predict', 'RUN'),
        'empty command': ('',),
        'train empty': ('train', ''),
        'two': ('train', 'predict'),
        'unknown option': ('predict', 'RUN', 'DATA', '--nope'),
        'missing data': ('train', 'nowhere'),
        'missing model': ('predict', 'nowhere', 'DATA'),
        'data is a file': ('train', 'FILE'),
        'model is a file': ('predict', 'FILE', 'DATA'),
        'model is data': ('predict', 'DATA', 'DATA'),
        'data is root of models': ('train', 'RUN'),
        'export data': ('export', 'DATA'),
        'evaluate onnx': ('evaluate', 'ONNX', 'DATA'),
        'export onnx': ('export', 'ONNX', '--out', 'again.onnx'),
        'not text': ('train', os.fsdecode(b'\xff\xfe')),
        'long': ('train', 'x' * 5000),
        'newline': ('train', 'a\nb'),
    },
)
def words(at, words):
    "Words that are not a command."
    real = {'RUN': at.shared / 'flower_run', 'DATA': at.flowers, 'FILE': at.flower, 'ONNX': at.shared / 'flowers.onnx'}
    words = [real.get(w, w) for w in words]
    if at.shared / 'flowers.onnx' in words:
        need('onnxruntime')
    return Command(words, named=('COMMAND', 'command', 'arguments', 'DATA', 'IMAGES', *map(str, words)))


@case('arguments', {c: c for c in ('demo', 'train', 'predict', 'evaluate', 'preprocess')})
def help_is_shown(at, command):
    "--help exits with 0 and computes nothing."
    return Command([command, '--help'], also=lambda o: [] if 'usage' in o.out else ['no help'])


# ---------------------------------------------------------------- weights


def real(change):
    "A change of the tensors of real numbers."
    return lambda v: change(v) if v.dtype == np.float32 else v


SAME_PLACE = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
OVERLAP = json.dumps({'a': SAME_PLACE, 'b': SAME_PLACE}).encode()
OVERLAP = len(OVERLAP).to_bytes(8, 'little') + OVERLAP + bytes(4)
FILES = {
    'html': ('w.pth', b'<html>404</html>'),
    'empty': ('w.safetensors', b''),
    'pickle': ('w.pth', pickle.dumps(Payload())),
    'pickle named safetensors': ('w.safetensors', pickle.dumps(Payload())),
    'huge header': ('w.safetensors', (2**62).to_bytes(8, 'little') + b'{}'),
    'lying header': (
        'w.safetensors',
        (99).to_bytes(8, 'little')
        + b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'.ljust(99)
        + bytes(4),
    ),
    'no suffix': ('weights', b'abc'),
    'image': ('w.pth', b'\xff\xd8\xff\xe0'),
    'json': ('w.safetensors', b'{}'),
    'zip': ('w.pth', b'PK\3\4' + bytes(99)),
    'overlap': ('w.safetensors', OVERLAP),
}


@case('arguments', FILES)
def weights_file(at, file):
    "A weights file without weights."
    name, data = file
    (at.root / name).write_bytes(data)
    return at.train('--weights', at.root / name, data=at.flowers, named=(name, 'weights'))


CHANGES = {
    'nan': real(lambda v: np.full_like(v, np.nan)),
    'infinite': real(lambda v: np.full_like(v, np.inf)),
    'whole numbers': lambda v: v.astype(np.int32),
    'other shape': lambda v: v.flatten(),
    'half': real(lambda v: v.astype(np.float16)),
    'double': real(lambda v: v.astype(np.float64)),
    'bool': lambda v: v.astype(bool),
    'empty': lambda v: v[:0] if v.ndim else v,
}


@case('arguments', CHANGES)
def weights_changed(at, change):
    "Tensors with the right names that are not weights."
    from safetensors.numpy import load_file, save_file

    tensors = load_file(at.shared / 'body.safetensors')
    save_file({k: np.ascontiguousarray(change(v)) for k, v in tensors.items()}, at.root / 'w.safetensors')
    return at.train('--weights', at.root / 'w.safetensors', data=at.flowers, images=18)


@case('arguments', {k: k for k in ('folder', 'fifo', 'missing', 'zero', 'dangling', 'empty', 'hf-hub')})
def weights_path(at, what):
    "--weights that does not name a file."
    path = at.root / 'w.safetensors'
    if what == 'folder':
        path.mkdir()
    if what == 'fifo':
        os.mkfifo(path)
    if what in ('zero', 'dangling'):
        path.symlink_to('/dev/zero' if what == 'zero' else 'nowhere')
    given = {'empty': '', 'hf-hub': 'hf-hub:nobody/nothing'}.get(what, path)
    return at.train('--weights', given, data=at.flowers, named=('weights', 'hf-hub'))


# ---------------------------------------------------------------- where it is printed

OUTPUTS = {
    'ascii': ('file', 'ascii'),
    'latin-1': ('file', 'latin-1'),
    'closed': (None, 'utf-8'),
    'full': ('/dev/full', 'utf-8'),
    'null': ('/dev/null', 'utf-8'),
    'broken pipe': ('broken pipe', 'utf-8'),
}


@case('arguments', {f'{c} {k}': (c, *v) for k, v in OUTPUTS.items() for c in ('predict', 'train', 'evaluate')})
def printed(at, how):
    "Emoji in names, and standard output that cannot encode them, is closed, full, or has no reader."
    command, stdout, encoding = how
    if command == 'predict':
        import shutil

        shutil.copy(at.flower, at.data / '🌷.jpg')
        made = Command(['predict', at.shared / 'flower_run', at.data, *PLAIN], data=at.data)
        made.also = None
        if stdout != 'file':
            made.data = None
    elif command == 'train':
        at.copy_flowers()
        (at.data / 'roses').rename(at.data / '🌹')
        (at.data / '🌹' / '🥀.jpg').write_bytes(b'')
        made = at.train()
    else:
        at.copy_fundus()
        text = (at.data / 'labels.csv').read_text().replace('patient,', '🏥,')
        (at.data / 'labels.csv').write_text(text)
        (at.data / 'images' / '🥀.jpg').write_bytes(b'')
        made = at.evaluate(data=None)
    made.stdout = stdout
    made.encoding = encoding
    made.silent = stdout == 'broken pipe'
    made.keeps = stdout != 'file'
    made.named = ('output', 'stdout', 'space', 'closed', 'pipe')
    return made


@case(
    'arguments',
    {
        'unreadable home': {'HOME': '/nowhere'},
        'no home': {'HOME': ''},
        'no temporary folder': {'TMPDIR': '/nowhere'},
        'threads': {'OMP_NUM_THREADS': 'many'},
        'python': {'PYTHONWARNINGS': 'error'},
        'empty cache': {'DR_TRANSFER_CACHE': ''},
    },
)
def environment(at, values):
    "An odd environment."
    command = at.train(data=at.flowers, images=18, environment=values)
    command.outs += [at.home / '.cache', at.work / '.cache'] if not values.get('DR_TRANSFER_CACHE', 'x') else []
    return command
