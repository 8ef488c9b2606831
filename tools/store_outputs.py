"""Run notebooks and store their outputs: `make outputs`, or `make outputs NB=nbs/synthetic/03_fundus.ipynb`.

All cells are run, also those with the flag `slow`. Cells with `eval: false`, and cells with `cuda` on a machine
without CUDA, are not run and keep their outputs.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def has_cuda():
    "Return whether CUDA is available; torch is imported only for notebooks with `cuda` cells."
    import torch

    return torch.cuda.is_available()


def run(path):
    "Run one notebook in this process and write it; after an error nothing is written."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.process import extract_directives

    path = Path(path).resolve()
    nb, shell = read_nb(path), CaptureShell(path, mpl_format='png')

    def skip(cell):
        if cell.cell_type != 'code':
            return True
        flags = extract_directives(cell, remove=False)
        kept = ('cuda' in flags and not has_cuda()) or flags.get('eval:', [''])[0].lower() == 'false'
        if kept:
            print(f'  {path.name}: not run, outputs kept: {cell.source.splitlines()[0]}')
        else:
            cell.outputs = []
        return kept

    def tidy(cell):
        # Warnings and progress bars go to stderr and differ between machines and versions.
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        # IPython shows a PIL image as PNG and as JPEG; one is enough.
        for o in cell.outputs:
            if 'image/png' in o.get('data', {}):
                o['data'].pop('image/jpeg', None)

    os.chdir(path.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=skip, postproc=tidy)
    except Exception:
        sys.exit(shell.prettytb(fname=path.name))
    write_nb(nb, path)


def main(paths):
    "Run each notebook in a separate process."
    os.chdir(ROOT)
    paths = paths or sorted(str(p) for p in Path('nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    # Stored outputs show synthetic images, and never photographs of this machine.
    env = {k: v for k, v in os.environ.items() if k != 'DR_TRANSFER_DATA'}
    for path in paths:
        print(path, flush=True)
        subprocess.run([sys.executable, __file__, '--one', path], env=env, check=True)


if __name__ == '__main__':
    try:
        run(sys.argv[2]) if sys.argv[1:2] == ['--one'] else main(sys.argv[1:])
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
