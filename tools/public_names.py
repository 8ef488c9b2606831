"""List the public names of the library by module, and count them.

A name is public if the `__all__` of its module contains it. nbdev writes `__all__` from the cells under `#| export`;
names that begin with an underscore are not included. Names that only other modules of the library need are defined
under `#| exporti`.

    python tools/public_names.py              # one line for each module, then the total
    python tools/public_names.py --most 200   # exit code 1 if there are more than 200
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def all_assignment(tree: ast.Module) -> ast.Assign | None:
    "Return the statement that assigns `__all__` in a module, or None."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return node
    return None


def public_names(text: str) -> list[str]:
    "Return the names in `__all__` of a module, given its source code."
    node = all_assignment(ast.parse(text))
    return [] if node is None else ast.literal_eval(node.value)


def library_names(root=ROOT) -> dict[str, list[str]]:
    "Return the public names by module, for all modules that have any."
    names_of = {}
    for path in sorted((root / 'dr_transfer').rglob('*.py')):
        names = public_names(path.read_text(encoding='utf-8'))
        if names:
            names_of['.'.join(path.relative_to(root).with_suffix('').parts)] = names
    return names_of


def main() -> int:
    "Print the public names of each module and their number."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--most', type=int, help='exit with 1 if there are more public names')
    args = parser.parse_args()
    names_of = library_names()
    for module, names in names_of.items():
        print(f'{module}: {", ".join(names)}')
    total = sum(map(len, names_of.values()))
    print(f'{total} public names in {len(names_of)} modules')
    return int(args.most is not None and total > args.most)


if __name__ == '__main__':
    sys.exit(main())
