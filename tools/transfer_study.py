"""Does transfer help, and from how many images on not any more? Random start, frozen and fine-tuned over five sizes,
and over the epochs.

    export DR_TRANSFER_DATA=...                 # the folder with flowers/ and dr/
    python tools/transfer_study.py              # hours on two cores; goes on where it was stopped
    python tools/transfer_study.py flowers ct   # some of it

    flowers      five classes, 96 pixels, efficientnet_lite0, three splits by photographer
    messidor2    referable or not, 112 pixels, efficientnet_lite0, three splits
    ct           the CAD study in miniature: CifarNet, AlexNet and GoogLeNet on drawn lymph nodes, 64 pixels, three
                 splits; from random weights, and pretrained
                 here on the flowers, since their ImageNet weights are not at hand

Results are kept in nbs/results/learning_NAME.csv and training_NAME.csv. The pixels are few so that a study takes
less than two hours on one core; rates and decays are those of the plans and were not chosen on these images. Nothing
is chosen by the unseen images either.
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
SIZES = (25, 50, 100, 250, 600)


def keep(runs, name):
    from dr_transfer.utils.places import atomic_file

    with atomic_file(RESULTS / f'{name}.csv') as f:
        runs.round(4).to_csv(f, index=False)


def say(line):
    print(time.strftime('%H:%M'), line, flush=True)


def study(root, name, task, size, epochs):
    "The learning curve of a set, and the error over the epochs of some rivals"
    from dr_transfer.evaluation.experiments import learning_curve, training_curve

    how = dict(size=size, arch='efficientnet_lite0', runtime='channels_last', say=say)
    keep(learning_curve(root, task, SIZES, seeds=3, **how), f'learning_{name}')
    if epochs:
        keep(
            pd.concat([training_curve(root, task, n, r, images=SIZES[-1], **how) for r, n in epochs.items()]),
            f'training_{name}',
        )


def flowers(root):
    study(
        root / 'flowers', 'flowers', 'flowers', 96, {'random initialisation': 60, 'fine-tuned': 20}
    )  # does random initialisation want more epochs?


def messidor2(root):
    study(root / 'dr' / 'messidor2', 'messidor2', 'dr', 112, {})


def pretrain(root, arch, folder, rates=(1e-3, 3e-3)):
    "A file with weights trained on the flowers, and the better of two rates there, that of random initialisation on CT"
    from dr_transfer.core import build_learner, fit
    from dr_transfer.models.backbones import save_weights
    from dr_transfer.training.plans import Phase, Plan

    best = None
    for lr in rates:
        plan = Plan(f'pretrain_{lr}', (Phase(0, 10, lr, wd=0.05, fixed_bn=False),), weights='random')
        learn = fit(
            build_learner(root / 'flowers', 'flowers', arch=arch, size=64, plan=plan, runtime='channels_last'),
            say=lambda line: None,
        )
        score = learn.record.history[-1]['accuracy']
        say(f'{arch} on the flowers, rate {lr}: accuracy {score:.3f}')
        if best is None or score > best[0]:
            best = score, lr, save_weights(learn.model[0][0].stages, Path(folder) / f'{arch}.safetensors')
    return best


def ct(root):
    from dr_transfer.data.ct_images import candidate_images
    from dr_transfer.evaluation.experiments import BASELINE, METHODS, learning_curve, training_curve
    from dr_transfer.synthetic.ct import make_ct
    from dr_transfer.training.plans import Phase, Plan

    curves, errors = [], []
    with tempfile.TemporaryDirectory() as d:
        make_ct(f'{d}/ct', n=100, seed=77)
        pictures = candidate_images(f'{d}/ct/candidates.csv', f'{d}/ct', f'{d}/pictures', size=64)
        say(f'{len(pictures)} candidates drawn')
        for arch in ('cifarnet', 'alexnet', 'googlenet'):
            score, lr, weights = pretrain(root, arch, d)
            methods = {
                **METHODS,
                BASELINE: Plan('random_start', (Phase(0, None, lr, wd=0.05, fixed_bn=False),), weights='random'),
            }
            how = dict(task='ct_nodes', size=64, arch=arch, weights=weights, runtime='channels_last', say=say)
            about = dict(arch=arch, source='flowers', source_accuracy=score, rate=lr)
            curves.append(
                learning_curve(f'{d}/pictures', sizes=(60, 200, 600), methods=methods, seeds=3, **how).assign(**about)
            )
            errors.append(
                training_curve(
                    f'{d}/pictures',
                    epochs=20,
                    images=600,
                    methods={k: v for k, v in methods.items() if k != 'frozen'},
                    **how,
                ).assign(**about)
            )
            keep(pd.concat(curves), 'learning_ct'), keep(pd.concat(errors), 'training_ct')


STUDIES = {'flowers': flowers, 'messidor2': messidor2, 'ct': ct}

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
