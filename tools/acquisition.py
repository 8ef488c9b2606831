"""Measure how the acquisition of images differs between data sets: light, colour, sharpness, noise and more.

    export DR_TRANSFER_DATA=...      # the folder with flowers/ and dr/
    python tools/acquisition.py      # at most 300 images of each set

The statistics are those of dr_transfer.data.image_statistics. Mean and standard deviation per data set are printed,
and written to nbs/results/acquisition.csv; the strengths in dr_transfer.data.acquisition are compared with them.
"""

import argparse
import os
from pathlib import Path

import pandas as pd

from dr_transfer.data.image_statistics import image_statistics
from dr_transfer.data.table import find_images
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'acquisition.csv'
SETS = {
    'flowers': ('flowers', 'photo'),
    'messidor2': ('dr/messidor2', 'fundus'),
    'idrid': ('dr/idrid/images', 'fundus'),
    'eyepacs': ('dr/eyepacs', 'fundus'),
}  # data set -> its folder, and the reader of its images
MOST_IMAGES = 300


def set_statistics(folder, reader) -> pd.DataFrame:
    "Mean and standard deviation of the statistics of some images below a folder: one row per statistic"
    files = pd.Series(find_images(folder))
    some = files.sample(min(len(files), MOST_IMAGES), random_state=0)
    t = image_statistics(some.tolist(), reader).drop(columns='format')
    found = pd.DataFrame({'mean': t.mean(), 'std': t.std()})
    return found.rename_axis('statistic').reset_index().assign(images=int(t.light.notna().sum()))


def main():
    "Measure, print and write the results"
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    root = Path(os.environ['DR_TRANSFER_DATA'])
    parts = {name: set_statistics(root / folder, reader) for name, (folder, reader) in SETS.items()}
    t = pd.concat(parts, names=['set']).reset_index(level=0).reset_index(drop=True)
    print(t.pivot(index='statistic', columns='set', values=['mean', 'std']).round(4).to_string())
    with atomic_file(RESULT) as file:
        write_csv(t.round(5), file)


if __name__ == '__main__':
    main()
