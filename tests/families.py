"One small network of each family of timm, with random weights, under names that the library finds."

from functools import partial

from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.hiera import Hiera
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

SIZE = 64
_CONFIG = {
    'url': '',
    'num_classes': 5,
    'input_size': (3, SIZE, SIZE),
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
}
_BLOCKS = {'img_size': SIZE, 'patch_size': 16, 'embed_dim': 32, 'depth': 4, 'num_heads': 2}


def _register(name, network, module, **options):
    "Register a network as timm does, as a member of one of its modules."

    def make(pretrained=False, **kwargs):
        kwargs['pretrained_cfg'] = _CONFIG
        return build_model_with_cfg(network, name, pretrained, **{**options, **kwargs})

    make.__name__ = name
    make.__module__ = f'timm.models.{module}'
    register_model(make)


vit = partial(_register, network=VisionTransformer, module='vision_transformer', **_BLOCKS)
vit('small_vit')
vit('small_registers', reg_tokens=4, no_embed_class=True, init_values=1e-5)  # as DINOv2
vit('small_clip', pre_norm=True)
vit('small_siglip', class_token=False, global_pool='map')

eva = partial(_register, network=Eva, module='eva', **_BLOCKS)
eva('small_eva', use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True)
rope = {'use_rot_pos_emb': True, 'use_abs_pos_emb': False, 'no_embed_class': True}
eva('small_rope', **rope, rope_type='mixed')
eva('small_dinov3', **rope, rope_type='dinov3', num_reg_tokens=4, dynamic_img_size=True)
eva('small_pe', use_rot_pos_emb=True, rope_grid_offset=1.0, global_pool='map', attn_pool_num_heads=2)

_register(
    'small_naflex',
    NaFlexVit,
    'naflexvit',
    cfg=NaFlexVitCfg(patch_size=16, embed_dim=32, depth=4, num_heads=2, pos_embed_grid_size=(4, 4), reg_tokens=2),
)
_register(
    'small_swin',
    SwinTransformer,
    'swin_transformer',
    img_size=SIZE,
    window_size=4,
    embed_dim=16,
    depths=(1, 1, 2),
    num_heads=(1, 2, 4),
)
_register(
    'small_hiera',
    Hiera,
    'hiera',
    img_size=(SIZE, SIZE),
    embed_dim=16,
    num_heads=1,
    stages=(1, 1, 2, 1),
    mask_unit_size=(4, 4),
    q_pool=2,
)

_register(
    'small_fastvit',
    FastVit,
    'fastvit',
    layers=(1, 1, 1, 1),
    embed_dims=(8, 16, 32, 64),
    token_mixers=('repmixer', 'repmixer', 'repmixer', 'attention'),
)

NOT_A_CHAIN = 'small_cait'  # its last blocks read only the class token
_register(NOT_A_CHAIN, Cait, 'cait', **_BLOCKS)

TOKENS = (
    'small_vit',
    'small_registers',
    'small_clip',
    'small_siglip',
    'small_eva',
    'small_rope',
    'small_dinov3',
    'small_pe',
    'small_naflex',
    'small_hiera',
)
MAPS = (
    'small_swin',
    'test_maxvit',
    'test_convnext',
    'test_efficientnet',
    'test_resnet',
    'mobilenetv3_small_050',
    'small_fastvit',
)
FAMILIES = (*TOKENS, *MAPS)


def size_of(name):
    "A small image size that a network accepts"
    return 160 if name == 'test_maxvit' else SIZE
