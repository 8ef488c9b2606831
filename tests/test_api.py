"Test the public names of `import dr_transfer as dt`: few, documented, and imported on first use."

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dr_transfer as dt

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, time
start = time.perf_counter()
import dr_transfer as dt
took = time.perf_counter() - start
heavy = {'torch', 'numpy', 'pandas', 'fastai', 'timm', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)
assert not heavy, heavy
assert 'build_learner' in dir(dt) and dt.__version__
assert dt.choose_operating_point.__module__ == 'dr_transfer.metrics.operating_point'
assert 'numpy' in sys.modules and 'torch' not in sys.modules, 'a name brings only what it needs'
print(f'import dr_transfer took {took:.3f} s')
"""


def test_importing_the_package_imports_nothing_heavy():
    "The time is printed but not checked, because it depends on the machine."
    out = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    print(out.stdout)


def test_every_public_name_exists_and_is_documented():
    assert dir(dt) == sorted(dt.__all__)
    assert 45 <= len(dt.__all__) <= 81
    for name in dt.__all__:
        thing = getattr(dt, name)
        assert not callable(thing) or thing.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='build_lerner'):
        _ = dt.build_lerner


def test_the_names_are_those_of_the_modules():
    from dr_transfer.core import build_learner, fit
    from dr_transfer.evaluation.compare import compare

    assert dt.build_learner is build_learner
    assert dt.fit is fit
    assert dt.compare is compare


def test_the_stub_gives_each_name_as_itself():
    "`from .core import fit as fit`: without `as` a type checker takes the name for a private one."
    tree = ast.parse((ROOT / 'dr_transfer' / '__init__.pyi').read_text(encoding='utf-8'))
    names = [a for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert [a.name for a in names if a.asname != a.name] == []
    result = sorted(a.name for a in names)
    assert result == dir(dt)


def test_what_type_checkers_need_is_packaged():
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    for name in ('py.typed', '__init__.pyi'):
        assert (ROOT / 'dr_transfer' / name).exists()
        assert name in setup
        assert name in (ROOT / 'MANIFEST.in').read_text(encoding='utf-8')
