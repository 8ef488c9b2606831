"""Check that the notebooks are clean and that the library and README.md are in sync with them; no file is changed.

nbdev cleans and exports, but cannot check. So both are done in a copy of the project, which is then compared.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(folder, pattern):  # {name: text}
    "Return the texts of the files of a folder by path, without hidden files and checkpoints."
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
        for p in sorted(folder.rglob(pattern))
        if not any(part.startswith('.') for part in p.relative_to(folder).parts)
    }


def difference(name, old, new):
    "Return the reason why a file differs between two folders."
    if name not in new:
        return 'no notebook exports it'
    return 'differs' if name in old else 'missing'


def compare(old, new, folder):  # list of messages
    "Return a message for each file that differs between two versions of a folder."
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return [f'{Path(folder, name)}: {difference(name, old, new)}' for name in changed]


def report(messages, good, bad):  # whether there are no messages
    "Print the messages and a summary."
    for line in messages:
        print(line, file=sys.stderr)
    print(bad if messages else good, file=sys.stderr if messages else sys.stdout)
    return not messages


def main():
    "Clean and export a copy of the project, and compare it."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        shutil.copy(ROOT / 'settings.ini', tmp)
        shutil.copytree(ROOT / 'nbs', tmp / 'nbs', ignore=shutil.ignore_patterns('.*', '_quarto.yml'))
        # Only the file that nbdev edits in place is copied, so that a module without a notebook is found.
        (tmp / 'dr_transfer').mkdir()
        shutil.copy(ROOT / 'dr_transfer' / '__init__.py', tmp / 'dr_transfer')
        before = files(tmp / 'nbs', '*.ipynb')
        os.chdir(tmp)
        os.environ.pop('IN_TEST', None)  # nbdev exports nothing if it is set
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export

        sys.path.insert(0, str(ROOT / 'tools'))
        from build_index import build
        from build_readme import readme

        build(tmp / 'nbs')
        nbdev_clean()
        nbdev_export()
        page = ROOT / 'README.md'
        text = {'README.md': page.read_text(encoding='utf-8')} if page.exists() else {}
        clean = report(
            compare(before, files(tmp / 'nbs', '*.ipynb'), 'nbs'),
            'notebooks are clean',
            'notebooks are not clean: run make prepare',
        )
        sync = report(
            compare(files(ROOT / 'dr_transfer', '*.py'), files(tmp / 'dr_transfer', '*.py'), 'dr_transfer')
            + compare(text, {'README.md': readme()}, '.'),
            'library and README are in sync',
            'library or README is out of sync: run make prepare',
        )
        os.chdir(ROOT)  # on some systems the current folder cannot be removed
    return clean and sync


if __name__ == '__main__':
    sys.exit(not main())
