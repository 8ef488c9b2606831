"""Build the documentation site into `_docs/`: with Quarto where it is installed, else with smalldocs from PyPI.

nbdev's own command calls Quarto and, where it is missing, tries to install it as root. So only its first half is
used here: `proc_nbs` runs what the documentation of each notebook needs and leaves the pages in `_proc/`. A copy of
them is prepared in `build/site/` so that either renderer makes the same addresses, and is rendered there.
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
# Quarto finds no page below a folder whose name begins with a dot (quarto-cli#3186).
PROC = Path('_proc')
STAGE = Path('build/site')
SITE = Path('_docs')
# `05_backbones.ipynb` is numbered for the reader of the folder; its page is `backbones.html`.
NUMBERED = re.compile(r'\d+[a-zA-Z0-9]*_(?=[\w-]+\.ipynb)')
# The same name as a link in Markdown or HTML, with the folders before it.
LINK = re.compile(r'((?:\]\(|href=\\?["\'])(?:[\w.-]+/)*)\d+[a-zA-Z0-9]*_(?=[\w-]+\.ipynb)')

# nbdev links names between backticks in the comments of a signature as well, where Markdown is not read.
CODE = re.compile(r'```python\\n.*?```', re.S)
LINKED = re.compile(r'\[(`[^`\]]+`)\]\(([^)\s]+)\)')


def process(workers):
    "Let nbdev bring `_proc/` up to date; all of it when a name appeared or went, since every page links to the others."
    from nbdev.serve import proc_nbs

    index = Path('dr_transfer/_modidx.py')
    seen = Path('build/modidx.py')
    start = time.time()
    names = index.read_text(encoding='utf-8') if index.exists() else ''
    changed = not seen.exists() or seen.read_text(encoding='utf-8') != names
    proc_nbs('nbs', n_workers=workers, force=changed)
    # What was edited while nbdev was at work must count as newer than what nbdev made of it.
    for made in [PROC, *PROC.rglob('*.ipynb')]:
        if made.stat().st_mtime > start:
            os.utime(made, (start, start))
    seen.parent.mkdir(exist_ok=True)
    seen.write_text(names, encoding='utf-8')


def hidden_names() -> set[str]:
    "Addresses such as `table.html#some` of the names that are not public, so that no page describes them."
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


def unlink(text: str, home: str, hidden: set[str]) -> str:
    "nbdev links every name between backticks that it knows: what no page describes stays plain code."
    return LINKED.sub(lambda m: m[1] if m[2].removeprefix(home) in hidden else m[0], text)


def stage():
    "Copy `_proc/` to the staging folder under the names of the pages, with links that hold wherever they are served."
    from nbdev.config import get_config

    cfg = get_config()
    address = cfg.doc_host + cfg.doc_baseurl + '/'
    home = re.compile(r'(\]\(|href=\\?["\'])' + re.escape(address))
    hidden = hidden_names()
    shutil.rmtree(STAGE, ignore_errors=True)
    for src in sorted(PROC.rglob('*')):
        name = src.relative_to(PROC)
        # A page outlives its notebook in `_proc/`; it must not outlive it in the site.
        if not src.is_file() or not (Path('nbs') / name).exists():
            continue
        dest = STAGE / name
        dest.parent.mkdir(parents=True, exist_ok=True)
        if name.suffix == '.ipynb':
            # nbdev names the page in its front matter, for Quarto; here the file is renamed, for both
            text = re.sub(r'^\s*"output-file: .*\n', '', src.read_text(encoding='utf-8'), flags=re.M)
            text = unlink(text, address, hidden)
            text = LINK.sub(r'\1', text)
            text = home.sub(r'\1' + '../' * (len(name.parts) - 1), text)
            text = CODE.sub(lambda m: LINKED.sub(r'\1', m[0]), text)
            dest.with_name(NUMBERED.sub('', name.name)).write_text(text, encoding='utf-8')
        elif name.name == '_quarto.yml':
            dest.write_text(NUMBERED.sub('', src.read_text(encoding='utf-8')), encoding='utf-8')
        else:
            shutil.copy2(src, dest)


def render():
    "Render the staged pages; whatever the renderer complains of fails the build."
    if shutil.which('quarto'):
        commands = [['quarto', 'render', str(STAGE), '--no-execute']]
    else:
        commands = [[sys.executable, '-m', 'smalldocs.cli', step, str(STAGE)] for step in ('check', 'render')]
    for command in commands:
        subprocess.run(command, check=True)


def main():
    "Build the site, and put it in place only when its links are good."
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
    # As old as its sources were when they were read: what was edited meanwhile is newer, and is built next time.
    os.utime(SITE / 'index.html', (start, start))


# nbdev's workers import this file again, so nothing may run outside of the guard.
if __name__ == '__main__':
    try:
        main()
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
