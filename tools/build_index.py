"""Write the table of modules on the page of each package, from the summaries of the notebooks."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = '| module | what it holds |\n|---|---|\n'


def source(cell):
    return ''.join(cell['source'])


def row(path):  # a row of the table; '' for a notebook that exports nothing
    "Return the name of a module with the summary of its notebook."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    summary = re.search(r'^> (.*)', source(cells[0]), re.M)
    if not summary or not any(source(c).startswith('#| default_exp') for c in cells):
        return ''
    name = path.stem.partition('_')[2].replace('_', ' ')
    return f'| [{name}]({path.name}) | {summary[1]} |'


def build(nbs):
    "Write the table of modules at the end of each package's page, if it has changed."
    for index in sorted(nbs.glob('*/index.ipynb')):
        notebook = json.loads(index.read_text(encoding='utf-8'))
        cell = next((c for c in notebook['cells'] if HEADER in source(c)), None)
        if cell is None:
            raise SystemExit(f'{index}: no cell contains the table of modules. Add a cell with the lines {HEADER!r}')
        before, _, after = source(cell).partition(HEADER)
        after = re.sub(r'\A(\|.*\n?)*', '', after)
        rows = [row(path) for path in sorted(index.parent.glob('*.ipynb')) if path != index]
        text = before + HEADER + '\n'.join([*filter(None, rows), *filter(None, [after])])
        if text != source(cell):
            cell['source'] = text.splitlines(keepends=True)
            index.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__':
    build(ROOT / 'nbs')
