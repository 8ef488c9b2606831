"Functions of the library that have no command, run in a separate process as the commands are."

import json
from pathlib import Path


def draw(flowers, fundus_folder, site):
    "The sets that all cases share."
    from dr_transfer.synthetic.flowers import make_flowers
    from dr_transfer.synthetic.fundus import make_dr

    make_flowers(flowers, n=18, size=48, seed=0, classes=('daisy', 'roses'))
    make_dr(fundus_folder, n=24, size=64, seed=0, workers=1)
    make_dr(site, n=60, size=64, seed=7, cameras=(2,), workers=1)


def draw_slice(path, spacing='null'):
    "Three windows of the middle slice of a volume."
    from dr_transfer.data.ct import read_volume, three_windows

    spacing = json.loads(spacing)
    volume = read_volume(path) if spacing is None else read_volume(path, spacing)
    middle = volume.mm((len(volume.hu) // 2, 0, 0))[0]
    print(volume, three_windows(volume, middle).size)


def draw_slices(table, folder, out):
    "Images of the slices of a table."
    from dr_transfer.data.ct_images import slice_images

    print(len(slice_images(table, folder, out)))


def draw_candidates(table, folder, out):
    "Images of the candidates of a table."
    from dr_transfer.data.ct_images import candidate_images

    print(len(candidate_images(table, folder, out)))


def load_weights(path):
    "A network with the weights of a file."
    from dr_transfer.models.backbones import create_body

    create_body('small_cnn', Path(path))


def load(folder):
    "A model folder, and its probabilities for a grey image."
    import numpy as np

    from dr_transfer.inference.saved_model import load_model

    model = load_model(folder, 'plain')
    probs = model.probs([np.full((48, 48, 3), 90, np.uint8)])
    print(json.dumps(np.asarray(probs, float).tolist()))


def save_weights(path):
    "The weights of the network that is trained, as a file."
    import torch
    from safetensors.torch import save_file

    from dr_transfer.models.backbones import create_body

    torch.manual_seed(0)
    save_file({k: v.clone().contiguous() for k, v in create_body('small_cnn', 'random').state_dict().items()}, path)
