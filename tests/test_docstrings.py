"Test that the most important functions document return values and errors, and that their examples run."

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest
from helpers import tool

import dr_transfer as dt

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    'build_learner',
    'fit',
    'advise',
    'compare',
    'cross_validate',
    'valid_predictions',
    'save_model',
    'load_model',
    'predict_table',
    'export_onnx',
    'evaluate_model',
    'choose_operating_point',
    'guaranteed_operating_point',
    'choose_sets',
    'coverage_table',
    'estimate_prevalence',
    'expected_metrics',
    'shift_prevalence',
    'label_table',
    'image_features',
    'preprocess_folder',
)


class LastLines(doctest.OutputChecker):
    "Compare only the last value of an example, not the lines that it prints before."

    def check_output(self, want, got, optionflags):
        return not want or got.endswith(want)


def section(name, title):
    "The text of a section of a docstring, '' without it."
    found = re.search(rf'^ *{title}\n *-+\n(.*?)(?=\n *\w+\n *---|\Z)', getattr(dt, name).__doc__, re.M | re.S)
    return found[1].strip() if found else ''


@pytest.mark.parametrize('name', NAMES)
def test_the_docstring_has_returns_raises_and_examples(name):
    for title in ('Parameters', 'Returns', 'Raises', 'Examples'):
        assert section(name, title), f'{name}: no section {title}'
    assert re.match(r'[A-Z].*[^ ]\n', getattr(dt, name).__doc__), 'the summary is one line'


@pytest.mark.parametrize('name', NAMES)
def test_the_parameters_are_those_of_the_signature(name):
    described = re.findall(r'^ *(\*{0,2}\w+)(?: : .*)?\n +\S.*$', section(name, 'Parameters'), re.M)
    parameters = inspect.signature(getattr(dt, name)).parameters.values()
    assert described == [str(p).partition(':')[0].partition('=')[0] for p in parameters]


def test_the_parameters_are_made_from_the_comments():
    write = tool('write_parameters')
    changed = [path.name for path in (ROOT / 'nbs').rglob('*.ipynb') if write.would_change(path)]
    assert changed == [], 'run make prepare'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('examples')


@pytest.fixture(scope='module')
def fit_once():
    "`fit`, which trains the same learner only once for all the examples."
    from dr_transfer.core import fit

    fitted = {}

    def fit_or_find(learn, plan=None):
        key = plan, tuple(learn.dls.vocab)
        if key not in fitted:
            fitted[key] = fit(learn, plan)
        return fitted[key]

    return fit_or_find


@pytest.mark.parametrize('name', NAMES)
def test_the_examples_run(name, folder, fit_once, monkeypatch):
    if name == 'export_onnx':
        pytest.importorskip('onnxscript')
        pytest.importorskip('onnxruntime')
    text = getattr(dt, name).__doc__
    monkeypatch.chdir(folder)
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(folder / 'cache'))
    monkeypatch.setattr(dt, 'fit', fit_once)
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    failures = []
    result = doctest.DocTestRunner(checker=LastLines(), verbose=False).run(test, out=failures.append)
    assert result.attempted >= 3
    assert not result.failed, ''.join(failures)


def test_the_site_shows_the_sections_once():
    "The parameters are in the signature, and the sections are below it."
    pytest.importorskip('nbdev')
    text = tool('show_sections').SectionsRenderer(dt.build_learner)._repr_markdown_()
    for title in ('Returns', 'Raises', 'Notes', 'Examples'):
        assert text.count(f'**{title}**') == 1
    assert '- `LeakError`: ' in text
    assert text.count('>>> learn = ') == 1
    assert not re.search(r'^-{3,}$', text.partition('\n')[2], re.M), 'an underlined title would be a heading'


@pytest.mark.parametrize(
    'text',
    [
        'A table, and nothing about its type',
        'DataFrame\n    One row for each image\nValueError',
        'DataFrame\n    One row for each image\nThe metrics are means',
        'DataFrame',
        '',
    ],
)
def test_an_invalid_entry_is_an_error(text):
    entries = tool('show_sections').entries
    assert entries('DataFrame\n    One row\n    for each image') == '- `DataFrame`: One row for each image'
    assert entries('int\n    One\n\nValueError\n    Two\n').count('\n') == 1
    with pytest.raises(ValueError, match='without a description'):
        entries(text)


def public_kwargs():
    "Each `**kwargs` of a public function of the library, and its line."
    for path in sorted((ROOT / 'dr_transfer').rglob('*.py')):
        text = path.read_text(encoding='utf-8')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.name.startswith('_'):
                yield f'{path.stem}.{node.name}', text.splitlines()[node.args.kwarg.lineno - 1]


def test_further_arguments_are_described():
    assert [name for name, line in public_kwargs() if ' # ' not in line] == []
