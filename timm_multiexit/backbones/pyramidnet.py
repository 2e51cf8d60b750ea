"""PyramidNet for 32x32 images."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_multiexit.backbones.staged import StagedNet, cifar_cfg


class PyramidBlock(nn.Module):
    """Norm, 3x3 convolution, norm, ReLU, 3x3 convolution, norm, plus the input, padded with channels of zeros.

    The first convolution has the stride; the input is average-pooled to its size. The output is a tensor of its own,
    and the next block's norm reads it without changing it: a tap may keep it.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        # An odd map keeps its last row and column, as the convolution's does.
        self.pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        self.extra_chs = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out_chs, H / stride, W / stride] of a map [B, in_chs, H, W]."""
        shortcut = F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra_chs))
        x = self.act(self.bn2(self.conv1(self.bn1(x))))
        x = self.bn3(self.conv2(x))
        return x + shortcut


class PyramidNet(StagedNet):
    """Additive PyramidNet: three stages of basic blocks, every block wider than the one before by the same step.

    The blocks are basic ones: depth 110 and alpha 270 then give 286 features and 28.5M parameters, where the paper has
    286 and 28.3M. With bottlenecks they would give 1144 features and 18.5M.

    Args:
        depth: Convolutions on the way and the classifier, 6n + 2 for n blocks per stage.
        alpha: Channels that the last block has more than the stem's 16.
        in_chans: Channels of an image.
        **kwargs: What `StagedNet` takes.

    Source: Han, Kim and Kim, arXiv 1610.02915, additive widths and the unit proposed there;
        jhkim89/PyramidNet@1c5c452:README.md for the counts.
    """

    def __init__(self, depth: int, alpha: int, *, in_chans: int = 3, **kwargs: Any):
        num_blocks = (depth - 2) // 6
        widths = [16 + round(alpha * step / (3 * num_blocks)) for step in range(3 * num_blocks + 1)]
        blocks = [
            PyramidBlock(in_chs, out_chs, stride=2 if idx in (num_blocks, 2 * num_blocks) else 1)
            for idx, (in_chs, out_chs) in enumerate(zip(widths, widths[1:]))
        ]
        ends = [num_blocks, 2 * num_blocks, 3 * num_blocks]
        super().__init__(
            stem=nn.Sequential(nn.Conv2d(in_chans, 16, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(16)),
            stages=[nn.Sequential(*blocks[end - num_blocks : end]) for end in ends],
            channels=[widths[end] for end in ends],
            tail=nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)),
            in_chans=in_chans,
            **kwargs,
        )


default_cfgs = generate_default_cfgs({'cifar_pyramidnet110_270': cifar_cfg(first_conv='stem.0', pool_size=8)})


@register_model
def cifar_pyramidnet110_270(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """Return PyramidNet-110 with alpha 270 for 32x32 images: 28.5M parameters, 4.72 GMACs."""
    return build_model_with_cfg(
        PyramidNet,
        'cifar_pyramidnet110_270',
        pretrained,
        feature_cfg={'out_indices': (0, 1, 2)},
        **{'depth': 110, 'alpha': 270, **kwargs},
    )
