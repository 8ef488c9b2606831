"""Measure how dense the code is: syntax-tree nodes per line of code, and lines of more than 120 characters.

Context nodes (`Load`, `Store`), operators, blank lines, comments and docstrings are not counted. For comparison,
counted in the same way: fastai has 6.4 nodes per line, timm 4.3, scikit-learn 3.3.

    python tools/code_density.py            # print both for the library, the tests and the tools
    python tools/code_density.py --most 7   # exit code 1 if there are more than 7, or if a line is too long
"""

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

from public_names import all_assignment

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 120
NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
NOT_COUNTED = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree) -> set:
    "Return the line numbers of all docstrings."
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, WITH_DOCSTRING) or ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def count(text: str) -> tuple[int, int, int]:
    "Count the nodes, the lines of code and the lines that are too long."
    tree = ast.parse(text)
    counted = [n for n in ast.walk(tree) if not isinstance(n, NOT_COUNTED)]
    nodes = len(counted)
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in NOT_CODE:
            continue
        first, _ = token.start
        last, _ = token.end
        code |= set(range(first, last + 1))
    code -= docstring_lines(tree)
    names = all_assignment(tree)  # nbdev writes it in one line
    generated = set(range(names.lineno, names.end_lineno + 1)) if names else set()
    long = sum(len(line) > LONGEST and i not in generated for i, line in enumerate(text.splitlines(), 1))
    return nodes, len(code), long


def words(nodes, lines, long) -> str:
    "Return the counts as a line of text."
    density = nodes / lines
    return f'{density:5.2f} nodes per line, {lines:6} lines, {long} of more than {LONGEST} characters'


def print_files(counts):
    "Print a line for each file, the densest first."
    density = {path: nodes / max(lines, 1) for path, (nodes, lines, _) in counts.items()}
    for path in sorted(density, key=density.get, reverse=True):
        _, lines, long = counts[path]
        print(f'    {path.relative_to(ROOT)!s:50} {density[path]:5.2f} {lines:5} {long}')


def main() -> int:
    "Print a line for each part of the repository."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--most', type=float, help='exit with 1 if there are more nodes per line')
    parser.add_argument('--files', action='store_true', help='print each file as well')
    args = parser.parse_args()
    bad = False
    for part in ('dr_transfer', 'tests', 'tools'):
        counts = {}
        for path in sorted((ROOT / part).rglob('*.py')):
            if path.name != '_modidx.py':
                counts[path] = count(path.read_text(encoding='utf-8'))
        nodes, lines, long = (sum(c) for c in zip(*counts.values(), strict=True))
        print(f'{part:12} {words(nodes, lines, long)}')
        if args.most is not None:
            bad |= nodes / lines > args.most or long > 0
        if args.files:
            print_files(counts)
    return int(bad)


if __name__ == '__main__':
    sys.exit(main())
