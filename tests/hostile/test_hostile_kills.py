"""Kill commands at random times and run them again: the results are identical, and no temporary files remain.

SIGKILL cannot be caught: the next run finds what was on disk at that time.
"""

import os
import random
import shutil

import pytest
from inputs import ALL_CASES, PLAIN, SMALL, place
from observe import WALL, Command, run, snapshot

KILLS = 25 if ALL_CASES else 5  # of each command
WORDS = {
    'train': lambda at, out: ['train', at.flowers, *SMALL, *PLAIN, '--out', out],
    'predict': lambda at, out: ['predict', at.shared / 'flower_run', at.flowers, *PLAIN, '--out', out],
    'evaluate': lambda at, out: [
        'evaluate',
        at.shared / 'fundus_run',
        at.fundus,
        '--allow-leaks',
        '--resamples',
        '100',
        *PLAIN,
        '--out',
        out,
    ],
    'preprocess': lambda at, out: ['preprocess', at.fundus, out, '--size', '48', '--workers', '2'],
}
NAMES = {'train': 'run', 'predict': 'out.csv', 'evaluate': 'out.html', 'preprocess': 'prepared'}
OWN_NOTES = ('journal.jsonl',)  # in what order a preparation got on is no result


def command_of(kind, at) -> Command:
    "The command at a place; it writes into results/, which holds nothing else."
    (at.root / 'results').mkdir(exist_ok=True)
    return Command(WORDS[kind](at, at.root / 'results' / NAMES[kind]), [at.root / 'results'])


def results(at) -> dict:
    "Each path that a command left in results/ -> its type and content."
    found = snapshot(at.root / 'results')
    return {
        os.path.relpath(p, at.root / 'results'): (v[0], v[-1])
        for p, v in found.items()
        if os.path.basename(p) not in OWN_NOTES
    }


@pytest.fixture(scope='module')
def undisturbed(runner, shared, tmp_path_factory):
    "The results and the duration of each command without a kill."
    made = {}

    def of(kind):
        if kind not in made:
            at = place(tmp_path_factory.mktemp('undisturbed') / 'case', shared)
            outcome = run(runner, command_of(kind, at), at)
            assert outcome.code == 0, outcome.err
            made[kind] = outcome.seconds, results(at), set(os.listdir(at.root))
        return made[kind]

    return of


def leftovers(at, allowed) -> list:
    "Files in the folders of a case that a run without a kill does not have."
    new = set(os.listdir(at.root)) - allowed
    return sorted(new) + [os.path.join(d, f) for d in ('tmp', 'work', 'home') for f in os.listdir(at.root / d)]


@pytest.mark.parametrize('number', range(KILLS))
@pytest.mark.parametrize('kind', sorted(WORDS))
def test_killed_and_run_again(kind, number, runner, shared, undisturbed, tmp_path):
    seconds, expected, beside = undisturbed(kind)
    rng = random.Random(f'{kind} {number}')
    at = place(tmp_path / 'case', shared)
    moments = [rng.uniform(0.05, 1) * seconds for _ in range(1 + number % 2)]  # every other time twice
    for moment in moments:
        run(runner, command_of(kind, at), at, wall=moment)
        clear_what_the_system_clears(at)
    outcome = run(runner, command_of(kind, at), at, wall=WALL)
    assert outcome.code == 0 or 'exists already' in outcome.err, outcome.err  # it had been quick enough to end
    found = results(at)
    assert sorted(found) == sorted(expected), f'killed after {moments} s: left behind or missing'
    assert found == expected, f'killed after {moments} s: {[k for k in expected if found[k] != expected[k]]}'
    assert not leftovers(at, beside)


def clear_what_the_system_clears(at):
    "The system deletes temporary files itself, so the next command does not need to."
    shutil.rmtree(at.tmp)
    at.tmp.mkdir()
