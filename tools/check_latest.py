"Check that the second environment has what the first one cannot have: fastcore 2 or newer, and no nbdev."

import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name):
    "Return the installed version of a package, or None."
    try:
        return version(name)
    except PackageNotFoundError:
        return None


fastcore, nbdev = installed('fastcore'), installed('nbdev')
if nbdev or int(fastcore.split('.')[0]) < 2:
    sys.exit(
        f'fastcore {fastcore} and nbdev {nbdev} are installed, but fastcore 2 or newer without nbdev is needed: '
        'remove .venv-latest and run again'
    )
print(f'fastai {installed("fastai")}, fastcore {fastcore}, no nbdev')
