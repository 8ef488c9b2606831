"""Run notebooks from top to bottom and keep what they put out: `make outputs`, or `make outputs
NB=nbs/synthetic/01_fundus.ipynb`.

Nothing is skipped, whatever its flags, except what cannot run: cells marked `eval: false`, and `cuda` cells on a
machine without one, which keep the outputs they have.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def has_cuda():
    "Whether this machine can run `cuda` cells; most notebooks have none and need no torch for this."
    import torch

    return torch.cuda.is_available()


def run(path):
    "Run one notebook in this process and write it back; at the first error nothing is written."
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
        # Warnings and bars go to stderr and differ from one machine and version to the next.
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        # An image of PIL puts itself out twice, as PNG and as JPEG; one is enough.
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
    "Run each notebook in a process of its own, since a notebook is read on its own."
    os.chdir(ROOT)
    paths = paths or sorted(str(p) for p in Path('nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    # Stored outputs show the images drawn from a seed, never a photograph that happens to lie on this machine.
    env = {k: v for k, v in os.environ.items() if k != 'DR_TRANSFER_DATA'}
    for path in paths:
        print(path, flush=True)
        subprocess.run([sys.executable, __file__, '--one', path], env=env, check=True)


if __name__ == '__main__':
    try:
        run(sys.argv[2]) if sys.argv[1:2] == ['--one'] else main(sys.argv[1:])
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
