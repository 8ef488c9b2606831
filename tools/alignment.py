"""Measure whether a frozen network can be aligned to another source without labels, on photographs.

    export DR_TRANSFER_DATA=...          # the folder with dr/
    python tools/alignment.py            # computes the features of about 6,000 images first

A linear classifier of referable retinopathy is trained on one collection or two, and tested on another one, which is
known without labels:

    as it is        nothing is aligned
    standardised    the features of each source have its own mean and spread
    CORAL           the features for training get the mean and covariance of the test source (arXiv:1511.05547)
    AdaBN           the network has the BatchNorm statistics of each source (Li et al. 2017, arXiv:1603.04779)
    AdaBN, standardised    both

There is a row for each method, set of stages and strength of regularisation, with the AUC of each combination of
sources and their mean. The results are written to nbs/results/alignment.csv. Features have one view, without light
correction.
"""

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from elsewhere import (
    Candidate,
    FeatureReader,
    ImageSet,
    combinations_of,
    data_folder,
    fitted_rows,
    mean,
    read_dr,
    standardised,
)
from threadpoolctl import threadpool_limits
from torch import nn

from dr_transfer.data.tasks import ReadImage
from dr_transfer.features.extraction import extract_features, whole_body
from dr_transfer.models.network import Body, make_body
from dr_transfer.models.registry import DEFAULT_ARCH
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'alignment.csv'
STAGES = {
    'stages 4 to 7': ('stage4', 'stage5', 'stage6', 'stage7'),
    'stages 6 and 7': ('stage6', 'stage7'),
}
STRENGTHS = (1e-3, 1e-2)
READ = {'size': 384, 'reader': 'fundus', 'fit': 'pad'}
N_STATISTICS = 320  # images of a source from which its BatchNorm statistics are computed
BATCH = 16


@torch.no_grad()
def with_own_statistics(images) -> Body:
    "The network with the BatchNorm statistics of some images"
    body = make_body(whole_body(DEFAULT_ARCH), READ['size'], 'plain')
    spec = body.stages.spec
    body.eval()
    for module in body.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    read = ReadImage(**READ).image
    scale = torch.tensor(spec.std)[:, None, None]
    shift = torch.tensor(spec.mean)[:, None, None]
    for i in range(0, len(images), BATCH):
        arrays = [np.asarray(read(image)) for image in images[i : i + BATCH]]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        body.stages((x / 255 - shift) / scale)
    return body.eval()


def adapted_features(data: ImageSet) -> dict:
    "Stage -> features (n, channels), each source with its own BatchNorm statistics"
    out = {}
    names = STAGES['stages 4 to 7']
    for source in np.unique(data.sources):
        rows = np.flatnonzero(data.sources == source)
        some = np.random.default_rng(0).permutation(rows)[:N_STATISTICS]
        body = with_own_statistics([data.images[i] for i in some])
        images = [data.images[i] for i in rows]
        features = extract_features(images, body, **READ, stages=names)
        for name in names:
            x = features.numpy(name)[:, 0]
            out.setdefault(name, np.empty((len(data.y), x.shape[1])))[rows] = x
    return out


def root_of(covariance, power) -> np.ndarray:
    "Power of a symmetric matrix"
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * values**power) @ vectors.T


def coral(x, new) -> np.ndarray:
    "Training features with the mean and covariance of others; standardised, and regularised by 1 as in the paper"
    scale = x.std(0) + 1e-6
    center = x.mean(0)
    one = np.eye(x.shape[1])
    z = (x - center) / scale
    z_new = (new - center) / scale
    whiten = root_of(np.cov(z.T) + one, -0.5)
    color = root_of(np.cov(z_new.T) + one, 0.5)
    aligned = z @ whiten @ color + z_new.mean(0)
    return aligned * scale + center


def scores(data, candidate, x, align=None) -> dict:
    "AUC of each combination of sources"
    out = {}
    for train, test in combinations_of(data.sources):
        rows = np.flatnonzero(np.isin(data.sources, train))
        new = np.flatnonzero(data.sources == test)
        own = x[rows] if align is None else align(x[rows], x[new])
        model = fitted_rows(candidate, own, data.y[rows])
        name = f'{" and ".join(train)} to {test}'
        out[name] = data.metric(model.predict_proba(x[new]), new)
    return out


def measure(data) -> list[dict]:
    "A row for each method and candidate"
    reader = FeatureReader(data)
    of_each = adapted_features(data)
    rows = []
    for stages, C in product(STAGES, STRENGTHS):
        candidate = Candidate('none', stages, C)
        x = reader.array(candidate)[:, 0].astype(np.float64)
        own = np.concatenate([of_each[name] for name in STAGES[stages]], 1)
        methods = {
            'as it is': scores(data, candidate, x),
            'standardised': scores(data, candidate, standardised(x[:, None], data.sources)[:, 0]),
            'CORAL': scores(data, candidate, x, coral),
            'AdaBN': scores(data, candidate, own),
            'AdaBN, standardised': scores(data, candidate, standardised(own[:, None], data.sources)[:, 0]),
        }
        about = asdict(candidate)
        for method, values in methods.items():
            rows.append({'method': method, **about, 'mean': mean(values), **values})
            print(method, stages, C, f'{rows[-1]["mean"]:.3f}', flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = data_folder(p)
    with threadpool_limits(1, user_api='blas'):
        table = pd.DataFrame(measure(read_dr(root)))
    with atomic_file(a.out) as f:
        write_csv(table.drop(columns='correction').round(4), f)


if __name__ == '__main__':
    main()
