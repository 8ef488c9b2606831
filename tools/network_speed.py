"""Measure images a second of forward passes of pretrained networks, beside the bare network.

    python tools/network_speed.py           # a minute for ten networks
    python tools/network_speed.py resnet18  # others, of the registry, timm or torchvision

Batches of 8 random images in memory go through the network of timm or torchvision as it is made (float32, with its
classifier), and through the same network as dr_transfer runs it: without the classifier, in the memory format and
precision that were the fastest on this CPU, with BatchNorm folded into convolutions. The weights are random. The two
are measured in turn, in one process, and the fastest of several rounds counts. The results are written to
nbs/results/network_speed.csv.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import make_body
from dr_transfer.models.registry import build_network, find_backbone, nearest_size
from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.places import atomic_file

RESULT = Path(__file__).resolve().parent.parent / 'nbs' / 'results' / 'network_speed.csv'
NETWORKS = (
    'efficientnet_lite0',
    'efficientnet_lite1',
    'efficientnet_lite2',
    'mobilenet_v2',
    'squeezenet1_1',
    'resnet50',
    'convnext_tiny_dinov3',
    'mobileclip_s0',
    'dinov2_small',
    'dinov3_small',
    'siglip2_base',
)
SIZE = 224  # height and width in pixels, or the nearest that a network can read
N = 8  # images in a batch
ROUNDS = 7


def seconds(f, x) -> float:
    "Time of one call"
    start = time.perf_counter()
    f(x)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name) -> dict:
    "Images a second of the bare network and of ours"
    spec = find_backbone(name)
    size = nearest_size(spec, SIZE)
    torch.manual_seed(0)
    body = make_body(create_body(name, 'random', size=size), size, 'auto').eval()
    torch.manual_seed(0)
    bare = build_network(replace(spec, size=size)).eval()
    x = torch.randn(N, 3, size, size)
    times = {'bare': [], 'ours': []}
    for _ in range(ROUNDS):
        times['bare'].append(seconds(bare, x))
        times['ours'].append(seconds(body, x))
    rates = {key: N / min(values) for key, values in times.items()}
    return {
        'network': name,
        'size': size,
        'parameters': sum(p.numel() for p in bare.parameters()),
        'bare': rates['bare'],
        'ours': rates['ours'],
        'ratio': rates['ours'] / rates['bare'],
        'runtime': str(body.forward_runtime),
    }


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', default=list(NETWORKS))
    p.add_argument('--out', type=Path, default=RESULT)
    a = p.parse_args()
    rows = []
    for name in a.networks:
        rows.append(measure(name))
        print(*[f'{v:.2f}' if isinstance(v, float) else v for v in rows[-1].values()], flush=True)
    with atomic_file(a.out) as f:
        write_csv(pd.DataFrame(rows).round(2), f)


if __name__ == '__main__':
    main()
