"""Make README.md from `nbs/index.ipynb`, as nbdev would with Quarto: the processed cells as Markdown, with their
outputs.
"""

import base64
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fence(text, lang=''):
    return f'```{lang}\n{text.strip()}\n```'


def output_md(out, name):
    "One stored output: text in a fence, a table as it is, a picture as a file beside the README."
    data = out.get('data', {'text/plain': out.get('text', '')})
    if 'image/png' in data:
        folder = Path('README_files')
        folder.mkdir(exist_ok=True)
        picture = base64.b64decode(''.join(data['image/png']))
        (folder / f'{name}.png').write_bytes(picture)
        return f'![](README_files/{name}.png)'
    for kind in ('text/markdown', 'text/html', 'text/plain'):
        if kind in data:
            break
    text = ''.join(data[kind])
    # pandas sends a style sheet with each table, which GitHub would print
    if kind == 'text/html':
        return re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    return text if kind == 'text/markdown' else fence(text)


def cell_md(cell, front):  # list of paragraphs
    "A cell and its outputs as Markdown; the first one is the front matter."
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
    "Process the notebook of the front page in the project of the current folder and write its cells as Markdown."
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
    # A page of the site is a notebook in the repository: so the links hold in a fork that publishes no site.
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
    # Written only when it changes, so that what depends on it is not built for nothing.
    if not dest.exists() or dest.read_text(encoding='utf-8') != text:
        dest.write_text(text, encoding='utf-8')
