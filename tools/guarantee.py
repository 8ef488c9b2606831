"""Measure on photographs whether a guaranteed operating point holds for new patients of another site.

    export DR_TRANSFER_DATA=...        # the folder with dr/messidor2 and dr/eyepacs
    python tools/guarantee.py          # trains once; predictions are stored, so that repeated runs take seconds

A model of referable retinopathy is trained on Messidor-2 (plan 'head') and predicts EyePACS, with other cameras. Then,
many times: some patients of EyePACS are drawn at random, an operating point is chosen on their images, and its
sensitivity is measured on the other patients: the mean over the patients with referable images of the fraction of
these that are found. With `guaranteed_operating_point` it should be below the required one in at most a tenth of the
draws, with `choose_operating_point` in about half of them.

The results are written to nbs/results/guarantee.csv, a row for each number of patients, sensitivity and method:

    draws, refused   number of draws, and of those with too few patients for the guarantee; the others are measured
    sensitivity      on the other patients: mean over the draws, and quantiles (low 5 %, high 95 %)
    specificity      on the images of the other patients: mean over the draws
    below, others    fraction of draws in which the sensitivity of the other patients is too low; as these are few,
                     chance makes it too low more often than the guarantee says
    below, all       the same for all patients: the whole set is the site, and the draws are samples of it
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dr_transfer.data.leaks import split_data
from dr_transfer.data.sources import image_sources
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task
from dr_transfer.evaluation.cross_validation import train_once
from dr_transfer.metrics.guarantee import guaranteed_operating_point
from dr_transfer.metrics.intervals import group_codes
from dr_transfer.metrics.operating_point import OperatingPointError, choose_operating_point
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'guarantee.csv'
MINIMA = (0.8, 0.9)  # required sensitivities
NUMBERS = (100, 200)  # patients on which the operating point is chosen
DELTA = 0.1  # accepted probability that the guarantee fails


@dataclass(frozen=True)
class Site:
    "Predictions of the images of a site"

    y: np.ndarray  # Truth (n,): 1 referable, 0 not
    score: np.ndarray  # Probability of referable (n,)
    patient: np.ndarray  # Number of the patient (n,), from 0

    @property
    def patients(self) -> int:
        "Number of patients"
        return int(self.patient.max()) + 1

    def sensitivity(self, threshold, of_patients) -> float:
        "Mean over patients with referable images of the fraction that is found, for patients marked as True"
        rows = (self.y == 1) & of_patients[self.patient]
        found = pd.Series(self.score[rows] >= threshold).groupby(self.patient[rows]).mean()
        return float(found.mean())

    def specificity(self, threshold, of_patients) -> float:
        "Fraction of the other images that are negative, for patients marked as True"
        rows = (self.y == 0) & of_patients[self.patient]
        return float((self.score[rows] < threshold).mean())


def predicted_site(home, away, size, arch, weights) -> Site:
    "Train on one folder of images and predict another; both results are stored in the cache"
    task = get_task('dr', size)
    table = encode_target(label_table([home, away], verify=False), task.target('referable'))
    is_away = (image_sources(table) == Path(away).name).to_numpy()
    split = split_data(table[~is_away], task, task.target('referable'), seed=0).set_index('image').split
    table['split'] = table.image.map(split).fillna('test')
    how = {'subset': 'test', 'arch': arch, 'weights': weights}
    predictions, _ = train_once(table, task, 'referable', plan='head', seed=0, **how)
    patient = group_codes(predictions.group.tolist(), len(predictions))
    _, patient = np.unique(patient, return_inverse=True)
    y = (predictions.target == 'referable').astype(int).to_numpy()
    return Site(y, predictions.p_referable.to_numpy(float), patient)


def chosen_threshold(site, rows, minimum, guaranteed) -> float | None:
    "Threshold chosen on some images; None if there are too few patients"
    y, score, groups = site.y[rows], site.score[rows], site.patient[rows]
    try:
        if guaranteed:
            return guaranteed_operating_point(y, score, minimum, delta=DELTA, groups=groups).threshold
        return choose_operating_point(y, score, minimum, min_groups=1, groups=groups).threshold
    except OperatingPointError:
        return None


def measured_draws(site, number, minimum, guaranteed, draws) -> dict:
    "Choose operating points on random patients, and measure them on the others"
    rng = np.random.default_rng(0)  # the same patients for both methods
    everyone = np.ones(site.patients, bool)
    rows = []
    for _ in range(draws):
        drawn = np.zeros(site.patients, bool)
        drawn[rng.permutation(site.patients)[:number]] = True
        threshold = chosen_threshold(site, drawn[site.patient], minimum, guaranteed)
        if threshold is not None:
            others = site.sensitivity(threshold, ~drawn), site.specificity(threshold, ~drawn)
            rows.append((*others, site.sensitivity(threshold, everyone)))
    sensitivity, specificity, of_all = np.array(rows).reshape(-1, 3).T
    found = {'draws': draws, 'refused': draws - len(rows)}
    if not rows:
        return found
    return found | {
        'sensitivity': sensitivity.mean(),
        'low': np.quantile(sensitivity, 0.05),
        'high': np.quantile(sensitivity, 0.95),
        'specificity': specificity.mean(),
        'below, others': (sensitivity < minimum).mean(),
        'below, all': (of_all < minimum).mean(),
    }


def results(site, numbers=NUMBERS, draws=200) -> pd.DataFrame:
    "Measure both methods for each number of patients and each required sensitivity"
    rows = []
    for number in numbers:
        for minimum in MINIMA:
            for method in ('guaranteed', 'usual'):
                about = {'patients': number, 'required': minimum, 'method': method}
                rows.append(about | measured_draws(site, number, minimum, method == 'guaranteed', draws))
    return pd.DataFrame(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--home', default='dr/messidor2', help='training images, in DR_TRANSFER_DATA')
    p.add_argument('--away', default='dr/eyepacs', help='images of the other site, in DR_TRANSFER_DATA')
    p.add_argument('--size', type=int, help='height and width in pixels (default: that of the task)')
    p.add_argument('--arch', help='backbone (default: efficientnet_lite0)')
    p.add_argument('--weights', help="weights of the backbone: a file or 'random' (default: its own)")
    p.add_argument('--patients', type=int, nargs='+', default=list(NUMBERS), help='patients of a draw')
    p.add_argument('--draws', type=int, default=200, help='number of draws')
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    root = Path(os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with dr/'))
    site = predicted_site(root / a.home, root / a.away, a.size, a.arch, a.weights)
    positives = len(set(site.patient[site.y == 1].tolist()))
    print(f'{len(site.y)} images of {site.patients} patients, {positives} of them with referable images', flush=True)
    table = results(site, a.patients, a.draws).round(4)
    print(table.to_string(index=False))
    with atomic_file(a.out) as file:
        write_csv(table, file)


if __name__ == '__main__':
    main()
