"""Test that the code on pages of the site fits beside the sidebar of a page of 1,100 px, without wrapping.

The limit was measured with chromium: in the font of nbs/styles.css (12.9 px, 7.77 px per character) 89 characters fit
into the code block of a page of 1,100 px. ruff formats the tutorials to this width (`nbs/tutorials/.ruff.toml`).
Most code of the studies is hidden.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 88
PAGES = [
    p
    for folder in ('tutorials', 'studies')
    for p in sorted((ROOT / 'nbs' / folder).glob('*.ipynb'))
    if not p.name.startswith('.')
]
PAGES += [ROOT / 'nbs' / 'index.ipynb', ROOT / 'nbs' / 'api.ipynb']
HIDDEN = re.compile(r'^#\|\s*(hide|echo:\s*false)\b', re.M)
FENCED = re.compile(r'^```[^\n]*\n(.*?)^```', re.M | re.S)


def shown(page):
    "Return the lines of code that the page shows: of its cells, and of code blocks in its text."
    for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            yield from (line for block in FENCED.findall(text) for line in block.splitlines())
        elif not HIDDEN.search(text):
            yield from text.splitlines()


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_no_line_of_shown_code_is_wider_than_the_page(page):
    assert [line for line in shown(page) if len(line) > LONGEST] == []


def test_the_number_is_that_of_ruff_and_of_the_style_sheet():
    assert f'line-length = {LONGEST}' in (ROOT / 'nbs' / 'tutorials' / '.ruff.toml').read_text(encoding='utf-8')
    assert f'{LONGEST} characters fit' in (ROOT / 'nbs' / 'styles.css').read_text(encoding='utf-8')
    assert 'code-overflow: wrap' in (ROOT / '_quarto.yml').read_text(encoding='utf-8')
