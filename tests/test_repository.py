"""Check the rules of the repository by reading its files; no notebook is run.

Patterns that must not occur are composed of parts, so that this file does not match them.
"""

import ast
import io
import json
import re
import subprocess
import tokenize
from configparser import ConfigParser
from pathlib import Path

import pytest
from helpers import tool

ROOT = Path(__file__).resolve().parent.parent
BUILT = {'_docs', '_proc', 'build', 'dist', 'runs', '__pycache__', 'node_modules'}


def tracked():
    "Return the files that are or would be committed: from git if it is available, else all files that are not built."
    try:
        out = subprocess.run(
            ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        found = [ROOT / o for o in out.decode().split('\0') if o]
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not found:

        def skip(p):
            return any(
                o in BUILT or o.endswith('.egg-info') or o.startswith(('.venv', '.git', '.make', '.pytest', '.ipynb'))
                for o in p.parts
            )

        found = (
            [p for p in ROOT.rglob('*') if not skip(p.relative_to(ROOT))]
            + [ROOT / '.gitignore']
            + sorted((ROOT / '.github').rglob('*'))
        )
    return sorted({p for p in found if p.is_file() and not p.is_symlink()})


TRACKED = tracked()
NOTEBOOKS = [p for p in TRACKED if p.suffix == '.ipynb' and (ROOT / 'nbs') in p.parents]
MODULES = [p for p in TRACKED if p.suffix == '.py' and (ROOT / 'dr_transfer') in p.parents and p.name != '_modidx.py']
RUNTIMES = ConfigParser(delimiters=['='], interpolation=None)
RUNTIMES.read(ROOT / 'settings.ini', encoding='utf-8')
RUNTIMES = RUNTIMES['DEFAULT']


def name(p):
    return p.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=name)


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    return re.findall(r'^#\|\s*([\w-]+)', source(cell), re.M)


def exported(path):
    return [c for c in cells(path) if {'export', 'exporti', 'exports'} & set(directives(c))]


def texts(cell):
    return ''.join(
        ''.join(t) if isinstance(t, list) else t
        for o in cell.get('outputs', [])
        for t in [o.get('text', '')] + [v for k, v in o.get('data', {}).items() if k.startswith('text/')]
    )


def docstring_lines(text):
    "The lines of the docstrings of functions and classes."
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(text):
    "Count the lines of code, without blank lines and lines that have only a comment or a docstring."
    lines = set()
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type not in quiet:
            lines |= set(range(t.start[0], t.end[0] + 1))
    return len(lines - docstring_lines(text))


def test_code_lines():
    cell = '#| export\n# why\n\ndef f(\n    a, # one\n):\n    """Doc\n\n    More.\n    """\n    return a\n'
    assert code_lines(cell) == 4


def test_exported_cells_are_found_under_each_directive(tmp_path):
    sources = ['#| export\na = 1', '#| exporti\nb = 1', '#| exports\nc = 1', '#| hide\nd = 1', 'e = 1']
    path = tmp_path / 'x.ipynb'
    path.write_text(json.dumps({'cells': [{'cell_type': 'code', 'source': [s]} for s in sources]}), encoding='utf-8')
    assert [source(c)[-5] for c in exported(path)] == ['a', 'b', 'c']


# ---------------------------------------------------------------- files


def test_nothing_large():
    assert not [name(p) for p in TRACKED if p.stat().st_size > 1_000_000]


def test_no_photographs_pickles_or_weights():
    bad = [
        '.jpg',
        '.jpeg',
        '.tif',
        '.tiff',
        '.bmp',
        '.webp',
        '.heic',
        '.dcm',
        '.nii',
        '.ppm',
        '.pkl',
        '.pickle',
        '.pth',
        '.pt',
        '.ckpt',
        '.safetensors',
        '.onnx',
        '.npz',
        '.npy',
        '.h5',
        '.joblib',
        '.zip',
        '.gz',
    ]
    made_by_0_1_0 = 'tests/model_0_1_0/model.safetensors'  # trained on synthetic images, from random weights
    assert [name(p) for p in TRACKED if p.suffix.lower() in bad] == [made_by_0_1_0]


PATHS = [
    '/' + 'home/',
    '/' + 'Users/',
    '/' + 'root/',
    '/' + 'tmp/',
    '/' + 'work/',
    '/' + 'mnt/',
    '/' + 'workspace',
    'C:' + r'\\',
    'file:' + '//',
    '.py' + 'env',
]
MARKS = ['TO' + 'DO', 'FIX' + 'ME', 'X' * 3, 'HA' + 'CK', 'W' + 'IP']


def readable(paths):
    for p in paths:
        if p.name == 'LICENSE':
            continue
        try:
            yield name(p), re.sub(r'"image/png": "[^"]*"', '', p.read_text(encoding='utf-8'))
        except UnicodeDecodeError:
            continue


def files_with(pattern):
    "The files in which a pattern is found, each with the first match."
    found = []
    for file, text in readable(TRACKED):
        match = pattern.search(text)
        if match:
            found.append((file, match.group()))
    return found


def test_no_machine_paths():
    # A path of a machine starts a word; `../work/` in a sentence or an address does not.
    pattern = re.compile(r'(?<![\w.)}>*-])(?:' + '|'.join(map(re.escape, PATHS)) + ')')
    assert pattern.search('at ' + PATHS[0] + 'somebody')
    assert not pattern.search('https://example.org' + PATHS[0])
    assert not files_with(pattern)


def test_no_unfinished_marks():
    pattern = re.compile(r'\b(?:' + '|'.join(MARKS) + r')\b')
    assert not files_with(pattern)


def test_version_and_pins():
    assert f'__version__ = "{RUNTIMES["version"]}"' in (ROOT / 'dr_transfer' / '__init__.py').read_text(
        encoding='utf-8'
    )
    run = RUNTIMES['requirements'].split()
    dev = RUNTIMES['dev_requirements'].split()
    assert {'fastai>=2.8.7,<2.9', 'fastcore>=1.12.3', 'torch', 'torchvision'} <= set(run)
    assert {'nbdev>=2.4.14,<3', 'execnb>=0.1.18,<0.2', 'fastcore>=1.12.3,<2', 'ghapi<2'} <= set(dev)
    assert RUNTIMES['tst_flags'] == 'slow cuda'
    assert RUNTIMES['custom_sidebar'] == 'True'
    assert RUNTIMES['update_pyproject'] == 'False'
    assert '[project]' not in (ROOT / 'pyproject.toml').read_text(encoding='utf-8')


def test_one_quarto_yml():
    link = ROOT / 'nbs' / '_quarto.yml'
    assert link.is_symlink()
    assert link.resolve() == ROOT / '_quarto.yml'


def test_change_log_has_this_version():
    assert f'## {RUNTIMES["version"]}' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


# ---------------------------------------------------------------- notebooks


@each([p for p in NOTEBOOKS if exported(p)])
def test_exports_are_small_and_checked(path):
    sizes = [code_lines(source(c)) for c in exported(path)]
    long = [f'{n}: {source(c).splitlines()[1]}' for c, n in zip(exported(path), sizes) if n > 60]
    assert not long, f'export cells of more than 60 lines of code: {long}'
    assert sum(sizes) <= 400, f'{sum(sizes)} exported lines: split the notebook'
    assert any(
        re.search(r'^\s*(test_\w+\(|assert )', source(c), re.M) for c in cells(path) if 'hide' not in directives(c)
    ), 'no check in full view'


@each([p for p in NOTEBOOKS if exported(p)])
def test_exporting_notebook_is_never_skipped(path):
    front = ''.join(source(c) for kind in ('raw', 'markdown') for c in cells(path, kind)[:1])
    assert 'skip_exec' not in front
    assert 'skip_showdoc' not in front
    assert not [source(c) for c in exported(path) if {'slow', 'cuda', 'eval'} & set(directives(c))]


@each(NOTEBOOKS)
def test_notebook_starts_with_title_and_summary(path):
    first = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
    assert first['cell_type'] == 'markdown', 'the first cell is "# title", then "> one line"'
    assert re.match(r'# \S.*\n+> \S', source(first)), 'the first cell is "# title", then "> one line"'


@each(NOTEBOOKS)
def test_stored_outputs_are_small_and_stable(path):
    for cell in cells(path):
        shown = source(cell)[:80]
        out = texts(cell)
        assert not [o for o in cell.get('outputs', []) if o['output_type'] == 'error'], shown
        assert not re.search(r'\b0x[0-9a-f]{6,}', out), f'the address of an object after {shown}'
        assert not re.search(r'<progress|fastprogress|\d+%\|[^|]*\||[█▏▎▍▌▋▊▉]{3}', out), (
            f'a progress bar after {shown}'
        )
        assert not re.search(r'\b\d\d:\d\d\b|\b\d+(\.\d+)? ?(ms|µs|seconds)\b|\bin \d+(\.\d+)? s\b', out), (
            f'a time after {shown}'
        )
        assert len(out) < 20_000, f'{len(out)} characters after {shown}'
        for o in cell.get('outputs', []):
            images = {k: v for k, v in o.get('data', {}).items() if k.startswith('image/')}
            assert set(images) <= {'image/png', 'image/svg+xml'}, f'an image of another type: {shown}'
            for v in images.values():
                assert len(''.join(v)) * 3 / 4 < 120_000, f'an image of more than 120 kB after {shown}'


# ---------------------------------------------------------------- modules


def exported_module(path):
    "The module that a notebook exports, such as `data.split`; None if it exports none."
    for cell in cells(path):
        directive = re.search(r'^#\|\s*default_exp\s+(\S+)', source(cell), re.M)
        if directive:
            return directive.group(1)
    return None


def module_name(path):
    "`dr_transfer/data/split.py` -> `data.split`"
    return '.'.join(path.relative_to(ROOT / 'dr_transfer').with_suffix('').parts)


PAGES = re.findall(r'^ +- ([\w/]+\.ipynb)$', (ROOT / '_quarto.yml').read_text(encoding='utf-8'), re.M)
# The sidebar lists the notebooks in the order in which they build on one another: module -> its place there
PLACE = {exported_module(ROOT / 'nbs' / page): i for i, page in enumerate(PAGES)}
PLACE.pop(None, None)  # pages that export nothing


def imports_of(text, module):
    "The modules of the library that a module imports, also inside of functions; ValueError for a star import."
    package = module.split('.')[:-1]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if any(a.name == '*' for a in node.names):
            raise ValueError(f'star import of {node.module}')
        parts = (node.module or '').split('.') if node.module else []
        if node.level:
            base = package[: len(package) - node.level + 1] + parts
        elif parts[:1] == ['dr_transfer']:
            base = parts[1:]
        else:
            continue
        # `from .table import x`, or `from . import table`
        yield from ['.'.join(base)] if '.'.join(base) in PLACE else ['.'.join([*base, a.name]) for a in node.names]


def late_imports(text, module):
    "Return the modules that a module imports although they come later."
    return [o for o in imports_of(text, module) if o in PLACE and PLACE[o] >= PLACE[module]]


def test_late_imports_are_found():
    first, *_, last = sorted(PLACE, key=PLACE.get)
    up = '.' * (1 + first.count('.'))
    for line in (
        f'from {up}{last} import x',
        f'def f():\n    from dr_transfer.{last} import x',
        f'from dr_transfer.{last} import x, y',
    ):
        assert late_imports(line, first) == [last], line
        assert not late_imports(
            line.replace(last, first).replace(up + first, '.' * (1 + last.count('.')) + first), last
        ), line
    with pytest.raises(ValueError, match='star'):
        late_imports(f'from dr_transfer.{first} import *', last)
    assert len(PLACE) > 60
    assert len(MODULES) > len(PLACE)


def test_packages_are_contiguous_in_the_sidebar():
    packages = [m.rpartition('.')[0] for m in sorted(PLACE, key=PLACE.get)]
    changes = [p for i, p in enumerate(packages) if p and (i == 0 or packages[i - 1] != p)]
    assert len(changes) == len(set(changes)), changes


@each(MODULES)
def test_module_comes_from_a_notebook_and_imports_earlier_ones(path):
    text = path.read_text(encoding='utf-8')
    if path.stem == '__init__':
        assert path.parent == ROOT / 'dr_transfer' or not text.strip(), 'only the package itself says something'
        return
    assert module_name(path) in PLACE, 'no notebook in the sidebar exports it'
    assert not late_imports(text, module_name(path)), 'imports what comes later'


def changed_classes(text):
    "Lines that set an attribute of a class from outside: `Name.attribute = ...`, or `object.__class__ = ...`"
    lines = []
    for node in ast.walk(ast.parse(text)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [t for t in targets if isinstance(t, ast.Attribute)]:
            is_class = isinstance(target.value, ast.Name) and target.value.id.lstrip('_')[:1].isupper()
            if is_class or target.attr == '__class__':
                lines.append(ast.unparse(node))
    return lines


def test_a_changed_class_is_found():
    assert changed_classes('Features.numpy = _numpy') == ['Features.numpy = _numpy']
    assert changed_classes('def f(x):\n    x.__class__ = A') == ['x.__class__ = A']
    assert not changed_classes('self.numpy = 1\nValue = 2')


@each(MODULES)
def test_no_class_is_changed_after_it_was_made(path):
    assert not changed_classes(path.read_text(encoding='utf-8'))


def constants(text):
    "Name and value, as written, of each constant of a module: a name of capital letters, private ones too"
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        named = [t.id for t in targets if isinstance(t, ast.Name)]
        yield from ((n, ast.unparse(node.value)) for n in named if n.isupper() and node.value is not None)


def conflicts(texts):
    "Constants that have two values or more in modules given as name -> text: constant -> value by module"
    values = {}
    for module, text in texts.items():
        for constant, value in constants(text):
            values.setdefault(constant, {})[module] = value
    return {constant: v for constant, v in values.items() if len(set(v.values())) > 1}


def test_a_constant_has_one_value():
    assert conflicts({'a': '_MIN = 1\nx = 2', 'b': '_MIN: int = 2\nx = 3'}) == {'_MIN': {'a': '1', 'b': '2'}}
    assert not conflicts({'a': 'MIN = 1', 'b': 'MIN = 1'})
    assert not conflicts({name(p): p.read_text(encoding='utf-8') for p in MODULES})


def test_public_names_are_few():
    "Names that only the library needs are under `#| exporti` or begin with an underscore."
    names = tool('public_names').library_names()
    assert 140 < sum(map(len, names.values())) <= 160
    assert 'build_learner' in names['dr_transfer.core']
    assert 'find_column' not in names.get('dr_transfer.data.columns', [])


@each(MODULES)
def test_public_functions_are_described(path):
    text = path.read_text(encoding='utf-8')
    lines = text.splitlines()
    missing = []
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith('_'):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        if isinstance(node, ast.ClassDef) or not node.body:
            continue
        # The comments of the parameters: what show_doc prints next to them
        for line in lines[node.lineno - 1 : node.body[0].lineno - 1]:
            comment = line.partition(' # ')[2]
            assert len(comment) < 70, f'{node.name}: a comment of {len(comment)} characters: {comment}'
    assert not missing, f'without a docstring: {missing}'


def test_the_readme_has_no_link_within_a_link():
    "Names of functions become links when it is made; a name that is the text of a link would get two."
    assert not re.search(r'\[\[[^\]]*\]\([^)]*\)\]\(', (ROOT / 'README.md').read_text(encoding='utf-8'))
