"""Build the documentation site into `_docs/`, with Quarto if it is installed, else with smalldocs from PyPI.

The command of nbdev calls Quarto, and tries to install it as root if it is missing. So only the first half of the
command is used: `proc_nbs` runs the cells that the documentation needs and writes the pages to `_proc/`. A copy of
them is prepared in `build/site/`, so that both renderers give the same addresses, and is rendered there.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Quarto finds no pages in a folder whose name begins with a dot (quarto-cli#3186).
PROC = Path('_proc')
STAGE = Path('build/site')
SITE = Path('_docs')
# `05_backbones.ipynb` has a number that orders the files of the folder; its page is `backbones.html`.
NUMBERED = re.compile(r'\d+[a-zA-Z0-9]*_(?=[\w-]+\.ipynb)')
# The same in a link in Markdown or HTML, after the folders of the path.
LINK = re.compile(r'((?:\]\(|href=\\?["\'])(?:[\w.-]+/)*)\d+[a-zA-Z0-9]*_(?=[\w-]+\.ipynb)')

# nbdev also links names between backticks in the comments of a signature, where Markdown is not rendered.
CODE = re.compile(r'```python\\n.*?```', re.S)
LINKED = re.compile(r'\[(`[^`\]]+`)\]\(([^)\s]+)\)')
# nbdev links a name in the text of a link too, which Markdown does not allow: the text of a link, then `](`.
OUTER = re.compile(rf'\[((?:[^\[\]\n]|{LINKED.pattern})+)\]\(')
PUBLIC = re.compile(r'^from \.(\S+) import (\w+) as \2$', re.M)


def process(workers):
    "Update `_proc/` with nbdev; all pages if a name was added or removed, because pages link to one another."
    from nbdev.serve import proc_nbs

    index = Path('dr_transfer/_modidx.py')
    last = Path('build/modidx.py')
    start = time.time()
    names = index.read_text(encoding='utf-8') if index.exists() else ''
    changed = not last.exists() or last.read_text(encoding='utf-8') != names
    proc_nbs('nbs', n_workers=workers, force=changed)
    # A notebook that was edited while nbdev ran must be newer than its page.
    for made in [PROC, *PROC.rglob('*.ipynb')]:
        if made.stat().st_mtime > start:
            os.utime(made, (start, start))
    last.parent.mkdir(exist_ok=True)
    last.write_text(names, encoding='utf-8')


def hidden_names() -> set[str]:
    "Return the addresses, such as `table.html#some`, of names that are not public and that no page describes."
    sys.path.insert(0, str(ROOT / 'tools'))
    from public_names import library_names

    d = runpy.run_path(str(ROOT / 'dr_transfer' / '_modidx.py'))['d']
    public = {f'{module}.{name}' for module, names in library_names(ROOT).items() for name in names}
    return {
        where
        for module, names in d['syms'].items()
        for name, (where, _) in names.items()
        # `module.Class.method` belongs to `module.Class`
        if module + '.' + name.removeprefix(module + '.').split('.')[0] not in public
    }


def public_addresses() -> dict[str, str]:
    "Return the address, such as `training/advisor.html#advise`, of each public name: a command may have the same name."
    symbols = runpy.run_path(str(ROOT / 'dr_transfer' / '_modidx.py'))['d']['syms']
    stub = (ROOT / 'dr_transfer' / '__init__.pyi').read_text(encoding='utf-8')
    return {
        name: symbols[f'dr_transfer.{module}'][f'dr_transfer.{module}.{name}'][0]
        for module, name in PUBLIC.findall(stub)
        if f'dr_transfer.{module}.{name}' in symbols[f'dr_transfer.{module}']
    }


def unnest(text: str) -> str:
    "Remove the links that nbdev made within the text of a link."

    def plain(m):
        words = LINKED.sub(r'\1', m[1])
        return f'[{words}]('

    return OUTER.sub(plain, text)


def correct_links(text: str, home: str, hidden: set[str], public: dict[str, str], page: str) -> str:
    "Correct the links that nbdev made: none to names that no page describes, nor to a command for a public name."

    def link(m):
        name, address = m[1], m[2]
        if not address.startswith(home):
            return m[0]  # written by a person
        where = address.removeprefix(home)
        if where in hidden:
            return name
        right = public.get(name.strip('`'))
        on_this_page = where.partition('#')[0] == page
        return m[0] if right is None or on_this_page else f'[{name}]({home}{right})'

    return LINKED.sub(link, unnest(text))


def stage():
    "Copy `_proc/` to the staging folder under the names of the pages, with relative links."
    from nbdev.config import get_config

    cfg = get_config()
    address = cfg.doc_host + cfg.doc_baseurl + '/'
    home = re.compile(r'(\]\(|href=\\?["\'])' + re.escape(address))
    hidden = hidden_names()
    public = public_addresses()
    shutil.rmtree(STAGE, ignore_errors=True)
    for src in sorted(PROC.rglob('*')):
        name = src.relative_to(PROC)
        # `_proc/` may contain pages of notebooks that were deleted.
        if not src.is_file() or not (Path('nbs') / name).exists():
            continue
        dest = STAGE / name
        dest.parent.mkdir(parents=True, exist_ok=True)
        if name.suffix == '.ipynb':
            # nbdev names the page in the front matter, which only Quarto reads; renaming the file works for both
            text = re.sub(r'^\s*"output-file: .*\n', '', src.read_text(encoding='utf-8'), flags=re.M)
            page = NUMBERED.sub('', name.as_posix()).replace('.ipynb', '.html')
            text = correct_links(text, address, hidden, public, page)
            text = LINK.sub(r'\1', text)
            text = home.sub(r'\1' + '../' * (len(name.parts) - 1), text)
            text = CODE.sub(lambda m: LINKED.sub(r'\1', m[0]), text)
            dest.with_name(NUMBERED.sub('', name.name)).write_text(text, encoding='utf-8')
        elif name.name == '_quarto.yml':
            dest.write_text(NUMBERED.sub('', src.read_text(encoding='utf-8')), encoding='utf-8')
        else:
            shutil.copy2(src, dest)


def render():
    "Render the staged pages; a warning of the renderer fails the build."
    if shutil.which('quarto'):
        commands = [['quarto', 'render', str(STAGE), '--no-execute']]
    else:
        commands = [[sys.executable, '-m', 'smalldocs.cli', step, str(STAGE)] for step in ('check', 'render')]
    for command in commands:
        subprocess.run(command, check=True)


def main():
    "Build the site, and replace the old one only if all links are good."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2, help='notebooks to process at the same time')
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.time()
    process(args.workers)
    stage()
    render()
    subprocess.run([sys.executable, 'tools/check_links.py', str(STAGE / SITE)], check=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / SITE, SITE)
    # The site is as old as its sources were when they were read, so later edits are built next time.
    os.utime(SITE / 'index.html', (start, start))


# The worker processes of nbdev import this file.
if __name__ == '__main__':
    try:
        main()
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
