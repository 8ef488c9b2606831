"The table of pretrained networks: names that exist, what the weights expect, licences, what they were trained on."

import argparse

import pytest
import timm
import torch
from helpers import error_line, good

from dr_transfer.commands.backbones import _names
from dr_transfer.models.backbones import backbone_table, create_body
from dr_transfer.models.registry import BACKBONES, build_network, commercial_use, find_backbone
from dr_transfer.models.weights import WeightsError

OF_TIMM = [b for b in BACKBONES.values() if b.library == 'timm']
NEW = [
    'dinov2_small',
    'dinov3_small',
    'pe_core_small',
    'siglip2_base',
    'mobileclip_s0',
    'convnext_tiny_dinov3',
    'retfound_mae',
    'retfound_dinov2',
    'retfound_green',
    'fundus_dr_mobilenet',
]


@pytest.mark.parametrize('spec', OF_TIMM, ids=lambda b: b.name)
def test_names_of_timm(spec):
    "Each exists, and weights of timm's repository have timm's normalisation and its licence"
    assert timm.is_model(spec.factory)
    cfg = timm.get_pretrained_cfg(spec.factory)
    assert cfg is not None
    if spec.hub and spec.hub == cfg.hf_hub_id:
        assert (spec.mean, spec.std) == (tuple(cfg.mean), tuple(cfg.std))
        same = {'DINOv3 License': 'dinov3-license', 'Apple AMLR': 'apple-amlr'}.get(spec.licence, spec.licence.lower())
        assert cfg.license == same
        assert spec.size in (cfg.input_size[-1], 224)


@pytest.mark.parametrize('name', NEW)
def test_new_entries_are_complete(name):
    spec = find_backbone(name)
    assert spec.licence
    assert spec.pretrained_on
    assert spec.hub or spec.page or spec.file.startswith('https://')


@pytest.mark.parametrize('spec', [b for b in OF_TIMM if b.weights != 'wheel'], ids=lambda b: b.name)
def test_networks_run_at_their_size(spec):
    with torch.device('meta'):
        net = build_network(spec).eval().requires_grad_(False)
    with torch.no_grad():
        out = net(torch.empty(1, 3, spec.size, spec.size, device='meta'))
    assert len(out) == 1


def test_sizes_and_patches_of_the_retinal_networks():
    with torch.device('meta'):
        grids = {n: build_network(find_backbone(n)).patch_embed for n in NEW if n.startswith(('retfound', 'dinov2'))}
    assert {n: p.grid_size for n, p in grids.items()} == {
        'retfound_mae': (14, 14),
        'retfound_dinov2': (16, 16),
        'retfound_green': (28, 28),
        'dinov2_small': (16, 16),
    }


@pytest.mark.parametrize(
    'licence, answer',
    [
        ('Apache-2.0', 'yes'),
        ('mit', 'yes'),
        ('cc-by-4.0', 'yes'),
        ('CC BY-NC 4.0', 'no'),
        ('cc-by-nc-4.0', 'no'),
        ('apple-amlr', 'no'),
        ('CNCRL (non-commercial research)', 'no'),
        ('dinov3-license', 'ask'),
        ('see torchvision', 'ask'),
        ('not stated', 'ask'),
        ('permitted', 'ask'),
        ('', ''),
    ],
)
def test_commercial_use(licence, answer):
    assert commercial_use(licence) == answer


def test_a_gated_network_names_its_file_and_its_page(tmp_path, monkeypatch):
    monkeypatch.setenv('DR_TRANSFER_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr('dr_transfer.models.backbones.build_network', lambda spec: timm.create_model('test_vit'))
    with pytest.raises(WeightsError) as e:
        create_body('retfound_mae')
    words = ['RETFound_mae_natureCFP.pth', 'https://huggingface.co/YukunZhou/RETFound_mae_natureCFP', str(tmp_path)]
    assert all(w in str(e.value) for w in words)


def test_a_checkpoint_of_dinov2_in_its_own_layout(tmp_path, capsys):
    "As RETFound-DINOv2 is published: the teacher of a training, with heads and options, at 518 pixels"
    torch.manual_seed(0)
    trunk = timm.create_model('vit_small_patch14_dinov2', num_classes=0).state_dict()
    assert trunk['pos_embed'].shape[1] == 37 * 37 + 1
    teacher = {f'backbone.{k}': v for k, v in trunk.items()}
    teacher |= {'backbone.mask_token': torch.ones(1, 384), 'dino_head.mlp.0.weight': torch.ones(3, 3)}
    content = {'teacher': teacher, 'args': argparse.Namespace(lr=0.1), 'iteration': 7}
    torch.save(content, tmp_path / 'w.pth')
    body = create_body('dinov2_small', tmp_path / 'w.pth')
    state = body.state_dict()
    key = next(k for k in state if k.endswith('blocks_11.mlp.fc2.weight'))
    assert torch.equal(state[key], trunk['blocks.11.mlp.fc2.weight'])
    assert next(v for k, v in state.items() if k.endswith('pos_embed')).shape[1] == 16 * 16 + 1
    assert "(entry 'teacher'): " in capsys.readouterr().out


@pytest.mark.parametrize('name, pool', [('retfound_green', 'mean'), ('dinov2_small', 'token')])
def test_tokens_are_pooled_as_in_the_pretraining(name, pool):
    assert create_body(name, 'random').pool == pool
    assert create_body(name, 'random', pool='max').pool == 'max'


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_table():
    out = good('backbones').out
    for name in BACKBONES:
        assert f'\n{name} ' in out
    for words in ('commercial use', 'trained on', 'weights from', 'YukunZhou/RETFound_mae_natureCFP', 'hf_hub:'):
        assert words in out
    assert 'images a second' not in out


def test_the_command_for_a_task():
    dr = good('backbones', '--task', 'dr').out
    flowers = _names('flowers')
    assert dr.index('retfound_mae') < dr.index('efficientnet_lite0')
    assert 'retfound_mae' not in flowers
    assert 'dinov2_small' in flowers
    assert 'unknown task' in error_line('backbones', '--task', 'cats')


def test_the_command_measures_speed(monkeypatch):
    monkeypatch.setattr('dr_transfer.commands.backbones._names', lambda task: ['cifarnet'])
    assert 'images a second' in good('backbones', '--speed').out


def test_table_of_a_network_without_a_licence():
    t = backbone_table(['cifarnet', 'test_vit'])
    assert t.commercial_use.tolist() == ['', 'yes']
    assert t.pretrained_on.tolist() == ['', '']
