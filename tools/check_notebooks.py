"""Check that the notebooks are clean, the library is their export, and README.md the front page, without touching a
file.

nbdev can only do these things, not check them: so they are done in a copy of the project, and the copy is compared.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(folder, pattern):  # {name: text}
    "The files of a folder, without those of editors and checkpoints."
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
        for p in sorted(folder.rglob(pattern))
        if not any(part.startswith('.') for part in p.relative_to(folder).parts)
    }


def compare(was, now, kind):  # list of messages
    "Say what differs between two readings of the same folder."
    return [
        f'{Path(kind, name)}: '
        + ('nothing makes it' if name not in now else 'missing' if name not in was else 'differs')
        for name in sorted(was | now)
        if was.get(name) != now.get(name)
    ]


def report(found, good, bad):  # whether there was nothing to report
    "Print one line when all is well, else one for each file."
    for line in found:
        print(line, file=sys.stderr)
    print(bad if found else good, file=sys.stderr if found else sys.stdout)
    return not found


def main():
    "Clean and export a copy, and compare it."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        shutil.copy(ROOT / 'settings.ini', tmp)
        shutil.copytree(ROOT / 'nbs', tmp / 'nbs', ignore=shutil.ignore_patterns('.*', '_quarto.yml'))
        # Only what nbdev edits in place is copied, so that a module whose notebook is gone is found.
        (tmp / 'dr_transfer').mkdir()
        shutil.copy(ROOT / 'dr_transfer' / '__init__.py', tmp / 'dr_transfer')
        before = files(tmp / 'nbs', '*.ipynb')
        os.chdir(tmp)
        os.environ.pop('IN_TEST', None)  # under it nbdev exports nothing
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export

        sys.path.insert(0, str(ROOT / 'tools'))
        from build_index import build
        from build_readme import readme

        build(tmp / 'nbs')
        nbdev_clean()
        nbdev_export()
        was = ROOT / 'README.md'
        text = {'README.md': was.read_text(encoding='utf-8')} if was.exists() else {}
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
        os.chdir(ROOT)  # a folder cannot be removed everywhere while it is the current one
    return clean and sync


if __name__ == '__main__':
    sys.exit(not main())
