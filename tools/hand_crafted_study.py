"""Evaluate the method without a network: its segmentation, and its predictions compared with those of networks.

    export DR_TRANSFER_DATA=...                        # the folder with dr/messidor2
    python tools/hand_crafted_study.py                 # both parts; about an hour on one core
    python tools/hand_crafted_study.py synthetic       # needs no photographs

    synthetic    segmentation of synthetic fundus images, of cameras and patients on which no threshold was chosen:
                 lesions detected, spots that are lesions, overlap of the vessels
    photographs  referable DR on Messidor-2, in the same five folds for all methods: hand-crafted features, frozen
                 features and fine-tuning, with paired differences; the hand-crafted features on ten samples of 140
                 images; each feature alone

The results are written to nbs/results/hand_crafted_synthetic.csv and hand_crafted.csv. Features and the predictions
of each fold are stored in the cache (DR_TRANSFER_CACHE), so an interrupted run can be resumed. No parameter of the
segmentation was chosen on photographs; the regularisation strength and kernel width of the support vector machine are
chosen in inner folds of the training set.
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
HAND_CRAFTED = 'hand-crafted features, SVM'


# ---------------------------------------------------------------- synthetic fundus images


def vessel_truth(truth, seed, disc, size):
    "Return the mask of the true vessels in the crop."
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
    image = Image.fromarray(grey).crop(disc.box)
    crop = np.asarray(image.resize((size, size)))
    return crop / 255 > 0.5


def lesion_truth(truth, disc, size):
    "Return kind, x, y and radius of the true lesions, in pixels of the crop."
    scale = size / (2 * disc.r)
    lesions = []
    for q in truth['lesions']:
        center = [q['x'], q['y']]
        x, y = disc.to_crop([center], size)[0]
        lesions.append((q['kind'], x, y, q['radius'] * scale))
    return lesions


def lesion_counts(seg, truth, size):
    "Count the true and the detected lesions, the spots and the correct spots of a segmentation."
    from dr_transfer.evaluation.segmentation import LESION_MASKS, score_lesions

    lesions = lesion_truth(truth, seg.disc, size)
    row = {}
    for mask, names in LESION_MASKS.items():
        own = [q for q in lesions if q[0] in names]
        kinds = [q[0] for q in own]
        kinds = np.array(kinds, dtype=object)
        places = [q[1:] for q in own]
        spots = getattr(seg, mask)
        detected, correct = score_lesions(spots, places)
        for name in names:
            of_kind = kinds == name
            row[f'{name} drawn'] = int(of_kind.sum())
            row[f'{name} detected'] = int(detected[of_kind].sum())
        row[f'{mask} drawn'] = len(own)
        row[f'{mask} detected'] = int(detected.sum())
        row[f'{mask} spots'] = len(correct)
        row[f'{mask} correct'] = int(correct.sum())
    return row


def dice(a, b):
    "Return the Dice coefficient of two masks."
    both = (a & b).sum()
    return 2 * both / (a.sum() + b.sum())


def in_radii(pixels, size):
    "Convert a distance in pixels of the crop to radii of the retina."
    radius = size / 2
    return round(float(pixels) / radius, 4)


def synthetic(root):
    "Yield the results of the segmentation, a row for each synthetic fundus image."
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
    "Return the wanted metrics of a table, or all, as rows of the CSV file."
    rows = []
    for name in t.index:
        if wanted is None or name in wanted:
            values = t.loc[name, ['value', 'low', 'high']].astype(float).round(4)
            rows.append({'recipe': recipe, 'metric': name, **values.to_dict()})
    return rows


def _metrics(recipe, t):
    "Yield the metrics of one method: AUC, of the most probable class, and at a threshold from the other folds."
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.screening import measure_table

    decided, _ = decide_across(t, TWO, specificity=0.9)
    wanted = ('auc', 'accuracy', 'sensitivity', 'specificity', 'calibration error')
    yield from _rows(recipe, measure_table(decided, TWO), wanted)
    for kind, part in t.groupby('data_source_format'):
        name = f'auc, {kind} files only'
        measured = measure_table(part, TWO).rename({'auc': name})
        yield from _rows(recipe, measured, (name,))


def _true_positives(t, positive):
    "Return 1 for each positive image whose decision is positive, and 0 for the others."
    decided = (t.decision == 'referable').to_numpy()
    return decided[positive].astype(float)


def _differences(name, a, b):
    "Yield the paired differences of the metrics of a and b."
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.intervals import paired_difference
    from dr_transfer.metrics.screening import compare_tables

    yield from _rows(name, compare_tables(a, b, TWO), ('auc', 'accuracy'))
    a, _ = decide_across(a, TWO, specificity=0.9)
    b, _ = decide_across(b, TWO, specificity=0.9)
    if a.image.tolist() != b.image.tolist():
        raise ValueError('the two tables have different images: predict the same images with both methods')
    positive = (a.target == 'referable').to_numpy()
    detected = [_true_positives(t, positive) for t in (a, b)]

    def sensitivity(y, c):
        return c.mean()

    difference = paired_difference(sensitivity, positive[positive], *detected)
    yield from _rows(name, difference.set_axis(['sensitivity']))


def _small_sets(data, n=140, samples=10):
    "Return mean, smallest and largest metrics of the most probable class over small random samples of the images."
    from dr_transfer.data.table import label_table
    from dr_transfer.evaluation.hand_crafted import cross_validate_hand_crafted
    from dr_transfer.metrics.scores import auc

    metrics = []
    for seed in range(samples):
        t = cross_validate_hand_crafted(label_table(data).sample(n, random_state=seed), 'referable')
        positive = t.target == 'referable'
        predicted = t.prediction == 'referable'
        metrics.append(
            {
                'auc': auc(positive.astype(int), t.p_referable),
                'accuracy': (positive == predicted).mean(),
                'sensitivity': predicted[positive].mean(),
                'specificity': (~predicted[~positive]).mean(),
                'accuracy of always predicting no': (~positive).mean(),
            }
        )
    metrics = pd.DataFrame(metrics)
    return pd.DataFrame({'value': metrics.mean(), 'low': metrics.min(), 'high': metrics.max()})


def photographs(root):
    "Yield the metrics of all methods on Messidor-2."
    from dr_transfer.evaluation.cross_validation import cross_validate
    from dr_transfer.evaluation.hand_crafted import cross_validate_hand_crafted, feature_frame
    from dr_transfer.metrics.scores import auc

    data = root / 'messidor2'
    hand_crafted = cross_validate_hand_crafted(data, 'referable')
    yield from _metrics(HAND_CRAFTED, hand_crafted)
    yield from _rows(f'{HAND_CRAFTED}, ten samples of 140 images', _small_sets(data))
    frame = feature_frame(hand_crafted.image.tolist())
    positive = (hand_crafted.target == 'referable').astype(int)
    for name in frame:
        value = auc(positive.to_numpy(), frame[name].to_numpy())
        yield {'recipe': 'one feature alone', 'metric': name, 'value': round(value, 4)}
    tables = {}
    for recipe, how in NETWORKS.items():
        t = cross_validate(data, 'dr', 'referable', say=lambda s: None, **how)
        tables[recipe] = t
        yield from _metrics(recipe, t)
        yield from _differences(f'{recipe} - {HAND_CRAFTED}', t, hand_crafted)
    a = 'fine-tuned (top1), 224 pixels'
    b = 'frozen features, 224 pixels'
    yield from _differences(f'{a} - {b}', tables[a], tables[b])


PARTS = {'synthetic': (synthetic, 'hand_crafted_synthetic.csv'), 'photographs': (photographs, 'hand_crafted.csv')}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(PARTS))
    parts = p.parse_args().parts
    if 'photographs' in parts and not os.environ.get('DR_TRANSFER_DATA'):
        p.error('set DR_TRANSFER_DATA to the folder with dr/messidor2, or run the part `synthetic` only')
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
