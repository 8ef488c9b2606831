"Helpers for tests of networks and learners: states to compare, sets to train on, and networks with random statistics."

import numpy as np
import timm
import torch
from families import NOT_A_CHAIN
from safetensors.torch import save_file
from torch import nn

from dr_transfer.core import build_learner
from dr_transfer.models.stages import Stages, layer_groups
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import make_dr

ARCHS = ('test_resnet', 'test_efficientnet', 'test_vit')
CLASSES = ('daisy', 'roses', 'sunflowers')
CPU = torch.device('cpu')


def make_sets(folder, n_flowers):
    "Make small synthetic sets, and tiny networks with random weights and statistics."
    make_flowers(folder / 'flowers', n=n_flowers, size=64, classes=CLASSES)
    make_dr(folder / 'dr', n=40, size=64)
    for arch in (*ARCHS, NOT_A_CHAIN):
        torch.manual_seed(0)
        net = timm.create_model(arch)
        disturb(net)
        save_file(net.state_dict(), folder / f'{arch}.safetensors')


def learner_builder(folder, **defaults):
    "Return a function that builds learners on the sets of `make_sets`, whose weights count as pretrained."

    def build(task='flowers', arch='test_resnet', data=None, **options):
        settings = {'size': 64, 'runtime': 'plain', 'num_workers': 0, 'device': CPU, **defaults}
        weights = folder / f'{arch}.safetensors'
        if weights.exists():
            settings['weights'] = weights
        settings.update(options)
        return build_learner(folder / task if data is None else data, task, arch, **settings)

    return build


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
    body = learn.body.stages
    if isinstance(body, Stages):
        parts = [stage.state_dict() for stage in body]
    else:
        assert not list(body.buffers())
        parts = [dict(enumerate(parameters)) for parameters in layer_groups(body).values()]
    parts.append(learn.head.state_dict())
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
