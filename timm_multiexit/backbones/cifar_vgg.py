"""VGG19 with batch norm for 32x32 images."""

from typing import Any

from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_multiexit.backbones.staged import StagedNet, cifar_cfg


class CifarVgg(StagedNet):
    """VGG: stages of 3x3 convolutions, each with norm and ReLU, 2x2 max pooling after every stage, one linear layer.

    The pooling stands at the start of the next stage, so that a stage's map, which exits read, is the one before it.
    The convolutions have no bias, which the norms behind them would take away again.

    The EED paper prints neither its VGG19 nor its exits. Their cost says what they are (Table III, GFLOPs at two per
    multiply-add, exits 1 to 3 and main: 0.14, 0.24, 0.50, 0.80):

    - The path to the end of blocks 1 to 5 costs 0.08, 0.19, 0.46, 0.72 and 0.80, so that the exits stand at blocks 1,
      2 and 3, at 32, 16 and 8 pixels.
    - Main with one linear layer 512-100 comes to 0.80, with the 4096-4096 of ImageNet's VGG to 0.83. Two hidden layers
      of 512 would still be 0.80: one is what the exits have and what CIFAR collections build.
    - Widths and pooling below, taken from the paper's figures, give 0.136, 0.240 and 0.494 for the exits.

    Args:
        layers: Convolutions per stage.
        channels: Channels of each stage.
        in_chans: Channels of an image.
        **kwargs: What `StagedNet` takes.

    Source: Simonyan and Zisserman, arXiv 1409.1556, Table 1.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256, 512, 512),
        *,
        in_chans: int = 3,
        **kwargs: Any,
    ):
        stages = []
        in_chs = channels[0]
        for idx, (num_convs, out_chs) in enumerate(zip(layers, channels, strict=True)):
            # The stem is the first stage's first convolution.
            blocks = [nn.MaxPool2d(2), ConvNormAct(in_chs, out_chs, kernel_size=3)] if idx else []
            blocks += [ConvNormAct(out_chs, out_chs, kernel_size=3) for _ in range(num_convs - 1)]
            stages.append(nn.Sequential(*blocks))
            in_chs = out_chs
        super().__init__(
            stem=ConvNormAct(in_chans, channels[0], kernel_size=3),
            stages=stages,
            channels=channels,
            tail=nn.MaxPool2d(2),
            in_chans=in_chans,
            **kwargs,
        )
        # A width of 0 is 2x2 max pooling without a convolution.
        self.multiexit_preset = {
            'exits': ['layer1', 'layer2', 'layer3'],
            'head_widths': [[128, 0, 256, 512], [256, 0, 512], [512]],
        }


default_cfgs = generate_default_cfgs({'cifar_vgg19_bn': cifar_cfg(first_conv='stem.conv', pool_size=1)})


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """Return VGG19 with batch norm for 32x32 images: 20.1M parameters, 0.40 GMACs."""
    return build_model_with_cfg(CifarVgg, 'cifar_vgg19_bn', pretrained, **{'layers': (2, 2, 4, 4, 4), **kwargs})
