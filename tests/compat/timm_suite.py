"""A plugin of pytest with which timm's own tests make models with exits; `test_timm_suite.py` runs them so.

`timm.create_model` gives what timm makes with exits attached. Where gradients are tested, all exits are run, since timm
wants one for every parameter.
"""

import pytest
import timm
from helpers.families import FAMILIES

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.multi_exit import MultiExitModel

# Families whose smallest member is large, or slow.
LEFT_OUT = (
    'Beit CSATv2 CoaT ConvMixer DaVit DeepseekVitClassifier DenseNet EfficientVitLarge FocalNet Gemma4VitClassifier'
    ' HieraDet HighResolutionNet InceptionResnetV2 InceptionV3 InceptionV4 MobileNetV5 MultiScaleVit NASNetALarge'
    ' NaFlexVit Nest NextViT PNASNet5Large Qwen3VitClassifier RDNet Sequencer2d SwinTransformerV2 SwinTransformerV2Cr'
    ' TResNet Twins VGG VOLO VisionTransformerSAM Xception XceptionAligned'
).split()
NETWORKS = [name for family, name in FAMILIES.items() if family not in LEFT_OUT]
QUICK = [name for name in NETWORKS if name.startswith('test_')] + ['mobilenetv3_small_050', 'pit_ti_224']

# Which tests of timm, for which networks.
TESTS = {
    'test_model_forward': NETWORKS,
    'test_model_backward': NETWORKS,
    'test_model_default_cfgs': NETWORKS,
    'test_model_default_cfgs_non_std': NETWORKS,
    'test_model_forward_intermediates': QUICK,
    'test_model_forward_fx': QUICK,
    'test_reset_classifier_keeps_pool': QUICK,
}

create_plain_model = timm.create_model


def create_model(*args, **kwargs):
    """Make what timm makes, with exits; on the meta device, where tests make many, with heads that are found at once."""
    model = create_plain_model(*args, **kwargs)
    is_meta = next(model.parameters()).is_meta
    return attach_exits(model, head='linear' if is_meta else 'conv')


def pytest_configure():
    """Take timm's place, in a run that has this file as its plugin."""
    timm.create_model = create_model


class _OfBackbone(type):
    def __instancecheck__(cls, model):
        return isinstance(getattr(model, 'backbone', model), cls.classes)


def pytest_collection_modifyitems(items):
    """Keep one test of each kind for each network of the table, whatever tags of it timm tests."""
    kept = {}
    for item in items:
        if item.originalname in TESTS:
            name = item.callspec.params['model_name'].split('.')[0]
            if name in TESTS[item.originalname]:
                kept.setdefault((item.originalname, name), item)
    items[:] = kept.values()
    for module in {item.module for item in items}:
        # Told apart by type there: those whose pooling is not their last layer but one.
        module.EARLY_POOL_MODELS = _OfBackbone('EarlyPool', (), {'classes': module.EARLY_POOL_MODELS})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Run all exits in the tests of gradients."""
    if item.originalname != 'test_model_backward':
        return (yield)
    forward = MultiExitModel.forward
    MultiExitModel.forward = lambda model, x: forward(model, x, exits=True).logits
    try:
        return (yield)
    finally:
        MultiExitModel.forward = forward
