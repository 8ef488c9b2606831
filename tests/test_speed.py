"Test the fast copies of networks for forward passes and training steps, and the threads that read and compute."

import pickle
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

from dr_transfer.data.views import map_batches, normalize, stack_images
from dr_transfer.models import network as model
from dr_transfer.models import speed
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import Body
from dr_transfer.models.speed import RUNTIMES, FixedBN, forward_copy, get_runtime, kept_memory, training_copy

FAST = RUNTIMES['channels_last']
BF16 = RUNTIMES['bf16']
PLAIN = RUNTIMES['plain']


def lively(net):
    "BatchNorm statistics as after training, not zero and one"
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for v, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight.data, 0.5), (m.bias.data, -0.5)):
                v.uniform_(low, low + 1, generator=g)
    return net.eval()


# ---------------------------------------------------------------- the copy


@pytest.mark.parametrize(
    'arch',
    [
        'efficientnet_lite0',
        'resnet18',
        'test_resnet',
        'mobilenet_v2',
        'squeezenet1_1',
        'densenet121',
        'timm.resnetv2_50',
        'test_vit',
        'test_convnext',
    ],
)
def test_a_copy_has_the_same_output(arch):
    torch.manual_seed(0)
    net = lively(create_body(arch, 'random'))
    size = 160 if 'vit' in arch or 'convnext' in arch else 64
    x = torch.randn(2, 3, size, size)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        want = net(x)
        out = forward_copy(net, FAST, x)(FAST.place(x))
    assert (out - want).abs().max() <= 1e-3 * want.abs().max()
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    for p in net.parameters():
        assert p.requires_grad


@pytest.mark.parametrize(
    'arch,left',
    [
        ('efficientnet_lite0', 0),
        ('resnet18', 0),
        ('test_resnet', 0),
        ('timm.resnetv2_50', None),
    ],
)
def test_what_is_folded(arch, left):
    net = lively(create_body(arch, 'random'))
    there = [
        sum(isinstance(m, nn.BatchNorm2d) for m in n.modules())
        for n in (net, forward_copy(net, FAST, torch.randn(1, 3, 64, 64)))
    ]
    assert (
        there[0] > there[1] == left if left is not None else there[0] > there[1] > 0
    )  # a BatchNorm before a convolution cannot be folded


def test_weights_in_bfloat16_only_where_autocast_would_put_them():
    net = create_body('test_convnext', 'random').eval()
    copy = forward_copy(net, BF16, torch.randn(1, 3, 160, 160))
    kinds = {type(m): m.weight.dtype for m in copy.modules() if getattr(m, 'weight', None) is not None}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == torch.bfloat16
    assert {v for k, v in kinds.items() if 'Norm' in k.__name__} == {torch.float32}


def test_the_plain_runtime_is_the_network_itself():
    net = create_body('test_resnet', 'random').eval()
    assert forward_copy(net, PLAIN, torch.randn(1, 3, 64, 64)) is net


class Twice(nn.Module):
    "The output of the convolution is used with and without BatchNorm"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return x + self.bn(x)


def test_layers_that_cannot_be_folded():
    net = lively(Twice())
    x = torch.randn(2, 3, 8, 8)
    copy = forward_copy(net, FAST, x)
    with torch.no_grad():
        assert isinstance(copy.bn, nn.BatchNorm2d)
        assert torch.allclose(copy(x), net(x), atol=1e-6)


def test_a_network_without_weights():
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Body(net, FAST)(x), net(x))


# ---------------------------------------------------------------- when the copy is used


@pytest.fixture
def body():
    torch.manual_seed(0)
    return Body(lively(create_body('test_resnet', 'random')), FAST).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_a_copy_is_made_once(body, x):
    with torch.no_grad():
        body(x)
        first = body.fast_stages(x)
        assert first is not body.stages
        assert body.fast_stages(x) is first


@pytest.mark.parametrize(
    'change',
    [
        lambda b: b.stages.load_state_dict({k: v * 1.1 for k, v in b.stages.state_dict().items()}),
        lambda b: next(b.stages.parameters()).data.zero_() if b.train() and b.eval() else None,
        lambda b: setattr(
            next(m for m in b.stages.modules() if isinstance(m, nn.Conv2d)),
            'weight',
            nn.Parameter(torch.zeros(next(m for m in b.stages.modules() if isinstance(m, nn.Conv2d)).weight.shape)),
        ),
        lambda b: next(m for m in b.stages.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(1),
        lambda b: setattr(b, 'forward_runtime', PLAIN),
    ],
    ids=['loaded', 'trained', 'replaced', 'statistics', 'runtime'],
)
def test_a_change_is_detected(body, x, change):
    with torch.no_grad():
        old = body.fast_stages(x)
        change(body)
        assert body.fast_stages(x) is not old
        assert torch.allclose(body(x), body.stages(x), atol=1e-3)


def test_hooks_are_called_by_the_stages(body, x):
    recorded = []
    hook = body.stages[-1].register_forward_hook(lambda m, i, o: recorded.append(o))
    with torch.no_grad():
        body(x)
    assert len(recorded) == 1
    hook.remove()
    with torch.no_grad():
        body(x)
    assert len(recorded) == 1


def test_gradients_reach_the_weights(body, x):
    body.train_runtime = body.forward_runtime  # the same for both
    body(x).square().mean().backward()
    for p in body.stages.parameters():
        assert p.grad is not None


def test_a_pickled_body_has_no_copy(body, x):
    with torch.no_grad():
        body.fast_stages(x)
    assert len(pickle.dumps(body)) < 1.2 * len(pickle.dumps(body.stages))
    assert '_copy' not in body.state_dict()


# ---------------------------------------------------------------- training steps


def a_step(net, x, of):
    "Output of `net`, gradients of the weights of `of`, and its statistics afterwards"
    of.zero_grad()
    out = net(x).float()
    out.square().mean().backward()
    return (
        out.detach(),
        {k: p.grad.clone() for k, p in of.named_parameters() if p.grad is not None},
        {k: b.clone() for k, b in of.named_buffers()},
    )


def far(a, b):
    return float((a - b).norm() / (b.norm() + 1e-12))


@pytest.mark.parametrize(
    'arch, mode',
    [
        *(
            (a, 'fixed')
            for a in (
                'efficientnet_lite0',
                'resnet18',
                'test_resnet',
                'mobilenet_v2',
                'densenet121',
                'timm.resnetv2_50',
                'test_convnext',
                'small_cnn',
            )
        ),
        *((a, m) for a in ('efficientnet_lite0', 'test_resnet', 'small_cnn') for m in ('moving', 'mixed')),
    ],
)
def test_a_training_copy_computes_the_same_step(arch, mode):
    torch.manual_seed(0)
    net = lively(create_body(arch, 'random')).double().to(memory_format=torch.channels_last).train(mode != 'fixed')
    x = FAST.place(torch.randn(4, 3, *[160 if 'convnext' in arch else 64] * 2, dtype=torch.double))
    if mode == 'mixed':
        net[0].eval()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0
    before = {k: b.clone() for k, b in net.named_buffers()}
    steps = training_copy(net, FAST, x)
    folded, there = (
        sum(isinstance(m, kind) for m in n.modules()) for kind, n in ((FixedBN, steps), (nn.BatchNorm2d, net))
    )
    if mode == 'moving' or not there:
        assert not folded
    elif mode == 'fixed':
        assert folded == there if arch in ('resnet18', 'efficientnet_lite0') else 0 < folded <= there
    out, grads, after = a_step(steps, x, net)
    for k, b in net.named_buffers():
        b.copy_(before[k])
    want, true, moved = a_step(net, x, net)
    assert far(out, want) < 1e-6
    assert grads.keys() == true.keys() == dict(net.named_parameters()).keys()
    assert far(*(torch.cat([g[k].flatten() for k in true]) for g in (grads, true))) < 1e-6
    for k in moved:
        assert torch.allclose(after[k].double(), moved[k].double())
    assert any(not torch.equal(before[k], moved[k]) for k in moved) == (
        mode != 'fixed' and any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    )


def test_an_optimiser_works_with_a_training_copy():
    nets = []
    for runtime in (PLAIN, FAST):
        torch.manual_seed(0)
        body = Body(lively(create_body('test_resnet', 'random')), train_runtime=runtime)
        opt = torch.optim.SGD(body.parameters(), 1e-3, momentum=0.9)
        for _ in range(4):
            opt.zero_grad()
            body(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))).square().mean().backward()
            opt.step()
        nets.append(body.stages)
    moved = [torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets]
    start = torch.cat([p.detach().flatten() for p in lively(create_body('test_resnet', 'random')).parameters()])
    assert far(moved[1], moved[0]) < 1e-4 < far(start, moved[0])


def test_frozen_weights_get_no_gradient():
    body = Body(lively(create_body('test_resnet', 'random')), train_runtime=FAST)
    body.stages[:2].requires_grad_(False)
    body(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for p in body.stages.parameters():
        assert (p.grad is None) != p.requires_grad


@pytest.mark.parametrize(
    'change',
    [
        lambda b: b.stages[1].train(),
        lambda b: setattr(b, 'train_runtime', BF16),
        lambda b: setattr(
            next(m for m in b.stages.modules() if isinstance(m, nn.Conv2d)),
            'weight',
            nn.Parameter(torch.zeros_like(next(b.stages.parameters()))),
        ),
    ],
    ids=['mode', 'runtime', 'replaced'],
)
def test_a_change_creates_a_new_training_copy(body, x, change):
    body.train_runtime = FAST
    old = body.fast_stages(x)
    assert body.fast_stages(x) is old is not body.stages
    with torch.no_grad():
        next(body.stages.parameters()).mul_(0.5)
    assert body.fast_stages(x) is old
    assert torch.allclose(body(x), body.stages(x), rtol=1e-3, atol=1e-4)  # the weights are those of the network
    change(body)
    assert body.fast_stages(x) is not old


def test_depthwise_convolutions_train_in_float32():
    torch.manual_seed(0)
    net = create_body('efficientnet_lite0').eval().to(memory_format=torch.channels_last)
    x = FAST.place(torch.randn(4, 3, 64, 64))
    kinds = {}
    grads = []
    steps = training_copy(net, BF16, x)
    for m in steps.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, i, o: kinds.setdefault(m.groups > 1, set()).add(o.dtype))
    with BF16.cast():
        grads.append(a_step(steps, x, net)[1])
    grads.append(a_step(net, x, net)[1])
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert torch.cosine_similarity(*(torch.cat([v.flatten() for v in g.values()]) for g in grads), dim=0) > 0.99


STEPS = """
from pathlib import Path

import torch

from dr_transfer.models.speed import kept_memory


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


def a_step():
    torch.zeros(2**26)  # 256 MB, allocated and freed


with kept_memory():
    pass  # what the imports have freed is returned
before = resident()
a_step()
print(resident() - before)
with kept_memory():
    with kept_memory():
        pass  # a runtime is measured while a body is trained
    a_step()
    print(resident() - before)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
def test_memory_is_kept_for_the_next_step_and_returned_at_the_end():
    # in its own process: what earlier tests have left free in the heap would be used again and not returned
    done = subprocess.run([sys.executable, '-c', STEPS], capture_output=True, text=True, check=True)
    outside, within, afterwards = map(int, done.stdout.split())
    assert outside < 2**27
    assert within > 2**27
    assert afterwards < 2**27


def test_memory_kept_does_not_hide_errors():
    with pytest.raises(KeyError), kept_memory():
        raise KeyError


# ---------------------------------------------------------------- threads


def pixels(i):
    return np.full((4, 4, 3), i, np.uint8)


@pytest.mark.parametrize('n', [0, 1, 7, 8, 50])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_results_are_in_order(n, device):
    def read(i):
        time.sleep(0.002 * (i % 3))
        return pixels(i)

    out = list(map_batches(lambda x: x[:, 0, 0, 0].tolist(), list(range(n)), read, 3, device))
    assert list(chain.from_iterable(out)) == list(range(n))
    for o in out[:-1]:
        assert len(o) == 3


def test_threads_are_as_before_and_a_core_each():
    "For any number of batches, because the number of threads affects the last bits"
    before = torch.get_num_threads()
    recorded = []
    torch.set_num_threads(3)

    def count(x):
        recorded.append(torch.get_num_threads())
        return x

    for sources in (list(range(64)), [1]):
        list(map_batches(count, sources, pixels, 2))
    assert set(recorded) == {1}
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('n', [1, 5, 8, 9])
def test_batches_have_one_shape(device, n):
    "The last is filled up with black images, which have no results"
    shapes = set()
    black = []

    def f(x):
        shapes.add((tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)))
        black.append(int((x.flatten(1) == 0).all(1).sum()))
        return {'a': x[:, 0, 0, 0], 'b': x[:, 0].numpy()}

    out = list(map_batches(f, list(range(1, n + 1)), pixels, 4, device))
    assert shapes == {((4, 3, 4, 4), True)}
    assert sum(black) == -n % 4
    assert (
        torch.cat([o['a'] for o in out]).tolist()
        == list(range(1, n + 1))
        == np.concatenate([o['b'] for o in out])[:, 0, 0].tolist()
    )


def test_only_a_few_batches_are_read_ahead():
    read = []
    batches = map_batches(lambda x: x, list(range(1000)), lambda i: read.append(i) or pixels(i), 1)
    next(batches)
    time.sleep(0.05)
    assert len(read) <= 4 * torch.get_num_threads() + 4
    batches.close()
    n = len(read)
    time.sleep(0.05)
    assert len(read) == n
    assert not [t for t in threading.enumerate() if t.name.startswith('ThreadPoolExecutor') and t.is_alive()]


def test_an_error_is_raised():
    def read(i):
        if i == 5:
            raise ValueError('five')
        return pixels(i)

    out = []
    batches = map_batches(lambda x: x[:, 0, 0, 0].tolist(), list(range(40)), read, 2)
    with pytest.raises(ValueError, match='five'):
        for b in batches:
            out.append(b)
    assert out == [[0, 1], [2, 3]]


def test_channels_last_and_normalised():
    x = stack_images([pixels(i) for i in (0, 255)])
    y = normalize(x, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    assert x.shape == y.shape == (2, 3, 4, 4)
    for t in (x, y):
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y[:, :, 0, 0], torch.tensor([[-1, -0.5, 0], [1, 1.5, 1]]))
    wide = normalize(torch.randint(0, 255, (2, 3, 5, 7), dtype=torch.uint8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert wide.shape == (2, 3, 5, 7)


def test_the_runtime_of_an_unnamed_network_is_not_stored(monkeypatch, tmp_path):
    "Otherwise the next body would get its runtime."
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path))
    rates = iter(({'plain': 1, 'channels_last': 9, 'bf16': 1}, {'plain': 1, 'channels_last': 1, 'bf16': 9}))
    monkeypatch.setattr(speed, 'measure_runtimes', lambda *a, **k: next(rates))
    assert [get_runtime('auto', nn.Conv2d(3, 4, 3)), get_runtime('auto', nn.Linear(3, 4))] == [FAST, BF16]
    assert not list(tmp_path.iterdir())


def test_gradients_of_the_image_after_a_prediction():
    "The copy was made without gradients"
    body = Body(create_body('test_resnet', 'random').requires_grad_(False), FAST).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        want = body(x)
    x.requires_grad_()
    out = body(x)
    out.square().mean().backward()
    assert torch.allclose(out, want, atol=1e-5)
    assert x.grad.abs().sum() > 0


def test_a_body_created_under_inference_mode():
    with torch.inference_mode():
        body = Body(create_body('test_resnet', 'random'), FAST).eval()
        assert torch.allclose(body(torch.ones(1, 3, 32, 32)), body.stages(torch.ones(1, 3, 32, 32)), atol=1e-4)


def test_threads_share_one_copy(monkeypatch):
    made = []
    monkeypatch.setattr(model, 'forward_copy', lambda *a: made.append(1) or time.sleep(0.05) or forward_copy(*a))
    body = Body(create_body('test_resnet', 'random'), FAST).eval()

    def run(i):
        with torch.inference_mode():
            return body(torch.ones(1, 3, 32, 32))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(8)))
    assert len(made) == 1
