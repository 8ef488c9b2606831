"""Compare `ridge_path` with scikit-learn: the scores are the same, and scikit-learn takes several times as long.

`Ridge` is fitted once for each penalty, `RidgeCV` once; both get standardised features.

    python tools/ridge_speed.py
"""

import time

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from dr_transfer.features.probes import PENALTIES, ridge_path

SIZES = ((64, 320), (200, 1280), (1000, 320), (1000, 1280), (3000, 320))  # images, channels
CLASSES = 5


def timed(function, *args):
    "Call a function three times: return its result and the shortest time in seconds."
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - start)
    return result, min(times)


def by_ridge(x, targets, new):
    "Return the scores of `Ridge` for each penalty."
    return np.stack([Ridge(alpha=len(x) * p).fit(x, targets).predict(new) for p in PENALTIES])


def by_ridge_cv(x, targets, new):
    "Return the penalty that `RidgeCV` chooses, and the scores with it."
    model = RidgeCV(len(x) * np.asarray(PENALTIES)).fit(x, targets)
    return model.alpha_ / len(x), model.predict(new)


def main():
    "Print a line for each size."
    for n, channels in SIZES:
        rng = np.random.default_rng(0)
        y = rng.integers(CLASSES, size=n)
        x = rng.normal(size=(n, channels))
        x[:, :3] += y[:, None]
        new = rng.normal(size=(n // 4, channels))
        targets = 2.0 * (y[:, None] == np.arange(CLASSES)) - 1
        scaler = StandardScaler().fit(x)
        z = scaler.transform(x)
        z_new = scaler.transform(new)
        (scores, gcv), ours = timed(ridge_path, x, targets, new)
        wanted, path = timed(by_ridge, z, targets, z_new)
        (penalty, chosen), cv = timed(by_ridge_cv, z, targets, z_new)
        best = gcv.argmin()
        print(
            f'{n} images, {channels} channels: Ridge takes {path / ours:.1f} times as long, RidgeCV {cv / ours:.1f}; '
            f'scores differ by {abs(scores - wanted).max():.0e}, '
            f'penalties {PENALTIES[best]:.3g} and {penalty:.3g}, '
            f'scores with them differ by {abs(scores[best] - chosen).max():.0e}'
        )


if __name__ == '__main__':
    main()
