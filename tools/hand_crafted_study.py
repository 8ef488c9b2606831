"""Compare hand-crafted features with the features of a network, and evaluate the segmentation that they rest on.

    export DR_TRANSFER_DATA=...                       # the folder with dr/messidor2
    python tools/hand_crafted_study.py                # both parts; about an hour on one core
    python tools/hand_crafted_study.py drawn          # needs no photographs

    drawn        synthetic fundus images of cameras and patients on which no limit was chosen: lesions detected, spots
                 that are lesions, overlap of the vessels
    photographs  referable DR on Messidor-2 in the same five folds: hand-crafted features, frozen features and
                 fine-tuning, and their paired differences; the baseline on ten samples of 140 images; each feature
                 alone

Results are written to nbs/results/hand_crafted_drawn.csv and hand_crafted.csv. Features, and the predictions for each
fold, are kept in the cache (DR_TRANSFER_CACHE), so a run that was interrupted continues where it stopped. No limit of
the segmentation was chosen on photographs; `C` and the kernel width of the support vector machine are chosen in inner
folds of the training set.
"""

import argparse
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'
TWO = ['no', 'referable']
NETWORKS = {
    'frozen features, 384 pixels': dict(plan='head'),
    'frozen features, 224 pixels': dict(plan='head', size=224),
    'fine-tuned (top1), 224 pixels': dict(plan='top1', size=224),
}
BASELINE = 'hand-crafted features, SVM'


# ---------------------------------------------------------------- drawn eyes


def vessel_truth(truth, seed, disc, side):
    "Mask of the drawn vessels in the crop"
    from PIL import Image

    from dr_transfer.synthetic.drawing import _stream
    from dr_transfer.synthetic.eye import _person, _strokes, _vessels

    x, y, r = truth['disc']
    nerve_x, nerve_y = truth['optic_nerve'][:2]
    mirror = -1 if truth['eye'] == 'left' else 1
    right = mirror * (nerve_x - x) / r
    down = (nerve_y - y) / r
    nerve = np.array([right, down])
    person = _person(_stream(seed, 1))
    lines = []
    vessels = _vessels(_stream(seed, 3), nerve, person['sway'])
    for points, width, value in vessels:
        lines.append((points * (mirror, 1), width, value))
    center = np.array([x, y])
    cover = sum(_strokes(lines, truth['size'], center, r)).clip(0, 1)
    grey = (cover * 255).astype(np.uint8)
    picture = Image.fromarray(grey).crop(disc.box)
    crop = np.asarray(picture.resize((side, side)))
    return crop / 255 > 0.5


def lesion_truth(truth, disc, side):
    "kind, x, y and radius of the drawn lesions, in pixels of the crop"
    scale = side / (2 * disc.r)
    lesions = []
    for q in truth['lesions']:
        center = [q['x'], q['y']]
        x, y = disc.to_crop([center], side)[0]
        lesions.append((q['kind'], x, y, q['radius'] * scale))
    return lesions


def lesion_counts(seg, truth, side):
    "Count true lesions and those detected, and spots and those that are lesions"
    from dr_transfer.evaluation.segmentation import LESION_MASKS, score_lesions

    lesions = lesion_truth(truth, seg.disc, side)
    row = {}
    for mask, names in LESION_MASKS.items():
        own = [q for q in lesions if q[0] in names]
        kinds = [q[0] for q in own]
        kinds = np.array(kinds, dtype=object)
        places = [q[1:] for q in own]
        spots = getattr(seg, mask)
        detected, correct = score_lesions(spots, places)
        for name in names:
            drawn = kinds == name
            row[f'{name} drawn'] = int(drawn.sum())
            row[f'{name} detected'] = int(detected[drawn].sum())
        row[f'{mask} drawn'] = len(own)
        row[f'{mask} detected'] = int(detected.sum())
        row[f'{mask} spots'] = len(correct)
        row[f'{mask} correct'] = int(correct.sum())
    return row


def dice(a, b):
    "Overlap of two masks"
    both = (a & b).sum()
    return 2 * both / (a.sum() + b.sum())


def in_radii(pixels, side):
    "A distance in the crop as a share of the radius of the retina"
    radius = side / 2
    return round(float(pixels) / radius, 4)


def drawn(root):
    from itertools import product

    from dr_transfer.evaluation.segmentation import SEGMENT_SIZE, segment
    from dr_transfer.synthetic.fundus import draw_fundus

    for camera, grade, k in product(range(4, 10), range(5), range(2)):
        seed = 9000 + 100 * camera + 10 * grade + k
        eye = ('right', 'left')[k]
        pixels, truth = draw_fundus(grade, seed=seed, size=512, camera=camera, eye=eye)
        seg = segment(pixels)
        vessels = vessel_truth(truth, seed, seg.disc, SEGMENT_SIZE) & seg.field
        overlap = dice(vessels, seg.vessels)
        places = [truth['optic_nerve'][:2], truth['macula'][:2]]
        nerve, fovea = seg.disc.to_crop(places, SEGMENT_SIZE)
        y, x = np.argwhere(seg.nerve).mean(0)
        nerve_off = np.hypot(*(np.array([x, y]) - nerve))
        fovea_off = np.hypot(*(seg.fovea - fovea))
        yield {
            'camera': camera,
            'grade': grade,
            'seed': seed,
            **lesion_counts(seg, truth, SEGMENT_SIZE),
            'vessels': round(float(overlap), 4),
            'nerve off': in_radii(nerve_off, SEGMENT_SIZE),
            'fovea off': in_radii(fovea_off, SEGMENT_SIZE),
        }


# ---------------------------------------------------------------- photographs


def _rows(recipe, t, wanted=None):
    rows = []
    for name in t.index:
        if wanted is None or name in wanted:
            values = t.loc[name, ['value', 'low', 'high']].astype(float).round(4)
            rows.append({'recipe': recipe, 'metric': name, **values.to_dict()})
    return rows


def _figures(recipe, t):
    "Figures of one recipe: ranking, the likeliest class, and the decision at a threshold of the other folds"
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.screening import measure_table

    decided, _ = decide_across(t, TWO, specificity=0.9)
    wanted = ('auc', 'accuracy', 'sensitivity', 'specificity', 'calibration error')
    yield from _rows(recipe, measure_table(decided, TWO), wanted)
    for kind, part in t.groupby('data_source_format'):
        name = f'auc, {kind} files only'
        measured = measure_table(part, TWO).rename({'auc': name})
        yield from _rows(recipe, measured, (name,))


def _found(t, ill):
    "Which of the ill are called so, as numbers"
    called = (t.decision == 'referable').to_numpy()
    return called[ill].astype(float)


def _differences(name, a, b):
    "By how much a is better than b, on the same images"
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.intervals import paired_difference
    from dr_transfer.metrics.screening import compare_tables

    yield from _rows(name, compare_tables(a, b, TWO), ('auc', 'accuracy'))
    a, _ = decide_across(a, TWO, specificity=0.9)
    b, _ = decide_across(b, TWO, specificity=0.9)
    if a.image.tolist() != b.image.tolist():
        raise ValueError('the two tables are of other images')
    ill = (a.target == 'referable').to_numpy()
    found = [_found(t, ill) for t in (a, b)]

    def sensitivity(y, c):
        return c.mean()

    difference = paired_difference(sensitivity, ill[ill], *found)
    yield from _rows(name, difference.set_axis(['sensitivity']))


def _small_sets(data, n=140, resamples=10):
    "Metrics of the likeliest class in cross-validation on few images; mean, least and largest of the draws"
    from dr_transfer.data.table import label_table
    from dr_transfer.evaluation.hand_crafted import cross_validate_hand_crafted
    from dr_transfer.metrics.scores import auc

    found = []
    for seed in range(resamples):
        t = cross_validate_hand_crafted(label_table(data).sample(n, random_state=seed), 'referable')
        ill = t.target == 'referable'
        said = t.prediction == 'referable'
        found.append(
            {
                'auc': auc(ill.astype(int), t.p_referable),
                'accuracy': (ill == said).mean(),
                'sensitivity': said[ill].mean(),
                'specificity': (~said[~ill]).mean(),
                'accuracy of always saying no': (~ill).mean(),
            }
        )
    found = pd.DataFrame(found)
    return pd.DataFrame({'value': found.mean(), 'low': found.min(), 'high': found.max()})


def photographs(root):
    from dr_transfer.evaluation.cross_validation import cross_validate
    from dr_transfer.evaluation.hand_crafted import cross_validate_hand_crafted, feature_frame
    from dr_transfer.metrics.scores import auc

    data = root / 'messidor2'
    baseline = cross_validate_hand_crafted(data, 'referable')
    yield from _figures(BASELINE, baseline)
    yield from _rows(f'{BASELINE}, ten draws of 140 images', _small_sets(data))
    frame = feature_frame(baseline.image.tolist())
    ill = (baseline.target == 'referable').astype(int)
    for name in frame:
        value = auc(ill.to_numpy(), frame[name].to_numpy())
        yield {'recipe': 'one feature alone', 'metric': name, 'value': round(value, 4)}
    tables = {}
    for recipe, how in NETWORKS.items():
        t = cross_validate(data, 'dr', 'referable', say=lambda s: None, **how)
        tables[recipe] = t
        yield from _figures(recipe, t)
        yield from _differences(f'{recipe} - {BASELINE}', t, baseline)
    a = 'fine-tuned (top1), 224 pixels'
    b = 'frozen features, 224 pixels'
    yield from _differences(f'{a} - {b}', tables[a], tables[b])


PARTS = {'drawn': (drawn, 'hand_crafted_drawn.csv'), 'photographs': (photographs, 'hand_crafted.csv')}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(PARTS))
    parts = p.parse_args().parts
    if 'photographs' in parts and not os.environ.get('DR_TRANSFER_DATA'):
        p.error('set DR_TRANSFER_DATA to the folder with dr/messidor2, or ask for `drawn` alone')
    warnings.simplefilter('ignore')
    from dr_transfer.utils.places import atomic_file

    for part in parts:
        f, file = PARTS[part]
        rows = []
        for r in f(Path(os.environ.get('DR_TRANSFER_DATA') or '.') / 'dr'):
            rows.append(r)
            print(r, flush=True)
        with atomic_file(RESULTS / file) as tmp:
            pd.DataFrame(rows).to_csv(tmp, index=False)
