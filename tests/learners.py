"Helpers for tests of networks and learners: states to compare, and networks with random statistics."

import numpy as np
import torch
from torch import nn

from dr_transfer.models.stages import Stages, layer_groups


def quiet(learn, what, *args, **kwargs):
    "Call a method of a learner without its output."
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, what)(*args, **kwargs)


def state_of(learn):
    "A copy of every parameter and buffer of a learner."
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same_state(a, b):
    "Whether two states have the same tensors under the same names."
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def groups(learn):
    "A copy of every parameter and buffer by group, head last."
    body = learn.model[0][0].stages
    if isinstance(body, Stages):
        parts = [stage.state_dict() for stage in body]
    else:
        assert not list(body.buffers())
        parts = [dict(enumerate(parameters)) for parameters in layer_groups(body).values()]
    parts.append(learn.model[1].state_dict())
    return [{k: v.detach().clone() for k, v in part.items()} for part in parts]


def moved(before, after):
    "Return for each group whether it changed."
    return [not all(torch.equal(v, old[k]) for k, v in new.items()) for old, new in zip(before, after)]


def disturb(net, convolutions=False):
    "Set random BatchNorm statistics, and random convolutions on request, so that the output depends on the input."
    for module in net.modules():
        if convolutions and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


class Known:
    "Features from given arrays: name -> array (n, views, channels)"

    def __init__(self, **arrays):
        self.arrays = arrays

    def __len__(self):
        return len(next(iter(self.arrays.values())))

    @property
    def stages(self):
        return {name: array.shape[-1] for name, array in self.arrays.items()}

    def numpy(self, stages):
        if isinstance(stages, str):
            return self.arrays[stages]
        return np.concatenate([self.arrays[stage] for stage in stages], -1)
