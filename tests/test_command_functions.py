"""The commands as functions: called from Python they do what the command line does,
and every option of a parser is a parameter, or a field of a group of options.
"""

import ast
import dataclasses
import inspect
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from helpers import content, good

from dr_transfer.cli import _parser
from dr_transfer.commands import arguments, backbones, check, ensemble, parts, sites, subcommands, validation
from dr_transfer.commands.arguments import (
    CandidateOptions,
    ComparisonOptions,
    FoldOptions,
    OutputOptions,
    RecipeOptions,
    ReportOptions,
    SplitOptions,
    TableOptions,
    TaskOptions,
    TrainingOptions,
    call_command,
    option_defaults,
)

pytestmark = pytest.mark.usefixtures('with_shared_cache')
PARSERS = _parser()._subparsers._group_actions[0].choices
FAST_RECIPE = RecipeOptions(arch='test_resnet', plan='head')


def called(function, *args, **kwargs):
    "What a command that must succeed prints when it is called as a function."
    out = StringIO()
    with redirect_stdout(out):
        assert function(*args, **kwargs) == 0
    return out.getvalue()


def option_names(function):
    "The names of the parameters that are single options, and of the fields of the groups."
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.annotation):
            yield from (f.name for f in dataclasses.fields(parameter.annotation))
        else:
            yield name


# ---------------------------------------------------------------- options and parameters


@pytest.mark.parametrize('name', PARSERS)
def test_every_option_is_used_and_every_parameter_has_an_option(name):
    options = [action.dest for action in PARSERS[name]._actions]
    names = list(option_names(PARSERS[name].get_default('run')))
    assert len(set(names)) == len(names)
    assert sorted(options) == sorted(['help', 'debug', *names])


@pytest.mark.parametrize('name', PARSERS)
def test_the_defaults_are_those_of_the_function(name):
    defaults = option_defaults(PARSERS[name].get_default('run'))
    for action in PARSERS[name]._actions:
        if action.dest not in ('help', 'debug'):
            assert action.required == (action.dest not in defaults), action.dest
            assert action.default == defaults.get(action.dest), action.dest


@pytest.mark.parametrize('name', PARSERS)
def test_an_option_reaches_the_parameter_of_its_name(name):
    "Each option has a value of its own."
    function = PARSERS[name].get_default('run')

    def record(**given):
        return given

    record.__signature__ = inspect.signature(function)
    values = {option: f'value of {option}' for option in option_names(function)}
    given = call_command(record, Namespace(**values))
    assert list(given) == list(inspect.signature(function).parameters)
    received = {}
    for parameter, value in given.items():
        received |= dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {parameter: value}
    assert received == values


def test_every_command_is_a_function_with_few_typed_parameters():
    functions = [getattr(m, name) for m in (subcommands, validation, sites, check, backbones) for name in m.__all__]
    functions += [parts.features, parts.merge, ensemble.ensemble]  # the number of public names is limited
    assert {p.get_default('run') for p in PARSERS.values()} == set(functions)
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        assert 1 < len(parameters) <= 7
        assert all(p.annotation is not p.empty for p in parameters), function


def test_no_command_takes_a_namespace():
    modules = ('subcommands', 'validation', 'sites', 'check', 'parts', 'ensemble', 'backbones', 'shared', 'demo')
    for module in modules:
        text = (Path(arguments.__file__).parent / f'{module}.py').read_text(encoding='utf-8')
        names = {getattr(node, 'id', getattr(node, 'attr', '')) for node in ast.walk(ast.parse(text))}
        assert not names & {'argparse', 'Namespace'}, module


def test_groups_of_options_cannot_be_changed():
    groups = [g for g in vars(arguments).values() if isinstance(g, type) and dataclasses.is_dataclass(g)]
    assert len(groups) == 12
    for group in groups:
        assert group.__dataclass_params__.frozen, group


# ---------------------------------------------------------------- from Python as from the command line


def test_train(output_of_run, run, fundus_data, weights, tmp_path):
    printed = called(
        subcommands.train,
        TableOptions(fundus_data),
        TaskOptions('dr', size=64, seed=3),
        training=TrainingOptions(epochs=1, weights=weights),
        recipe=FAST_RECIPE,
        output=OutputOptions(tmp_path / 'run'),
    )
    assert printed.splitlines()[0] == output_of_run.out.splitlines()[0]
    assert printed.splitlines()[-1] == f'written: {tmp_path / "run"}'
    for name in ('predictions.csv', 'model/model.safetensors'):
        assert (tmp_path / 'run' / name).read_bytes() == (run / name).read_bytes(), name


def test_predict(run, fundus_data, tmp_path):
    assert (
        called(subcommands.predict, run, [fundus_data / 'images']) == good('predict', run, fundus_data / 'images').out
    )
    for i, images in enumerate((fundus_data / 'images', str(fundus_data / 'images'), [fundus_data / 'images'])):
        assert subcommands.predict(str(run), images, tmp_path / f'{i}.csv') == 0
        assert len(pd.read_csv(tmp_path / f'{i}.csv')) == 40
        with pytest.raises(ValueError, match='exists already'):
            subcommands.predict(run, images, tmp_path / f'{i}.csv')
        with pytest.raises(ValueError, match='lies in the data folder'):
            subcommands.predict(run, images, fundus_data / 'images' / 'predictions.csv')
    result = subcommands.predict(run, images, tmp_path / '0.csv', overwrite=True)
    assert result == 0


def test_export(run, fundus_data, tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    file = tmp_path / 'model.onnx'
    assert str(file) in called(subcommands.export, run, file)
    assert called(subcommands.predict, file, fundus_data / 'images').startswith('image,prediction,')


def test_evaluate(run, fundus_data, tmp_path):
    words = ('evaluate', run, fundus_data, '--split', 'valid', '--prevalence', '0.1', '--resamples', '100')
    result = good(*words, '--out', tmp_path / 'a.html')
    report = ReportOptions(tmp_path / 'b.html', prevalence=0.1, resamples=100)
    printed = called(validation.evaluate, run, TableOptions(fundus_data), split='valid', report=report)
    assert printed.replace('b.html', 'a.html').replace('b_predictions', 'a_predictions') == result.out
    assert (tmp_path / 'b_predictions.csv').read_bytes() == (tmp_path / 'a_predictions.csv').read_bytes()


def test_preprocess(fundus_data, tmp_path):
    result = good('preprocess', fundus_data, tmp_path / 'a', '--size', '64', '--to-right', '--format', 'jpg')
    prepared = subcommands.PreparationOptions(64, to_right=True, format='jpg')
    printed = called(subcommands.preprocess, fundus_data, tmp_path / 'b', prepared)
    assert printed.replace(str(tmp_path / 'b'), str(tmp_path / 'a')) == result.out
    assert content(tmp_path / 'b') == content(tmp_path / 'a')


def test_advise(flowers, tmp_path):
    figure = tmp_path / 'a.png'
    printed = called(
        subcommands.advise,
        TableOptions(flowers),
        TaskOptions(size=64),
        SplitOptions(valid=0.3),
        CandidateOptions('test_resnet', weights='random'),
        OutputOptions(figure),
    )
    assert printed.splitlines()[-1] == f'figure: {figure}'
    assert figure.read_bytes().startswith(b'\x89PNG')


def test_cross_validate(fundus_data, tmp_path):
    printed = called(
        validation.cross_validate,
        TableOptions(fundus_data),
        TaskOptions('dr', size=64),
        TrainingOptions(epochs=1, weights='random'),
        FAST_RECIPE,
        FoldOptions(2),
        report=ReportOptions(tmp_path / 'r.html', resamples=100),
        runtime='plain',
    )
    assert printed.splitlines()[-2] == f'report: {tmp_path / "r.html"}'
    result = set(pd.read_csv(tmp_path / 'r_predictions.csv').fold)
    assert result == {1, 2}


def test_compare(flowers, tmp_path):
    printed = called(
        validation.compare,
        TableOptions(flowers),
        TaskOptions(size=64),
        training=TrainingOptions(epochs=1, weights='random'),
        comparison=ComparisonOptions(['test_resnet'], ['head'], metric='accuracy', resamples=100),
        output=OutputOptions(tmp_path / 'c.png'),
    )
    assert 'accuracy, on the same' in printed
    assert 'accuracy' in set(pd.read_csv(tmp_path / 'c_table.csv').metric)


def test_demo(monkeypatch, tmp_path):
    "What it trains is tested on the command line."
    asked = []
    monkeypatch.setattr('dr_transfer.commands.demo.make_demo', lambda *given: asked.append(given) or pd.DataFrame())
    assert str(tmp_path) in called(subcommands.demo, tmp_path, images=40, size=64)
    assert asked == [(tmp_path, 40, 64, 42, 'auto', False)]
