"""The small ResNets of three stages for 32x32 images: 6n + 2 layers of 16, 32 and 64 channels."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from timm_multiexit.backbones.staged import StagedNet, cifar_cfg


class PadShortcut(nn.Module):
    """The shortcut without parameters: every second pixel of the input, padded with `extra_chs` channels of zeros.

    Source: He et al., arXiv 1512.03385, option A.

    >>> import torch
    >>> PadShortcut(1)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist()
    [1.0, 0.0]
    """

    def __init__(self, extra_chs: int):
        super().__init__()
        self.extra_chs = extra_chs

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C + extra_chs, H / 2, W / 2] of a map [B, C, H, W]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra_chs))


class SmallCifarResNet(StagedNet):
    """The CIFAR-10 ResNet of He et al.: three stages of timm's basic blocks, shortcuts without parameters.

    The EED paper has no such network. Its exits stand where its own would, at the end of every stage but the last, and
    their heads are as its are, the fewest convolutions of stride 2 that bring the map to the last stage's size; but
    their widths are those of the stages that they stand for: the paper's 256 channels would cost more than the whole
    network.

    Args:
        num_blocks: Blocks per stage, n.
        channels: Channels of each stage.
        in_chans: Channels of an image.
        **kwargs: What `StagedNet` takes.

    Source: He et al., arXiv 1512.03385, Section 4.2 and Table 6.
    """

    def __init__(self, num_blocks: int, channels: tuple[int, ...] = (16, 32, 64), *, in_chans: int = 3, **kwargs: Any):
        stages = []
        in_chs = channels[0]
        for idx, out_chs in enumerate(channels):
            first = BasicBlock(
                in_chs, out_chs, stride=2 if idx else 1, downsample=PadShortcut(out_chs - in_chs) if idx else None
            )
            stages.append(nn.Sequential(first, *(BasicBlock(out_chs, out_chs) for _ in range(num_blocks - 1))))
            in_chs = out_chs
        super().__init__(
            stem=nn.Sequential(
                nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(channels[0]),
                nn.ReLU(inplace=True),
            ),
            stages=stages,
            channels=channels,
            tail=nn.Identity(),
            in_chans=in_chans,
            **kwargs,
        )
        self.multiexit_preset = {
            'exits': [f'layer{idx}' for idx in range(1, len(channels))],
            'head_widths': [list(channels[idx:]) for idx in range(1, len(channels))],
        }


_LAYERS = (8, 20, 32, 56)

default_cfgs = generate_default_cfgs(
    {f'cifar_resnet{layers}': cifar_cfg(first_conv='stem.0', pool_size=8) for layers in _LAYERS}
)


def _create(layers: int, pretrained: bool, kwargs: dict[str, Any]) -> SmallCifarResNet:
    return build_model_with_cfg(
        SmallCifarResNet,
        f'cifar_resnet{layers}',
        pretrained,
        feature_cfg={'out_indices': (0, 1, 2)},
        **{'num_blocks': (layers - 2) // 6, **kwargs},
    )


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """Return ResNet-8 for 32x32 images: 0.08M parameters, 12.2 MMACs with ten classes."""
    return _create(8, pretrained, kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """Return ResNet-20 for 32x32 images: 0.27M parameters, 41 MMACs with ten classes."""
    return _create(20, pretrained, kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """Return ResNet-32 for 32x32 images: 0.46M parameters, 69 MMACs with ten classes."""
    return _create(32, pretrained, kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """Return ResNet-56 for 32x32 images: 0.85M parameters, 126 MMACs with ten classes."""
    return _create(56, pretrained, kwargs)
