"""How a backbone lays its features out: maps, grids of tokens, and what enters its classifier."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import InvalidValueError


def to_map(x: Tensor, spec: ExitSpec, image_size: Sequence[int]) -> Tensor:
    """Return what an exit's module gives, [B, C, H, W], [B, H, W, C] or tokens [B, L, C], as a map [B, C, H, W].

    The height and width of the images tell the shape of the grid of tokens.
    """
    if spec.layout == 'NCHW':
        return x
    if spec.layout == 'NHWC':
        return x.permute(0, 3, 1, 2)
    x = x[:, spec.num_prefix_tokens :]
    height = _grid_height(x.shape[1], image_size, spec.reduction)
    return x.transpose(1, 2).unflatten(2, (height, -1))  # [B, C, H, W]


@torch.fx.wrap  # it looks at numbers that a tracer does not know
def _grid_height(length: int, image_size: Sequence[int], reduction: int) -> int:
    """Return the height of a grid of so many tokens over an image: by its reduction, rounded up or down, or its aspect.

    Backbones that pad or crop by their own rule fit no reduction exactly; then the divisor of the aspect nearest to the
    image's counts.
    """
    height, width = image_size
    for rows in (-(-height // reduction), height // reduction):
        for columns in (-(-width // reduction), width // reduction):
            if rows * columns == length:
                return rows
    divisors = [rows for rows in range(1, length + 1) if length % rows == 0]
    return min(divisors, key=lambda rows: abs(math.log(rows * rows * width / (length * height))))


def check_tokens(backbone: nn.Module, specs: Sequence[ExitSpec]) -> None:
    """Raise `InvalidValueError` where tokens that heads read are not those of a grid that the images tell."""
    heads = {spec.head for spec in specs if spec.layout == 'NLC'}
    size: Any = getattr(getattr(backbone, 'patch_embed', None), 'patch_size', None)
    if heads and is_list(size) and len(set(size)) > 1:
        raise InvalidValueError(f'patch_size must be square for exits on tokens, got {tuple(size)}.')
    rates = [
        module.prob for module in backbone.modules() if isinstance(module, (PatchDropout, PatchDropoutWithIndices))
    ]
    if heads - {'linear'} and any(rates):
        raise InvalidValueError(
            f'patch_drop_rate must be 0 for heads with convolutions, got {max(rates)}: the patches that are left are no'
            " grid. Pass head='linear'."
        )


def is_distilled(backbone: nn.Module) -> bool:
    """Return whether a backbone has a second classifier for a teacher's answers, as timm's distilled models have."""
    return hasattr(backbone, 'set_distilled_training')


def main_logits(backbone: nn.Module, output: Any) -> Any:
    """Return main's logits [B, C] of what a backbone gave.

    The two outputs of a distilled model, which it gives apart in distilled training, are averaged, as timm does in all
    other forwards. Of other models with several outputs the first is main's, as timm's scripts take it; what follows
    are auxiliary classifiers, of which the answer does not depend.
    """
    if not isinstance(output, (tuple, list)):
        return output
    first, *others = output
    return sum(others, first) / len(output) if is_distilled(backbone) else first


def combine_features(entering: Sequence[Tensor]) -> Tensor:
    """Return main's features [B, D] of what entered its classifiers, [B, D], [B, D, 1, 1] or [B, L, D] tensors.

    Several of one width are averaged, as distilled models average their logits; of several widths (the branches of
    multi-scale models) they are concatenated. Of a sequence of tokens the first counts, which attention pools read; a
    map, which a convolution classifies in front of the pooling (SqueezeNet), is averaged.
    """
    flat = [_flatten(tensor) for tensor in entering]
    if len({tensor.shape[1] for tensor in flat}) > 1:
        return torch.cat(flat, 1)
    return flat[0] if len(flat) == 1 else torch.stack(flat).mean(0)


def _flatten(tensor: Tensor) -> Tensor:
    if tensor.ndim == 3:
        return tensor[:, 0]
    is_map = tensor.ndim == 4 and tensor.shape[2] * tensor.shape[3] > 1
    return tensor.mean((2, 3)) if is_map else tensor.flatten(1)


def read_layout(
    tensor: Tensor, entry: Mapping[str, Any], input_size: tuple[int, int, int]
) -> tuple[str, int, int, tuple[int, int]] | None:
    """Return layout, prefix tokens, channels and (height, width) of a tensor, None if it is not a map.

    The tensor is of one image; `entry` is what `feature_info` has of the stage, and 'last', whether maps are NHWC where
    it leaves a doubt.
    """
    if tensor.shape[0] != 1:  # not one row per image: the inner tokens of TNT
        return None
    if tensor.ndim == 4:
        # `feature_info` tells the channels; without it, the two equal (or nearest) sides are height and width.
        channels = entry.get('num_chs')
        last = tensor.shape[3] == channels and (tensor.shape[1] != channels or entry['last'])
        if channels is None or channels not in (tensor.shape[1], tensor.shape[3]):
            fits_last, fits_first = fit_layouts(tensor.shape, input_size)
            last = fits_last < fits_first or (fits_last == fits_first and entry['last'])
        if last:
            return 'NHWC', 0, tensor.shape[3], (tensor.shape[1], tensor.shape[2])
        return 'NCHW', 0, tensor.shape[1], (tensor.shape[2], tensor.shape[3])
    if tensor.ndim == 3:
        grid = _find_grid(tensor.shape[1], entry.get('reduction'), input_size)
        if grid:
            return 'NLC', tensor.shape[1] - grid[0] * grid[1], tensor.shape[2], grid
    return None


def fit_layouts(shape: Sequence[int], input_size: tuple[int, int, int]) -> tuple[float, float]:
    """Return how far the aspect of a map of four sides is from the image's, as [B, H, W, C] and as [B, C, H, W]."""
    aspect = input_size[1] / input_size[2]
    return abs(shape[1] / shape[2] - aspect), abs(shape[2] / shape[3] - aspect)


def _find_grid(length: int, reduction: int | None, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """Return height and width of the grid at the end of so many tokens, at most 16 of them in front of it."""
    _, height, width = input_size
    reductions: list[float] = [reduction] if reduction else []
    # Else from the count: the largest grid of the image's aspect that fits.
    reductions += [height / rows for rows in range(int((length * height / width) ** 0.5) + 1, 0, -1)]
    for pixels in reductions:
        for grid in ((-(-height // pixels), -(-width // pixels)), (height // pixels, width // pixels)):
            grid = (int(grid[0]), int(grid[1]))
            if 0 <= length - grid[0] * grid[1] <= 16 and min(grid) > 0:
                return grid
    return None
