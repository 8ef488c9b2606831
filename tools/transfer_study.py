"""Compare random initialisation, frozen and fine-tuned networks, over the number of images and over the epochs.

    export DR_TRANSFER_DATA=...                 # the folder with flowers/ and dr/
    python tools/transfer_study.py              # hours on two cores; an interrupted run can be resumed
    python tools/transfer_study.py flowers      # one of the studies

    flowers      five classes, 96 pixels, efficientnet_lite0, three splits by photographer
    messidor2    referable or not, 112 pixels, efficientnet_lite0, three splits

The results are written to nbs/results/learning_NAME.csv and training_NAME.csv. The images are small so that a study
takes less than two hours on one core. Learning rates and weight decay are those of the plans. Nothing was chosen on
these images. The study of CT is tools/ct_transfer.py.
"""

import argparse
import os
import time
import warnings
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
SIZES = (25, 50, 100, 250, 600)


def save(runs, name):
    "Write the runs to a file of nbs/results."
    from dr_transfer.utils.places import atomic_file

    with atomic_file(RESULTS / f'{name}.csv') as f:
        runs.round(4).to_csv(f, index=False)


def say(line):
    "Print a line with the time of day."
    print(time.strftime('%H:%M'), line, flush=True)


def study(root, name, task, size, epochs):
    "Compute the learning curve of a set, and the error over the epochs of some methods."
    from dr_transfer.evaluation.experiments import learning_curve, training_curve

    how = dict(size=size, arch='efficientnet_lite0', runtime='channels_last', say=say)
    save(learning_curve(root, task, SIZES, seeds=3, **how), f'learning_{name}')
    if epochs:
        save(
            pd.concat([training_curve(root, task, n, r, images=SIZES[-1], **how) for r, n in epochs.items()]),
            f'training_{name}',
        )


def flowers(root):
    "Study the flowers."
    study(
        root / 'flowers', 'flowers', 'flowers', 96, {'random initialisation': 60, 'fine-tuned': 20}
    )  # to see whether random initialisation needs more epochs


def messidor2(root):
    "Study referable retinopathy on Messidor-2."
    study(root / 'dr' / 'messidor2', 'messidor2', 'dr', 112, {})


STUDIES = {'flowers': flowers, 'messidor2': messidor2}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('studies', nargs='*', metavar='NAME', help=', '.join(STUDIES))
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    root = Path(
        os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with flowers/ and dr/')
    )
    for s in a.studies or STUDIES:
        STUDIES[s](root)
