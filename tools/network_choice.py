"""Measure how good the network is that is chosen within some minutes, beside trying every network in full.

    export DR_TRANSFER_DATA=...     # the folder with flowers/ and dr/
    export DR_TRANSFER_WEIGHTS=...  # the folder with the weights of SqueezeNet and MobileNetV2
    python tools/network_choice.py          # computes the features of about 50,000 images first
    python tools/network_choice.py flowers  # one part: flowers or dr

`choose_network` compares EfficientNet-Lite0, 1 and 2, SqueezeNet and MobileNetV2 on the training images only, and pairs
of them side by side. Then the default head of each network and of each pair is trained on all training images, and
tested on images that the choice has not seen:

    flowers   trained on three quarters of the photographers; tested on the photographs of the others, as they are
              and with each change of acquisition: mean of the accuracy as they are and of the mean over the changes
    dr        trained on one or two collections; tested on each of the others: mean AUC of referable retinopathy

Regret is the best of these scores less that of the chosen network. `single` is the choice among single networks, for
plans that train the network. As in a plan, images of dr have two views, as they are and with their light corrected.
The results are written to nbs/results/network_choice.csv, and each score to nbs/results/network_scores.csv.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from elsewhere import (
    Candidate,
    ImageSet,
    combinations_of,
    data_folder,
    fitted,
    mean,
    predicted,
    read_dr,
    read_flowers,
    write_part,
)
from threadpoolctl import threadpool_limits

from dr_transfer.data.acquisition import CHANGES, changed_images
from dr_transfer.data.tasks import get_task
from dr_transfer.data.views import LOCAL
from dr_transfer.features.classifiers import grouped_folds
from dr_transfer.features.extraction import extract_features
from dr_transfer.models.registry import JOIN
from dr_transfer.training.network_choice import choose_network, network_candidate

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
SINGLE = ('efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2', 'squeezenet1_1', 'mobilenet_v2')
NETWORKS = (*SINGLE, *(JOIN.join(pair) for pair in combinations(SINGLE, 2)))
BUDGETS = (2, 10)  # minutes
N_CHANGED = 300  # test images that are changed, each in every way


@dataclass(frozen=True)
class Scenario:
    "What is trained on, and what is tested on"

    trained_on: str  # In words
    train: np.ndarray  # Row numbers
    tests: tuple  # Row numbers of each set of test images


def scenarios(data: ImageSet) -> list[Scenario]:
    "Three quarters of the photographers; or each one or two collections"
    if not data.positive:
        train, test = grouped_folds(data.y, data.groups, 4, seed=0)[0]
        return [Scenario('three quarters of the photographers', train, (test,))]
    trained = dict.fromkeys(train for train, _ in combinations_of(data.sources))
    return [
        Scenario(
            ' and '.join(names),
            np.flatnonzero(np.isin(data.sources, names)),
            tuple(np.flatnonzero(data.sources == name) for name in np.unique(data.sources) if name not in names),
        )
        for names in trained
    ]


class Networks:
    "The networks, their features and those of changed images"

    def __init__(self, data: ImageSet, task):
        self.data = data
        self.task = task
        self.candidates = {name: network_candidate(name, task, images=data.images) for name in SINGLE}
        self.of_network = cache(self._of_network)

    def _of_network(self, name, change, rows):
        "`Features` of one network, of some images"
        c = self.candidates[name]
        images = [self.data.images[i] for i in rows]
        if change:
            images = changed_images(images, change)
        how = dict(views='none' + (LOCAL if self.data.positive else ''), stages=c.all_stages)
        return extract_features(images, c.body, c.task.size, c.task.reader, c.task.fit, **how)

    def features(self, name, rows, change='') -> np.ndarray:
        "Features (images, views, channels) of a network, or of several side by side"
        names = name.split(JOIN)
        arrays = []
        for c in (self.candidates[name] for name in names):
            stages = c.stages if len(names) == 1 else c.beside
            arrays.append(self.of_network(c.name, change, tuple(rows)).numpy(stages))
        return np.concatenate(arrays, -1)

    def score(self, name, scenario) -> float:
        "Score of a network that was trained on all training images of a scenario"
        data = self.data
        x = self.features(name, range(len(data.images)))
        model = fitted(Candidate('', '', 0.01), x[scenario.train], data.y[scenario.train])
        own = mean([data.metric(predicted(model, x[rows]), rows) for rows in scenario.tests])
        if data.positive:
            return own
        rows = np.sort(np.random.default_rng(0).permutation(scenario.tests[0])[:N_CHANGED])
        changed = [data.metric(predicted(model, self.features(name, rows, change)), rows) for change in CHANGES]
        return (own + mean(changed)) / 2


def training_table(data, rows) -> pd.DataFrame:
    "The table of training images, as `choose_network` takes it"
    columns = {'image': data.images, 'group': data.groups, 'target': data.y, 'source': data.sources}
    table = pd.DataFrame(columns).iloc[rows].reset_index(drop=True)
    table.attrs['source_col'] = 'source'
    return table


def choices(data, task, scenario, scores) -> list[dict]:
    "The choice within each budget, and its regret"
    out = []
    best = scores.idxmax()
    single = scores[list(SINGLE)]
    for minutes in BUDGETS:
        choice = choose_network(training_table(data, scenario.train), task, list(SINGLE), minutes=minutes)
        out.append(
            {
                'trained_on': scenario.trained_on,
                'minutes': minutes,
                'images': choice.n_images,
                'chosen': choice.arch,
                'score': scores[choice.arch],
                'best': best,
                'regret': scores.max() - scores[choice.arch],
                'single': choice.single,
                'single_score': single[choice.single],
                'best_single': single.idxmax(),
                'single_regret': single.max() - single[choice.single],
                'lite0': scores['efficientnet_lite0'],
            }
        )
        print(choice.table[['score', 'low', 'high', 'home', 'images_a_second']].round(3).to_string(), flush=True)
        print(out[-1], flush=True)
    return out


def measure(part, root):
    "Measure all scenarios of a part"
    data = {'flowers': read_flowers, 'dr': read_dr}[part](root)
    task = get_task(part)
    networks = Networks(data, task)
    chosen = []
    scored = []
    for scenario in scenarios(data):
        scores = pd.Series({name: networks.score(name, scenario) for name in NETWORKS})
        print(scenario.trained_on, scores.round(4).to_dict(), flush=True)
        scored += [
            {'task': part, 'trained_on': scenario.trained_on, 'network': name, 'score': score}
            for name, score in scores.items()
        ]
        chosen += [{'task': part, **row} for row in choices(data, task, scenario, scores)]
        write_part(RESULTS / 'network_choice.csv', part, chosen)
        write_part(RESULTS / 'network_scores.csv', part, scored)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=['flowers', 'dr'])
    a = p.parse_args()
    root = data_folder(p)
    with threadpool_limits(1, user_api='blas'):
        for part in a.parts:
            measure(part, root)


if __name__ == '__main__':
    main()
