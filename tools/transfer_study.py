"""Compare random initialisation, frozen and fine-tuned networks, over the number of images and over the epochs.

    export DR_TRANSFER_DATA=...                 # the folder with flowers/ and dr/
    python tools/transfer_study.py              # hours on two cores; an interrupted run can be resumed
    python tools/transfer_study.py flowers ct   # some of the studies

    flowers      five classes, 96 pixels, efficientnet_lite0, three splits by photographer
    messidor2    referable or not, 112 pixels, efficientnet_lite0, three splits
    ct           a small version of the study of Shin et al. (2016): CifarNet, AlexNet and GoogLeNet on synthetic lymph
                 nodes, 64 pixels, three splits; from random initialisation, and pretrained on the flowers, because
                 ImageNet weights of these networks are not included

The results are written to nbs/results/learning_NAME.csv and training_NAME.csv. The images are small so that a study
takes less than two hours on one core. Learning rates and weight decay are those of the plans. Nothing was chosen on
these images, except the learning rate for random initialisation in `ct`, which is chosen on the flowers.
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


def pretrain(root, arch, folder, rates=(1e-3, 3e-3)):
    "Train on the flowers with each learning rate; return the best accuracy, its learning rate and the weights file."
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
        say(f'{arch} on the flowers, learning rate {lr}: accuracy {score:.3f}')
        if best is None or score > best[0]:
            best = score, lr, save_weights(learn.model[0][0].stages, Path(folder) / f'{arch}.safetensors')
    return best


def ct(root):
    "Study synthetic lymph nodes with three networks that are pretrained on the flowers."
    from dr_transfer.data.ct_images import candidate_images
    from dr_transfer.evaluation.experiments import BASELINE, METHODS, learning_curve, training_curve
    from dr_transfer.synthetic.ct import make_ct
    from dr_transfer.training.plans import Phase, Plan

    curves, errors = [], []
    with tempfile.TemporaryDirectory() as d:
        make_ct(f'{d}/ct', n=100, seed=77)
        images = candidate_images(f'{d}/ct/candidates.csv', f'{d}/ct', f'{d}/images', size=64)
        say(f'{len(images)} candidates')
        for arch in ('cifarnet', 'alexnet', 'googlenet'):
            score, lr, weights = pretrain(root, arch, d)
            methods = {
                **METHODS,
                BASELINE: Plan('random_init', (Phase(0, None, lr, wd=0.05, fixed_bn=False),), weights='random'),
            }
            how = dict(task='ct_nodes', size=64, arch=arch, weights=weights, runtime='channels_last', say=say)
            about = dict(arch=arch, source='flowers', source_accuracy=score, rate=lr)
            curves.append(
                learning_curve(f'{d}/images', sizes=(60, 200, 600), methods=methods, seeds=3, **how).assign(**about)
            )
            errors.append(
                training_curve(
                    f'{d}/images',
                    epochs=20,
                    images=600,
                    methods={k: v for k, v in methods.items() if k != 'frozen'},
                    **how,
                ).assign(**about)
            )
            save(pd.concat(curves), 'learning_ct'), save(pd.concat(errors), 'training_ct')


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
