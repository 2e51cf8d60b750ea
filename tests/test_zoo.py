"""Every registered timm model, as data-free copies, and one real member of every family. Marker `zoo`."""

import logging

import pytest
import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from timm_multiexit.attach import attach_exits
from timm_multiexit.config import MultiExitError

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings('ignore')]

NAMES = [name for name in timm.list_models() if not name.startswith('cifar_')]
NUM_CHUNKS = 32

# Encoders without a classifier: there is nothing that an exit could be an early answer of.
ENCODERS = (
    'deepseek_vit_412m_enc',
    'gemma4_vit_167m_enc',
    'gemma4_vit_570m_enc',
    'mobilenetv5_300m_enc',
    'qwen3_vit_306m_enc',
    'qwen3_vit_416m_enc',
    'qwen3_vit_88m_enc',
)

# The smallest member of each class, encoders apart.
FAMILIES = {
    'Beit': 'beit_base_patch16_224',
    'ByobNet': 'test_byobnet',
    'CPUBone': 'cpubone_nano',
    'CSATv2': 'csatv2',
    'Cait': 'cait_xxs24_224',
    'CoaT': 'coat_tiny',
    'ConVit': 'convit_tiny',
    'ConvMixer': 'convmixer_768_32',
    'ConvNeXt': 'test_convnext',
    'CrossVit': 'crossvit_tiny_240',
    'CspNet': 'cs3darknet_focus_s',
    'CspNext': 'cspnext_tiny',
    'DLA': 'dla46x_c',
    'DPN': 'dpn48b',
    'DaVit': 'davit_tiny',
    'DeepseekVitClassifier': 'deepseek_vit_412m',
    'DenseNet': 'densenet121',
    'EdgeNeXt': 'edgenext_xx_small',
    'EfficientFormer': 'efficientformer_l1',
    'EfficientFormerV2': 'efficientformerv2_s0',
    'EfficientNet': 'test_efficientnet',
    'EfficientViM': 'efficientvim_m1',
    'EfficientViMDistilled': 'efficientvim_m1_dist',
    'EfficientVit': 'efficientvit_b0',
    'EfficientVitLarge': 'efficientvit_l1',
    'EfficientVitMsra': 'efficientvit_m0',
    'Eva': 'eva02_tiny_patch14_224',
    'FastVit': 'fastvit_t8',
    'FasterNet': 'fasternet_t0',
    'FocalNet': 'focalnet_tiny_srf',
    'Gemma4VitClassifier': 'gemma4_vit_167m',
    'GhostNet': 'ghostnet_050',
    'GlobalContextVit': 'gcvit_xxtiny',
    'Hiera': 'hiera_tiny_224',
    'HieraDet': 'hieradet_small',
    'HighPerfGpuNet': 'hgnetv2_b0',
    'HighResolutionNet': 'hrnet_w18_small',
    'IFormer': 'iformer_t',
    'InceptionResnetV2': 'inception_resnet_v2',
    'InceptionV3': 'inception_v3',
    'InceptionV4': 'inception_v4',
    'LCNetV2': 'lcnetv2_small',
    'Levit': 'levit_256d',
    'LevitDistilled': 'levit_128s',
    'LowFormer': 'lowformer_b0',
    'MambaOut': 'test_mambaout',
    'MaxxVit': 'test_coatnet',
    'MetaFormer': 'poolformerv2_s12',
    'MetaNeXt': 'inception_next_atto',
    'MlpMixer': 'gmlp_ti16_224',
    'MobileNetV3': 'mobilenetv3_small_050',
    'MobileNetV5': 'mobilenetv5_base',
    'MultiScaleVit': 'mvitv2_tiny',
    'NASNetALarge': 'nasnetalarge',
    'NaFlexVit': 'naflexvit_base_patch16_parfac_gap',
    'Nest': 'nest_tiny',
    'NextViT': 'nextvit_small',
    'NormFreeNet': 'test_nfnet',
    'PNASNet5Large': 'pnasnet5large',
    'PoolingVisionTransformer': 'pit_ti_224',
    'PyramidVisionTransformerV2': 'pvt_v2_b0',
    'Qwen3VitClassifier': 'qwen3_vit_88m',
    'RDNet': 'rdnet_tiny',
    'RegNet': 'regnetx_002',
    'RepGhostNet': 'repghostnet_050',
    'RepVit': 'repvit_m1',
    'ResNet': 'test_resnet',
    'ResNetV2': 'resnetv2_18',
    'RexNet': 'rexnet_100',
    'SENet': 'legacy_seresnet18',
    'SHViT': 'shvit_s1',
    'SelecSls': 'selecsls42',
    'Sequencer2d': 'sequencer2d_s',
    'StarNet': 'starnet_s050',
    'SwiftFormer': 'swiftformer_xs',
    'SwinTransformer': 'swin_tiny_patch4_window7_224',
    'SwinTransformerV2': 'swinv2_tiny_window8_256',
    'SwinTransformerV2Cr': 'swinv2_cr_tiny_224',
    'TNT': 'tnt_s_legacy_patch16_224',
    'TResNet': 'tresnet_m',
    'TinyVit': 'tiny_vit_5m_224',
    'Twins': 'twins_svt_small',
    'VGG': 'vgg11',
    'VOLO': 'volo_d1_224',
    'Visformer': 'visformer_tiny',
    'VisionTransformer': 'test_vit',
    'VisionTransformerDistilled': 'deit_tiny_distilled_patch16_224',
    'VisionTransformerRelPos': 'test_vit_relpos',
    'VisionTransformerSAM': 'samvit_base_patch16_224',
    'VovNet': 'ese_vovnet19b_slim_dw',
    'Xception': 'legacy_xception',
    'XceptionAligned': 'xception41p',
    'Xcit': 'xcit_nano_12_p8_224',
}


def make_backbone(name):
    backbone = timm.create_model(name)
    return backbone if backbone.num_classes else timm.create_model(name, num_classes=10)


def test_registry_is_the_one_that_was_counted():
    assert len(NAMES) == 1371
    assert set(ENCODERS) <= set(NAMES)
    assert len(NAMES) - len(ENCODERS) == 1364
    assert len(FAMILIES) == 93


@pytest.mark.parametrize('chunk', range(NUM_CHUNKS))
def test_every_name_attaches(chunk, caplog):
    """Names, exits and costs on the meta device: each exit costs at most what the backbone does."""
    caplog.set_level(logging.ERROR)
    wrong = {}
    names = NAMES[chunk::NUM_CHUNKS]
    for name in names:
        with torch.device('meta'):
            backbone = make_backbone(name)
        try:
            costs = attach_exits(backbone).cost()
        except MultiExitError as error:
            if name not in ENCODERS or 'has no classifier module' not in str(error):
                wrong[name] = str(error)
            continue
        if name in ENCODERS or not 1 <= len(costs) - 1 <= 6:
            wrong[name] = f'{len(costs) - 1} exits'
        heads = [cost.head.macs / costs[-1].fixed.macs for cost in costs[:-1]]
        if max(heads) > 0.1 or max(cost.fixed.macs for cost in costs[:-1]) >= costs[-1].fixed.macs:
            wrong[name] = f'heads {heads}, fixed {[cost.fixed.macs for cost in costs]}'
    assert len(names) in (len(NAMES) // NUM_CHUNKS, len(NAMES) // NUM_CHUNKS + 1)
    assert not wrong


@pytest.mark.parametrize('name', FAMILIES.values(), ids=FAMILIES.keys())
def test_family_member_answers_at_every_exit(name):
    backbone = make_backbone(name).eval()
    assert type(backbone).__name__ == next(family for family, member in FAMILIES.items() if member == name)
    x = torch.randn(1, *get_model_input_config(backbone)['input_size'])
    with torch.no_grad():
        plain = backbone(x)
        model = attach_exits(backbone)
        assert torch.equal(model(x), plain)
        outputs = model(x, exits=True)
        assert torch.equal(outputs.logits[-1], plain)
        for idx in range(len(model.exits)):
            torch.testing.assert_close(model(x, exit_idx=idx), outputs.logits[idx], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), plain)
    assert len(model.exits) >= 1
    assert all(logits.shape == plain.shape and logits.isfinite().all() for logits in outputs.logits)
    assert outputs.features[-1].ndim == 2


def first_weight(backbone):
    """Return the first weight of the stem: where every exit's gradient must arrive."""
    return next(module.weight for module in backbone.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize('name', FAMILIES.values(), ids=FAMILIES.keys())
def test_family_member_learns_from_every_exit_with_and_without_checkpointing(name):
    torch.manual_seed(0)
    backbone = make_backbone(name)
    model = attach_exits(backbone).eval()  # norms and dropout at rest, so that two forwards can be compared
    size = get_model_input_config(backbone)['input_size']
    x = torch.randn(1, *size)
    stem = first_weight(backbone)
    gradients, logits = [], []
    for checkpointing in (False, True):
        if checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                pytest.skip(f'{type(backbone).__name__} has no gradient checkpointing: {error}')
        outputs = model(x, exits=True)
        logits.append([tensor.detach() for tensor in outputs.logits])
        for idx, head in enumerate(model.exits):
            loss = outputs.logits[idx].square().sum()
            grads = torch.autograd.grad(loss, [stem, head.fc.weight], retain_graph=not checkpointing)
            assert all(grad.abs().sum() > 0 for grad in grads), f'exit {idx}'
            gradients.append(grads[0])
            if checkpointing:
                break  # a checkpointed graph is gone after one backward
    assert all(torch.equal(first, second) for first, second in zip(*logits))
    torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-3, atol=1e-5)
