__version__ = "0.1.0"

import warnings
# fastai.layers calls torch.jit.script when it is imported: that is for fastai to change, and not for who reads this
warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning, r'torch\.jit\._script')
