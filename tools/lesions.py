"""Measure how much of Grad-CAM, and of the hand-crafted segmentation, lies on lesions marked by a reader.

    export DR_TRANSFER_DATA=...   # the folder with dr/messidor2 and dr/idrid
    python tools/lesions.py       # an interrupted run goes on where it stopped

The default head for referable DR is trained on Messidor-2 only, so that IDRiD, from another country and camera, is
unseen. On each IDRiD photograph with marked lesions (dr/idrid/boxes.csv), for the class 'referable':

    mass     the fraction of the positive Grad-CAM map, or of the pixels of the segmentation, that lies in the boxes;
             what lies outside the retina is left out, and reported by itself
    area     the fraction of the retina within the boxes: the mass to expect of a map that is the same everywhere
    ratio    mean mass over mean area; 1 is chance
    others   the mass of the maps of the other photographs in the same boxes: the mass to expect of a map that follows
             where lesions usually are, but not where they are in this photograph

The regions are the boxes of all lesions, of each kind, and of the optic disc, where no lesion is expected; and what is
outside the retina. Grad-CAM is computed for what the head reads (stages 4 to 7 together) and for each of these stages,
on the photograph as it is and with its light corrected, as the model reads it. Heads trained on shuffled labels are the
control: they read the same network and the same photographs, but had nothing to find. Nothing is chosen on IDRiD.
Intervals are 95 % percentile intervals over photographs. The results are written to nbs/results/lesions.csv.
"""

import argparse
import os
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from dr_transfer.core import build_learner, fit, predict_probs
from dr_transfer.data.fundus import Disc, crop_disc, disc_box, find_disc, read_image
from dr_transfer.data.images import fit_square, read_rgb
from dr_transfer.data.table import label_table
from dr_transfer.data.views import correct_light
from dr_transfer.evaluation.segmentation import SEGMENT_SIZE, segment
from dr_transfer.explain.activations import evaluating, model_parts
from dr_transfer.explain.grad_cam import _resized, _signed_maps
from dr_transfer.metrics.intervals import bootstrap
from dr_transfer.metrics.scores import auc
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'lesions.csv'
SIZE = 384  # pixels, as in the task `dr`
KINDS = {'hard exudates': ('hard_exudates',), 'haemorrhages': ('haemorrhage',)}
REGIONS = {'lesions': ('hard_exudates', 'haemorrhage'), **KINDS, 'optic disc': ('optic_disc',)}
OUTSIDE = 'outside the retina'
STAGES = (None, 'stage4', 'stage5', 'stage6', 'stage7')  # None: what the head reads
CONTROL_STAGES = STAGES[:3]
N_SHUFFLED = 3  # heads
LIGHT = {'as it is': lambda x: x, 'corrected': correct_light}
MASKS = ('dark', 'bright', 'dark and bright')
SEED = 42


def say(line):
    "Print a line with the time of day."
    print(time.strftime('%H:%M:%S'), line, flush=True)


# ---------------------------------------------------------------- boxes of a photograph, as a model reads it


def box_mask(boxes, size):
    "Draw boxes (n, 4), which are cx, cy, w, h in fractions of the image, as a mask of (width, height) pixels."
    mask = Image.new('L', size)
    draw = ImageDraw.Draw(mask)
    width, height = size
    for cx, cy, w, h in boxes:
        left, right = ((cx + k * w / 2) * width for k in (-1, 1))
        top, bottom = ((cy + k * h / 2) * height for k in (-1, 1))
        # the pixels whose middle is within the box, at least one
        x, y = (max(0, round(v)) for v in (left, top))
        draw.rectangle((x, y, max(x, round(right) - 1), max(y, round(bottom) - 1)), fill=255)
    return mask


@dataclass(frozen=True)
class Geometry:
    "Where the retina is in a photograph, in pixels"

    size: tuple  # Width and height of the photograph
    box: tuple  # Left, top, right and bottom of the crop of the reader
    disc: Disc | None  # Circle of the retina; None if none was found

    @classmethod
    def of(cls, im):
        return cls(im.size, disc_box(im), find_disc(im))


def retina_mask(geometry):
    "Draw the circle of the retina in a photograph as a mask; the whole photograph if none was found."
    disc = geometry.disc
    mask = Image.new('L', geometry.size, 255 if disc is None else 0)
    if disc is not None:
        ends = (disc.x - disc.r, disc.y - disc.r, disc.x + disc.r, disc.y + disc.r)
        ImageDraw.Draw(mask).ellipse(ends, fill=255)
    return mask


def as_read(
    mask,  # As large as the photograph
    geometry,  # Of the photograph
    size=SIZE,  # Pixels
):
    "Crop and resize a mask of a photograph exactly as the reader `fundus` does with the photograph: values 0 to 1."
    return _values(fit_square(mask.crop(geometry.box), size, 'pad'))


def as_segmented(
    mask,  # As large as the photograph
    geometry,  # Of the photograph
    size=SEGMENT_SIZE,  # Pixels
):
    "Crop and resize a mask of a photograph exactly as `segment` does with the photograph: values 0 to 1."
    return _values(crop_disc(mask, geometry.disc).resize((size, size), Image.Resampling.BICUBIC))


def _values(mask):
    return np.asarray(mask, np.float32) / 255


# ---------------------------------------------------------------- mass and area


def normalized(maps):
    "Scale maps (n, h, w) so that each has the sum 1; a map of zeros becomes NaN."
    total = maps.sum((1, 2), keepdims=True)
    return np.where(total > 0, maps / np.where(total > 0, total, 1), np.nan)


def masses(maps, masks):
    "Return the mass of each map on its own mask, and the mean mass of the other maps on it: both (n,)."
    n = len(maps)
    flat = normalized(maps).reshape(n, -1)
    there = ~np.isnan(flat[:, 0])
    each = np.nan_to_num(flat) @ masks.reshape(n, -1).T  # (map, mask)
    own = np.where(there, np.diag(each), np.nan)
    n_others = there.sum() - there
    others = (each.sum(0) - np.nan_to_num(own)) / np.maximum(n_others, 1)
    return own, np.where(n_others > 0, others, np.nan)


def areas(masks, retinas):
    "Return the fraction of each retina that its mask covers (n,)."
    return (masks * retinas).sum((1, 2)) / retinas.sum((1, 2))


def region_row(
    own,  # Mass of each map on its own mask (n,)
    others,  # Mean mass of the other maps on it (n,)
    area,  # Fraction of the retina that the mask covers (n,)
    n=2000,  # Bootstrap resamples
):
    "Return mean mass, area and ratio over photographs with 95 % intervals; photographs with an empty map are left out."
    there = ~np.isnan(own)

    def means(own, others, area):
        mass, chance = own.mean(), area.mean()
        elsewhere = others.mean()
        ratio = mass / chance if chance > 0 else np.nan
        return {
            'mass': mass,
            'area': chance,
            'ratio': ratio,
            'others': elsewhere,
            'more than others': mass - elsewhere,
        }

    t = bootstrap(means, own[there], others[there], area[there], n=n)
    row = {'photographs': int(there.sum()), 'empty maps': int((~there).sum())}
    for name, r in t.iterrows():
        row |= {name: r.value, f'{name} low': r.low, f'{name} high': r.high}
    return row


def region_rows(
    maps,  # (n, h, w)
    regions,  # Region -> masks (n, h, w)
    retinas,  # Masks (n, h, w)
    marked,  # Region -> which photographs have a box of it (n,)
):
    "Yield a row for each region; only photographs that have a box of the region count."
    for name, masks in regions.items():
        has = marked[name]
        own, others = masses(maps[has] * retinas[has], masks[has])
        yield {'region': name, **region_row(own, others, areas(masks[has], retinas[has]))}


def outside_row(
    maps,  # (n, h, w)
    retinas,  # Masks (n, h, w)
    n=2000,  # Bootstrap resamples
):
    "Return the fraction of the maps outside the retina, mean over photographs with a 95 % interval."
    own, _ = masses(maps, 1 - retinas)
    own = own[~np.isnan(own)]
    r = bootstrap(np.mean, own, n=n).iloc[0]
    return {
        'region': OUTSIDE,
        'photographs': len(own),
        'mass': r.value,
        'mass low': r.low,
        'mass high': r.high,
    }


def all_rows(
    maps,  # (n, h, w)
    regions,  # Region -> masks (n, h, w)
    retinas,  # Masks (n, h, w)
    marked,  # Region -> which photographs have a box of it (n,)
):
    "Return the rows of all regions, and of what is outside the retina."
    return [*region_rows(maps, regions, retinas, marked), outside_row(maps, retinas)]


# ---------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Photographs:
    "The photographs with marked lesions"

    folder: Path

    @cached_property
    def boxes(self):
        "The boxes of photographs with at least one lesion, by image."
        t = pd.read_csv(self.folder / 'boxes.csv')
        with_lesion = t[t.lesion.isin(REGIONS['lesions'])].image.unique()
        return dict(list(t[t.image.isin(with_lesion)].groupby('image')))

    @property
    def files(self):
        return [self.folder / 'images' / name for name in self.boxes]

    def boxes_of(self, name, region):
        "Return the boxes (n, 4) of a region in a photograph."
        t = self.boxes[name]
        return t[t.lesion.isin(REGIONS[region])][['cx', 'cy', 'w', 'h']].to_numpy()

    @cached_property
    def marked(self):
        "Region -> which photographs have a box of it (n,)."
        marked = {}
        for region in REGIONS:
            marked[region] = np.array([len(self.boxes_of(name, region)) > 0 for name in self.boxes])
        return marked

    def masks(self, place, geometries):
        "Return region -> masks (n, h, w), and the retinas, placed by `as_read` or `as_segmented`."
        regions = {}
        for region in REGIONS:
            boxes = [self.boxes_of(name, region) for name in self.boxes]
            regions[region] = np.stack([place(box_mask(b, g.size), g) for b, g in zip(boxes, geometries)])
        retinas = np.stack([place(retina_mask(g), g) for g in geometries])
        return regions, retinas


def trained(folder, shuffled=0):
    "Train the default head for referable DR on Messidor-2; with shuffled labels (1, 2, ...) as a control."
    t = label_table(folder, verify=False)
    if shuffled:
        t = t.assign(label=t.label.sample(frac=1, random_state=SEED + shuffled - 1).to_numpy())
    learn = build_learner(t, 'dr', plan='head', runtime='channels_last', seed=SEED, say=lambda line: None)
    return fit(learn, say=lambda line: None)


def grad_cams(
    learn,  # From `trained`
    images,  # As the model reads them
    stage,  # Name of a stage; None: what the head reads
    correct,  # Correction of light of a batch
    bs=8,  # Images in a batch
):
    "Return the positive part of Grad-CAM (n, SIZE, SIZE) for 'referable' on images as the model reads them."
    parts = model_parts(learn)
    number = list(parts.classes).index('referable')
    out = []
    with evaluating(parts.stages, parts.head), torch.enable_grad():
        for i in range(0, len(images), bs):
            x = correct(parts.batch(images[i : i + bs]))
            maps = [m.detach().float() for m in _signed_maps(parts, x, number, stage)]
            finest = max((m.shape[-2:] for m in maps), key=max)
            cam = sum(_resized(m, finest) for m in maps).relu()
            out.append(_resized(cam, (SIZE, SIZE))[:, 0].numpy())
    return np.concatenate(out)


def segmentations(photographs):
    "Yield the rows of the segmentation: its dark spots, its bright spots, and both."
    geometries = [Geometry.of(read_rgb(file)) for file in photographs.files]
    segs = [segment(file) for file in photographs.files]
    geometries = [replace(g, disc=s.disc) for g, s in zip(geometries, segs)]
    regions, retinas = photographs.masks(as_segmented, geometries)
    for kind in MASKS:
        maps = np.stack([np.any([getattr(s, k) for k in kind.split(' and ')], axis=0) for s in segs])
        for row in all_rows(maps.astype(np.float32), regions, retinas, photographs.marked):
            yield {'method': 'segmentation', 'stage': kind, 'light': '', **row}


class Results:
    "The CSV file, which grows part by part"

    def __init__(self, file, again):
        self.file = file
        texts = dict.fromkeys(('stage', 'light', 'region'), '')
        self.rows = pd.DataFrame() if again or not file.exists() else pd.read_csv(file).fillna(texts)

    def has(self, **key):
        t = self.rows
        for column, value in key.items():
            t = t[t[column] == value] if len(t) else t
        return len(t) > 0

    def add(self, rows):
        self.rows = pd.concat([self.rows, pd.DataFrame(rows).round(4)], ignore_index=True)
        with atomic_file(self.file) as f:
            self.rows.astype(dict.fromkeys(('photographs', 'empty maps'), 'Int64')).to_csv(f, index=False)
        for r in rows:
            if 'ratio' in r:
                about = ', '.join(filter(None, (r['method'], r['stage'], r['light'], r['region'])))
                say(f'{about}: mass {r["mass"]:.3f}, area {r["area"]:.3f}, ratio {r["ratio"]:.2f}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--again', action='store_true', help='compute all parts again')
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    data = os.environ.get('DR_TRANSFER_DATA') or p.error('set DR_TRANSFER_DATA to the folder with dr/')
    root = Path(data) / 'dr'
    results = Results(a.out, a.again)
    photographs = Photographs(root / 'idrid')
    say(f'{len(photographs.boxes)} photographs with marked lesions')
    if not results.has(method='segmentation'):
        results.add(list(segmentations(photographs)))
    geometries = [Geometry.of(read_rgb(file, SIZE)) for file in photographs.files]
    regions, retinas = photographs.masks(as_read, geometries)
    images = [read_image(file, SIZE, 'fundus', 'pad') for file in photographs.files]
    controls = {f'Grad-CAM, shuffled labels {k}': k for k in range(1, N_SHUFFLED + 1)}
    for method, shuffled in {'Grad-CAM': 0, **controls}.items():
        parts = product(LIGHT, CONTROL_STAGES if shuffled else STAGES)
        due = [(light, s) for light, s in parts if not results.has(method=method, stage=s or 'head', light=light)]
        if due:
            learn = trained(root / 'messidor2', shuffled)
        for light, stage in due:
            about = {'method': method, 'stage': stage or 'head', 'light': light}
            maps = grad_cams(learn, images, stage, LIGHT[light])
            results.add([about | row for row in all_rows(maps, regions, retinas, photographs.marked)])
    if not results.has(method='AUC'):
        t = label_table(root / 'idrid', verify=False)
        referable = t.label.astype(int) >= 2
        probs = predict_probs(trained(root / 'messidor2'), t.image.tolist())
        value = auc(referable.to_numpy(int), probs[:, 1])
        results.add([{'method': 'AUC', 'stage': '', 'light': '', 'region': '', 'mass': value}])


if __name__ == '__main__':
    main()
