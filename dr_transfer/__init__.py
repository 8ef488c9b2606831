__version__ = "0.2.0"

import warnings

import lazy_loader

# fastai.layers calls torch.jit.script when it is imported: that is for fastai to change, and not for who reads this
warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning, r'torch\.jit\._script')

# The public names stand in __init__.pyi, where editors and type checkers read them as well. A name is imported when
# it is first used, so that `import dr_transfer` takes no time. nbdev writes the first line of this file and no other.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
