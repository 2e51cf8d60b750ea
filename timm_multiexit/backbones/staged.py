"""What the CIFAR networks share: their configuration, their exits, and the model around the stages."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from torch import Tensor, nn

# Of CIFAR-100's training images, the data set of the paper's tables. (The authors' script normalizes CIFAR-100 with
# CIFAR-10's numbers.)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)


def cifar_cfg(*, first_conv: str, pool_size: int) -> dict[str, Any]:
    """Return the configuration timm keeps for a network: CIFAR-100's classes, size and statistics, no weights.

    The map that is pooled for the classifier is of `pool_size` x `pool_size`, of a 32x32 image.
    """
    return {
        'num_classes': 100,
        'input_size': (3, 32, 32),
        'pool_size': (pool_size, pool_size),
        'crop_pct': 1.0,
        'mean': CIFAR100_MEAN,
        'std': CIFAR100_STD,
        'first_conv': first_conv,
        'classifier': 'fc',
        'license': 'apache-2.0',
    }


def paper_exits(num_stages: int, num_features: int) -> dict[str, Any]:
    """Return the exits of a network whose stages are `layer1`, `layer2`, ..., each half as large as the one before.

    There is one exit after each stage but the last. Its head brings the map to the last stage's size by 3x3
    convolutions of stride 2, whose widths count backwards from the last: `num_features`, 256, 128.

    Source: Lee and Lee, arXiv 2104.00299, Section III. That rule gives the costs of its ResNets (Table III); of its
    networks with three stages the paper prints neither widths nor costs.

    >>> paper_exits(3, 640)['head_widths']
    [[256, 640], [640]]
    """
    return {
        'exits': [f'layer{stage}' for stage in range(1, num_stages)],
        'head_widths': [
            [*(256 >> step for step in reversed(range(num_stages - stage - 1))), num_features]
            for stage in range(1, num_stages)
        ],
    }


def init_convs(module: nn.Module) -> None:
    """Draw the weights of all convolutions from He's normal distribution, by fan out.

    Source: hjdw2/Exit-Ensemble-Distillation@7825885:resnet.py.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode='fan_out', nonlinearity='relu')


class StagedNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ..., a tail, pooling and one linear classifier, with timm's surface.

    Args:
        stem: From the image to the input of the first stage, [B, C, H, W], no smaller than the image.
        stages: The stages' blocks. The first stage keeps the size of the map, each other one halves it.
        channels: Channels of each stage's map.
        tail: What stands between the last stage and the pooling; it keeps the number of channels.
        num_classes: Outputs of the classifier; 0 leaves it out and the logits are the features.
        in_chans: Channels of an image.
        global_pool: Type of pooling, timm's names.
        drop_rate: Dropout probability in front of the classifier, in training.
        device: Where the weights are; the default device if not given.
        dtype: Of the weights; the default dtype if not given.

    Attributes:
        multiexit_preset: The paper's exits as arguments of `timm_multiexit.attach_exits`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Sequential],
        channels: Sequence[int],
        tail: nn.Module,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = channels[-1]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stem = stem
        self.feature_info = []
        for idx, (stage, num_chs) in enumerate(zip(stages, channels, strict=True)):
            name = f'layer{idx + 1}'
            self.add_module(name, stage)
            self.feature_info.append({'num_chs': num_chs, 'reduction': 2**idx, 'module': name})
        self.tail = tail
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.multiexit_preset = paper_exits(len(channels), self.num_features)
        init_convs(self)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map [B, num_features, h, w] that is pooled, of images [B, in_chans, H, W]."""
        x = self.stem(x)
        for info in self.feature_info:
            stage = getattr(self, info['module'])
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return self.tail(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes], or features [B, head_hidden_size], of `forward_features`' map."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one with so many outputs, 0 for none, on the device of the rest."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        pool, fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))
        self.global_pool, self.fc = pool.train(self.training), fc.train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer decay: the stem, then stages or blocks, the tail with the last of them."""
        blocks = r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)'
        return {'stem': r'^stem', 'blocks': [(blocks, None), (r'^tail', (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the blocks' activations for a second forward, in training."""
        self.grad_checkpointing = enable
