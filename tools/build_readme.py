"""Write README.md from `nbs/index.ipynb`, as nbdev does with Quarto: the cells as Markdown, with their outputs."""

import base64
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fence(text, lang=''):
    "Return text as a fenced code block."
    return f'```{lang}\n{text.strip()}\n```'


def output_md(out, name):
    "Return a stored output as Markdown; an image is written to a file beside the README."
    data = out.get('data', {'text/plain': out.get('text', '')})
    if 'image/png' in data:
        folder = Path('README_files')
        folder.mkdir(exist_ok=True)
        image = base64.b64decode(''.join(data['image/png']))
        (folder / f'{name}.png').write_bytes(image)
        return f'![](README_files/{name}.png)'
    for kind in ('text/markdown', 'text/html', 'text/plain'):
        if kind in data:
            break
    text = ''.join(data[kind])
    # pandas adds a style sheet to each table, which GitHub would show as text
    if kind == 'text/html':
        return re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    return text if kind == 'text/markdown' else fence(text)


def cell_md(cell, front):  # list of paragraphs
    "Return a cell and its outputs as Markdown; the first cell is the front matter."
    if cell.cell_type == 'markdown':
        return [cell.source.strip()]
    if cell.cell_type == 'raw':
        summary = [f'> {front["description"]}'] if 'description' in front else []
        return [f'# {front["title"]}', *summary]
    outputs = [output_md(out, f'{cell.id}-{i}') for i, out in enumerate(cell.outputs)]
    lines = [line for line in cell.source.splitlines() if not line.startswith('#|')]
    code = '\n'.join(lines)
    if code.strip() and '#| echo: false' not in cell.source:
        return [fence(code, 'python'), *outputs]
    return outputs


def readme():  # the text of README.md
    "Return the front page as Markdown, from the notebook of the project in the current folder."
    from execnb.nbio import read_nb
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults

    cfg = get_config()
    nb = read_nb(cfg.nbs_path / cfg.readme_nb)
    FilterDefaults()(nb)
    front = getattr(nb, 'frontmatter_', {})
    parts = []
    for cell in nb.cells:
        parts += cell_md(cell, front)
    text = '\n\n'.join(p.strip() for p in parts if p.strip()) + '\n'
    # Links to pages of the site become links to the notebooks, so they also work in a fork without a site.
    home = re.escape(cfg.doc_host + cfg.doc_baseurl)
    for p in sorted(Path(cfg.nbs_path).rglob('*.ipynb')):
        rel = p.relative_to(cfg.nbs_path)
        page = rel.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', rel.name)).with_suffix('.html')
        pages = f'{re.escape(page.as_posix())}|{re.escape(rel.as_posix())}'
        text = re.sub(
            rf'\]\((?:{home}/)?(?:{pages})(?:#[^)]*)?\)',
            f'](nbs/{rel.as_posix()})',
            text,
        )
    return text


if __name__ == '__main__':
    os.chdir(ROOT)
    text, dest = readme(), Path('README.md')
    # Written only if it has changed, so that nothing is rebuilt without a reason.
    if not dest.exists() or dest.read_text(encoding='utf-8') != text:
        dest.write_text(text, encoding='utf-8')
