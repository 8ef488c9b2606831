"""Run all cases and count them by kind and outcome: `python tests/hostile/count.py [FILE.csv] [KIND ...]`.

The table is written to nbs/results/hostile.csv, or to the given file. Cases that break the rules are printed.
With DR_TRANSFER_HOSTILE=some, only the cases that always run are counted.
"""

import collections
import csv
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('DR_TRANSFER_HOSTILE', 'all')

from inputs import KINDS, cases, judge, make_shared
from observe import Runner

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ('completed', 'error', 'contract broken', 'not here')


def outcome_of(outcome, complaints) -> str:
    "How a case ended, in one of `OUTCOMES`."
    if outcome is None:
        return 'not here'
    if complaints:
        return 'contract broken'
    return 'completed' if outcome.succeeded else 'error'  # also without a message, if there is no reader


def count(kinds, folder) -> dict:
    "Kind -> outcome -> number of cases."
    runner = Runner()
    numbers = {k: collections.Counter() for k in kinds}
    make_shared(runner, folder / 'shared')
    for i, case in enumerate(cases(*kinds)):
        outcome, complaints = judge(runner, case, folder / str(i), folder / 'shared')
        kind = outcome_of(outcome, complaints)
        numbers[case.kind][kind] += 1
        if kind == 'contract broken':
            print(f'{case.kind}: {case}: {"; ".join(complaints)[:500]}', flush=True)
    runner.close()
    return numbers


def main(words):
    "Count and write."
    file = Path(words[0]) if words and words[0].endswith('.csv') else ROOT / 'nbs' / 'results' / 'hostile.csv'
    kinds = [w for w in words if not w.endswith('.csv')] or KINDS
    with tempfile.TemporaryDirectory(prefix='hostile ', ignore_cleanup_errors=True) as folder:
        numbers = count(kinds, Path(folder))
    with open(file, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['kind', *OUTCOMES])
        writer.writerows([kind, *(numbers[kind][o] for o in OUTCOMES)] for kind in kinds)
    print(f'{sum(sum(c.values()) for c in numbers.values())} cases: {file}')


if __name__ == '__main__':
    main(sys.argv[1:])
