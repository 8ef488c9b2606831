"""How dense the code is: syntax-tree nodes a line of code, and lines of more than 120 characters.

Context nodes (`Load`, `Store`) and operators are not counted, nor are blank lines, comments and docstrings. For
comparison, counted in the same way: fastai 6.4 nodes a line, timm 4.3, scikit-learn 3.3.

    python tools/code_density.py            # prints both for the library, the tests and the tools
    python tools/code_density.py --most 7   # exit code 1 where there are more, or where a line is longer
"""

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

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
    "The lines of all docstrings."
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, WITH_DOCSTRING) or ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def count(text: str) -> tuple[int, int, int]:
    "Nodes, lines of code and lines that are too long, of a module."
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
    names = next((n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__'), None)
    written = set(range(names.lineno, names.end_lineno + 1)) if names else set()
    long = sum(len(line) > LONGEST and i not in written for i, line in enumerate(text.splitlines(), 1))
    return nodes, len(code), long


def words(nodes, lines, long) -> str:
    "What was counted, in words."
    density = nodes / lines
    return f'{density:5.2f} nodes a line, {lines:6} lines, {long} of more than {LONGEST} characters'


def print_files(counts):
    "A line for each file, the densest first."
    density = {path: nodes / max(lines, 1) for path, (nodes, lines, _) in counts.items()}
    for path in sorted(density, key=density.get, reverse=True):
        _, lines, long = counts[path]
        print(f'    {path.relative_to(ROOT)!s:50} {density[path]:5.2f} {lines:5} {long}')


def main() -> int:
    "Print a line for each part of the repository."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--most', type=float, help='nodes a line that are allowed')
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
