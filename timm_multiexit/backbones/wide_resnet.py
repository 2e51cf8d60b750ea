"""WideResNet for 32x32 images."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_multiexit.backbones.staged import StagedNet, cifar_cfg


class WideBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, the first one with the stride, twice, plus the shortcut.

    Where the number of channels changes the shortcut is a 1x1 convolution of the first activation. The output is a
    tensor of its own, and the next block's norm reads it without changing it: a tap may keep it.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, out_chs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, kernel_size=3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out_chs, H / stride, W / stride] of a map [B, in_chs, H, W]."""
        activated = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        x = self.conv1(activated)
        x = self.conv2(self.act2(self.bn2(x)))
        return x + shortcut


class WideResNet(StagedNet):
    """WideResNet: three stages of pre-activation blocks, 16, 32 and 64 channels times a factor.

    `drop_rate` is timm's, in front of the classifier; there is none inside the blocks.

    Args:
        depth: Convolutions on the way, 6n + 4 for n blocks per stage.
        width: The factor.
        in_chans: Channels of an image.
        **kwargs: What `StagedNet` takes.

    Source: Zagoruyko and Komodakis, arXiv 1605.07146, Table 1.
    """

    def __init__(self, depth: int, width: int, *, in_chans: int = 3, **kwargs: Any):
        channels = (16 * width, 32 * width, 64 * width)
        num_blocks = (depth - 4) // 6
        stages = []
        in_chs = 16
        for idx, out_chs in enumerate(channels):
            first = WideBlock(in_chs, out_chs, stride=2 if idx else 1)
            stages.append(nn.Sequential(first, *(WideBlock(out_chs, out_chs) for _ in range(num_blocks - 1))))
            in_chs = out_chs
        super().__init__(
            stem=nn.Conv2d(in_chans, 16, kernel_size=3, padding=1, bias=False),
            stages=stages,
            channels=channels,
            tail=nn.Sequential(nn.BatchNorm2d(in_chs), nn.ReLU(inplace=True)),
            in_chans=in_chans,
            **kwargs,
        )


default_cfgs = generate_default_cfgs({'cifar_wide_resnet28_10': cifar_cfg(first_conv='stem', pool_size=8)})


@register_model
def cifar_wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Return WideResNet-28-10 for 32x32 images: 36.5M parameters, 5.24 GMACs."""
    return build_model_with_cfg(
        WideResNet,
        'cifar_wide_resnet28_10',
        pretrained,
        feature_cfg={'out_indices': (0, 1, 2)},
        **{'depth': 28, 'width': 10, **kwargs},
    )
