"""ResNet and ResNeXt for 32x32 images: timm's, with a 3x3 stem that keeps the image's size."""

from typing import Any

from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_multiexit.backbones.staged import cifar_cfg, init_convs, paper_exits


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 convolution of stride 1 for a stem, no max pooling, and three or four stages.

    Its keys are timm's. Convolutions start as He normal, fan out, and all norms at one, as in the authors' code;
    timm itself starts the last norm of each block at zero.

    Args:
        block: Type of the blocks, `BasicBlock` or `Bottleneck`.
        layers: Blocks per stage.
        channels: Width of each stage's blocks, before the block's expansion.
        in_chans: Channels of an image.
        zero_init_last: Start the last norm of each block at zero.
        **kwargs: What timm's `ResNet` takes.

    Attributes:
        multiexit_preset: The paper's exits as arguments of `timm_multiexit.attach_exits`.

    Source: He et al., arXiv 1512.03385; Xie et al., arXiv 1611.05431; hjdw2/Exit-Ensemble-Distillation@7825885:
        resnet.py, which has no activation behind the stem's norm: we have it, as He et al. do.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        *,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        in_chans: int = 3,
        zero_init_last: bool = False,
        **kwargs: Any,
    ):
        block_type: Any = block  # timm declares an instance
        super().__init__(
            block_type, layers, channels=channels, in_chans=in_chans, zero_init_last=zero_init_last, **kwargs
        )
        # timm's own layers have other types.
        bn1: Any = self.bn1
        conv1: Any = nn.Conv2d(
            in_chans, bn1.num_features, kernel_size=3, padding=1, bias=False, **get_device_dtype(self)
        )
        init_convs(conv1)
        maxpool: Any = nn.Identity()
        self.conv1, self.maxpool = conv1, maxpool
        for idx in range(len(channels), 4):
            # timm's forward names four stages.
            self.add_module(f'layer{idx + 1}', nn.Sequential())
        # timm's stem shrinks the image by four, this one keeps it.
        stages: list[dict[str, Any]] = self.feature_info
        self.feature_info = [{**info, 'reduction': max(1, info['reduction'] // 4)} for info in stages]
        self.multiexit_preset = paper_exits(len(channels), self.num_features)


default_cfgs = generate_default_cfgs(
    {
        'cifar_resnet18': cifar_cfg(first_conv='conv1', pool_size=4),
        'cifar_resnet50': cifar_cfg(first_conv='conv1', pool_size=4),
        'cifar_resnet101': cifar_cfg(first_conv='conv1', pool_size=4),
        'cifar_resnet152': cifar_cfg(first_conv='conv1', pool_size=4),
        'cifar_resnext29_4x64d': cifar_cfg(first_conv='conv1', pool_size=8),
    }
)


def _create(name: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> CifarResNet:
    args = {**model_args, **kwargs}
    # The stem and the stages.
    indices = tuple(range(1 + len(args['layers'])))
    return build_model_with_cfg(CifarResNet, name, pretrained, feature_cfg={'out_indices': indices}, **args)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-18 for 32x32 images: 11.2M parameters, 0.56 GMACs."""
    return _create('cifar_resnet18', pretrained, {'block': BasicBlock, 'layers': (2, 2, 2, 2)}, kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-50 for 32x32 images: 23.7M parameters, 1.30 GMACs."""
    return _create('cifar_resnet50', pretrained, {'block': Bottleneck, 'layers': (3, 4, 6, 3)}, kwargs)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-101 for 32x32 images: 42.7M parameters, 2.51 GMACs."""
    return _create('cifar_resnet101', pretrained, {'block': Bottleneck, 'layers': (3, 4, 23, 3)}, kwargs)


@register_model
def cifar_resnet152(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-152 for 32x32 images: 58.3M parameters, 3.72 GMACs."""
    return _create('cifar_resnet152', pretrained, {'block': Bottleneck, 'layers': (3, 8, 36, 3)}, kwargs)


@register_model
def cifar_resnext29_4x64d(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNeXt-29, 4x64d, for 32x32 images, of three stages of three blocks: 17.7M parameters, 2.74 GMACs.

    Source: Xie et al., arXiv 1611.05431, Section 5.3, whose 8x64d and 16x64d have 34.4M and 68.1M. The EED paper says
    'ResNeXt29-4' and no more; the 4x64d of some CIFAR collections is another network, with maps twice as wide and
    27.1M parameters.
    """
    model_args = {
        'block': Bottleneck,
        'layers': (3, 3, 3),
        'channels': (64, 128, 256),
        'cardinality': 4,
        'base_width': 64,
    }
    return _create('cifar_resnext29_4x64d', pretrained, model_args, kwargs)
