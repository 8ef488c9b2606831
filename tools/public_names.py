"""The public names of the library: how many there are, and which module has them.

A name is public when it stands in the `__all__` of its module: nbdev writes there what a cell under `#| export` defines
and does not begin with an underscore. What only other modules of the library need is defined under `#| exporti`.

    python tools/public_names.py              # one line for each module, and the sum
    python tools/public_names.py --most 200   # exit code 1 where there are more
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def public_names(text: str) -> list[str]:
    "What stands in `__all__` of a module."
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return ast.literal_eval(node.value)
    return []


def library_names(root=ROOT) -> dict[str, list[str]]:
    "Module -> its public names, for all modules that have any."
    found = {}
    for path in sorted((root / 'dr_transfer').rglob('*.py')):
        names = public_names(path.read_text(encoding='utf-8'))
        if names:
            found['.'.join(path.relative_to(root).with_suffix('').parts)] = names
    return found


def main() -> int:
    "Print the names of each module, and how many there are."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--most', type=int, help='public names that are allowed')
    args = parser.parse_args()
    found = library_names()
    for module, names in found.items():
        print(f'{module}: {", ".join(names)}')
    total = sum(map(len, found.values()))
    print(f'{total} public names in {len(found)} modules')
    return int(args.most is not None and total > args.most)


if __name__ == '__main__':
    sys.exit(main())
