"""timm's families of classifiers, one member of each."""

import timm

from timm_multiexit.models.attach import attach_exits

NAMES = [name for name in timm.list_models() if not name.startswith('cifar_')]


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


# Images are this large where a family allows it, else as small as it allows.
IMAGE_PX = 64


OTHER_PX = {
    'CrossVit': 240,
    'DeepseekVitClassifier': 112,
    'EfficientFormer': 224,
    'InceptionResnetV2': 96,
    'InceptionV3': 96,
    'InceptionV4': 96,
}


DEPTHS = dict.fromkeys(['DeepseekVitClassifier', 'Gemma4VitClassifier', 'Qwen3VitClassifier'], 4)


def make_small(family):
    """Return a multi-exit model of a family's smallest member, ten classes, for images as small as it allows."""
    pixels = OTHER_PX.get(family, IMAGE_PX)
    kwargs = {'num_classes': 10, **({'depth': DEPTHS[family]} if family in DEPTHS else {})}
    try:
        backbone = timm.create_model(FAMILIES[family], img_size=pixels, **kwargs)
    except TypeError:  # any size will do
        backbone = timm.create_model(FAMILIES[family], **kwargs)
    return attach_exits(backbone, input_size=(3, pixels, pixels)).eval()
