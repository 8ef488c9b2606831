"""The rival without a network: is its segmentation right, and how far do its features go against those of a network?

    export DR_TRANSFER_DATA=...                       # the folder with dr/messidor2
    python tools/explicit_study.py                    # both parts; about an hour on one core
    python tools/explicit_study.py drawn              # needs no photographs

    drawn        drawn eyes of cameras and people on which no limit was chosen: lesions found, spots that are right, overlap of the vessels
    photographs  referable DR on Messidor-2 in five folds, the same for all: explicit features, frozen features, fine-tuning, and their differences
                 image by image; the rival on ten draws of 140 images; each feature alone

Results are kept in nbs/results/explicit_drawn.csv and explicit.csv. Features, and predictions fold by fold, are kept in the cache (DR_TRANSFER_CACHE), so a run that
was interrupted goes on where it stopped. Nothing of the segmentation was chosen on photographs; strength and width of the support vector machine are chosen in inner
folds of the training side.
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
RIVAL = 'explicit features, SVM'


# ---------------------------------------------------------------- drawn eyes


def vessel_truth(truth, seed, disc, side):
    "Mask of the drawn vessels in the crop"
    from PIL import Image

    from dr_transfer.synthetic.drawing import _stream
    from dr_transfer.synthetic.eye import _person, _strokes, _vessels

    (x, y, r), mirror = truth['disc'], -1 if truth['eye'] == 'left' else 1
    nerve = np.array([mirror * (truth['optic_nerve'][0] - x) / r, (truth['optic_nerve'][1] - y) / r])
    lines = [
        (p * (mirror, 1), w, v) for p, w, v in _vessels(_stream(seed, 3), nerve, _person(_stream(seed, 1))['sway'])
    ]
    cover = sum(_strokes(lines, truth['size'], np.array([x, y]), r)).clip(0, 1)
    return np.asarray(Image.fromarray((cover * 255).astype(np.uint8)).crop(disc.box).resize((side, side))) / 255 > 0.5


def drawn(root):
    from itertools import product

    from dr_transfer.evaluation.hand_crafted import KINDS, SIDE, score_lesions, segment
    from dr_transfer.synthetic.fundus import draw_fundus

    for camera, grade, k in product(range(4, 10), range(5), range(2)):
        seed = 9000 + 100 * camera + 10 * grade + k
        pixels, truth = draw_fundus(grade, seed=seed, size=512, camera=camera, eye=('right', 'left')[k])
        seg = segment(pixels)
        row, scale = {'camera': camera, 'grade': grade, 'seed': seed}, SIDE / (2 * seg.disc.r)
        lesions = [
            (q['kind'], *seg.disc.to_crop([[q['x'], q['y']]], SIDE)[0], q['radius'] * scale) for q in truth['lesions']
        ]
        for mask, names in KINDS.items():
            own = [q for q in lesions if q[0] in names]
            found, right = score_lesions(getattr(seg, mask), [q[1:] for q in own])
            for name in names:
                row |= {
                    f'{name} drawn': sum(q[0] == name for q in own),
                    f'{name} found': int(sum(f for q, f in zip(own, found) if q[0] == name)),
                }
            row |= {
                f'{mask} drawn': len(own),
                f'{mask} found': int(found.sum()),
                f'{mask} spots': len(right),
                f'{mask} right': int(right.sum()),
            }
        vessels = vessel_truth(truth, seed, seg.disc, SIDE) & seg.field
        nerve, fovea = seg.disc.to_crop([truth['optic_nerve'][:2], truth['macula'][:2]], SIDE)
        off = {
            'nerve off': np.hypot(*(np.argwhere(seg.nerve).mean(0)[::-1] - nerve)),
            'fovea off': np.hypot(*(seg.fovea - fovea)),
        }
        yield (
            row
            | {'vessels': round(float(2 * (vessels & seg.vessels).sum() / (vessels.sum() + seg.vessels.sum())), 4)}
            | {k: round(float(v) / (SIDE / 2), 4) for k, v in off.items()}
        )


# ---------------------------------------------------------------- photographs


def _rows(recipe, t, wanted=None):
    return [
        {'recipe': recipe, 'measure': k, **t.loc[k, ['value', 'low', 'high']].astype(float).round(4).to_dict()}
        for k in t.index
        if wanted is None or k in wanted
    ]


def _figures(recipe, t):
    "Figures of one recipe: ranking, the likeliest class, and the decision at a threshold of the other folds"
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.screening import measure_table

    decided, _ = decide_across(t, TWO, specificity=0.9)
    yield from _rows(
        recipe, measure_table(decided, TWO), ('auc', 'accuracy', 'sensitivity', 'specificity', 'calibration error')
    )
    for kind, part in t.groupby('data_source_format'):
        yield from _rows(
            recipe, measure_table(part, TWO).rename({'auc': f'auc, {kind} files only'}), (f'auc, {kind} files only',)
        )


def _differences(name, a, b):
    "By how much a is better than b, on the same images"
    from dr_transfer.evaluation.cross_validation import decide_across
    from dr_transfer.metrics.intervals import paired_difference
    from dr_transfer.metrics.screening import compare_tables

    yield from _rows(name, compare_tables(a, b, TWO), ('auc', 'accuracy'))
    a, b = (decide_across(t, TWO, specificity=0.9)[0] for t in (a, b))
    if a.image.tolist() != b.image.tolist():
        raise ValueError('the two tables are of other images')
    ill = (a.target == 'referable').to_numpy()
    called = [(t.decision == 'referable').to_numpy()[ill].astype(float) for t in (a, b)]
    yield from _rows(name, paired_difference(lambda y, c: c.mean(), ill[ill], *called).set_axis(['sensitivity']))


def _small_sets(data, n=140, draws=10):
    "Accuracy and sensitivity of the likeliest class in cross-validation on few images; mean, least and largest of the draws"
    from dr_transfer.data.table import label_table
    from dr_transfer.evaluation.hand_crafted import cross_validate_explicit
    from dr_transfer.metrics.scores import auc

    found = []
    for seed in range(draws):
        t = cross_validate_explicit(label_table(data).sample(n, random_state=seed), 'referable')
        ill, said = t.target == 'referable', t.prediction == 'referable'
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
    from dr_transfer.evaluation.hand_crafted import cross_validate_explicit, feature_frame
    from dr_transfer.metrics.scores import auc

    data, tables = root / 'messidor2', {}
    tables[RIVAL] = cross_validate_explicit(data, 'referable')
    yield from _figures(RIVAL, tables[RIVAL])
    yield from _rows(f'{RIVAL}, ten draws of 140 images', _small_sets(data))
    t = tables[RIVAL]
    frame = feature_frame(t.image.tolist())
    for name in frame:
        yield {
            'recipe': 'one feature alone',
            'measure': name,
            'value': round(auc((t.target == 'referable').astype(int).to_numpy(), frame[name].to_numpy()), 4),
        }
    for recipe, how in NETWORKS.items():
        tables[recipe] = cross_validate(data, 'dr', 'referable', say=lambda s: None, **how)
        yield from _figures(recipe, tables[recipe])
        yield from _differences(f'{recipe} - {RIVAL}', tables[recipe], tables[RIVAL])
    a, b = 'fine-tuned (top1), 224 pixels', 'frozen features, 224 pixels'
    yield from _differences(f'{a} - {b}', tables[a], tables[b])


PARTS = {'drawn': (drawn, 'explicit_drawn.csv'), 'photographs': (photographs, 'explicit.csv')}

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
