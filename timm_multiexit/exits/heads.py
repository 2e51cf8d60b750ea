"""Heads: the small networks that classify at a tap, and the rules for their widths."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from timm.layers import ConvNormAct, LayerNorm2d, SelectAdaptivePool2d, SeparableConvNormAct
from torch import Tensor, nn

from timm_multiexit.utils.errors import InvalidValueError, brief

Widths = tuple[int, ...]


class ExitHead(nn.Module):
    """Convolutions of one of the types in `HEADS`, average pooling, dropout, linear classifier.

    Args:
        head: Key of `HEADS`.
        in_chans: Channels of the tapped map.
        widths: Output channels of the convolutions, see the type's `build`.
        num_classes: Outputs of the classifier; 0 leaves it out and the logits are the features.
        drop_rate: Dropout probability in front of the classifier, in training.

    Raises:
        InvalidValueError: Unknown type, or widths are missing.
    """

    def __init__(self, head: str, *, in_chans: int, widths: Widths, num_classes: int, drop_rate: float = 0.0):
        super().__init__()
        if head not in HEADS:
            raise InvalidValueError(f'head must be one of {", ".join(HEADS)}, got {brief(head)}.')
        if 0 in widths and not HEADS[head].is_paper:
            raise InvalidValueError(f"The widths of a '{head}' head must be > 0, got {brief(list(widths))}.")
        if not widths and HEADS[head].num_widths(1):
            raise InvalidValueError(f"A '{head}' head needs the widths of its convolutions, got none.")
        self.num_features = next((width for width in reversed(widths) if width), in_chans)
        self.convs = HEADS[head].build(in_chans, widths)
        self.global_pool = SelectAdaptivePool2d(pool_type='avg', flatten=True)
        self.drop = nn.Dropout(drop_rate)
        self.projector: nn.Linear | None = None
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear classifier by a fresh one with `num_classes` outputs, on the old one's device."""
        old = next(self.parameters(), None)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.train(self.training)
        if old is not None:
            self.fc.to(device=old.device, dtype=old.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, num_classes] and features [B, num_features] of a map [B, in_chans, H, W].

        In training a projector, if there is one, brings the features that are returned to main's width.
        """
        features = self.global_pool(self.convs(x))
        logits = self.fc(self.drop(features))
        return logits, features if self.projector is None or not self.training else self.projector(features)


class HeadType(NamedTuple):
    """One row of `HEADS`.

    Attributes:
        build: (channels of the map, widths) -> the layers in front of the pooling.
        candidates: (channels of the map, width of main's features, halvings between the map and the last stage) ->
            the widths to choose from, the richest first.
        num_widths: (halvings) -> how many widths `build` takes.
        is_paper: Whether widths are the EED paper's: those of a backbone's preset fit, there may be fewer of them than
            `num_widths` says, and 0 stands for pooling.
    """

    build: Callable[[int, Widths], nn.Module]
    candidates: Callable[[int, int, int], list[Widths]]
    num_widths: Callable[[int], int]
    is_paper: bool = False


def _halve(in_chans: int, width: int) -> nn.Module:
    return ConvNormAct(in_chans, width, kernel_size=3, stride=2)


def _halve_by_bottleneck(in_chans: int, width: int) -> nn.Module:
    return nn.Sequential(
        ConvNormAct(in_chans, width, kernel_size=1), _halve(width, width), ConvNormAct(width, width, kernel_size=1)
    )


def _build_paper(in_chans: int, widths: Widths, halve: Callable[[int, int], nn.Module] = _halve) -> nn.Module:
    """What halves the map, once per width; 2x2 max pooling for a width of 0."""
    layers = []
    for width in widths:
        layers.append(halve(in_chans, width) if width else nn.MaxPool2d(2))
        in_chans = width or in_chans
    return nn.Sequential(*layers)


def _paper_candidates(in_chans: int, num_features: int, halvings: int) -> list[Widths]:
    """Widths counted backwards from main's: D, 256, 128, 64, ...

    Source: Lee and Lee, arXiv 2104.00299, Section III and the exits of its ResNets (64-128-256-512 for ResNet-18's
    first, 256-128-256-2048 for ResNet-50's).
    """
    return [(*(256 >> step for step in reversed(range(halvings - 1))), num_features)]


def _build_conv(in_chans: int, widths: Widths) -> nn.Module:
    """A 1x1 convolution to the first width unless the map has it, a stride-2 separable one per further width."""
    layers: list[nn.Module] = [] if in_chans == widths[0] else [ConvNormAct(in_chans, widths[0], kernel_size=1)]
    layers += [SeparableConvNormAct(i, o, kernel_size=3, stride=2) for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*layers)


def _conv_candidates(in_chans: int, num_features: int, halvings: int) -> list[Widths]:
    """Widths that double with each halving, so that every separable convolution costs about the same."""
    candidates = []
    for last in (512, 384, 256, 192, 128, 96, 64, 48, 32, 16):
        if last <= max(num_features, 16):
            widths = tuple(max(last >> step, 16) for step in reversed(range(halvings)))
            candidates.append((min(in_chans, widths[0]), *widths))
    return candidates


def _build_linear(in_chans: int, widths: Widths) -> nn.Module:
    """A norm over channels alone, free of batch statistics."""
    return LayerNorm2d(in_chans)


HEADS: dict[str, HeadType] = {
    # Narrow by default: heads run on the way to every deeper exit, and their pull on latency is larger than on MACs.
    'conv': HeadType(_build_conv, _conv_candidates, lambda halvings: halvings + 1),
    'paper': HeadType(_build_paper, _paper_candidates, lambda halvings: halvings, is_paper=True),
    # 1x1, stride-2 3x3 and 1x1 convolutions, without a shortcut and all of one width, as hjdw2/BEED has them.
    'bottleneck': HeadType(
        partial(_build_paper, halve=_halve_by_bottleneck), _paper_candidates, lambda halvings: halvings, is_paper=True
    ),
    'linear': HeadType(_build_linear, lambda in_chans, num_features, halvings: [()], lambda halvings: 0),
}
