"""How long each part of a model takes, measured: the costs of exits in milliseconds."""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from timm_multiexit.budgets import StageCosts
from timm_multiexit.metrics import describe_environment
from timm_multiexit.routing import RunHead
from timm_multiexit.taps import Taps
from timm_multiexit.timing import read_wall_clock, time_interleaved


@torch.no_grad()
def measure_stages(
    backbone: nn.Module, taps: Taps, images: Tensor, *, run_head: RunHead, rounds: int = 10
) -> StageCosts:
    """Return the medians of the times to each tap and of each head, in milliseconds per image.

    Args:
        backbone: In eval mode.
        taps: Its taps.
        images: A batch [B, C, H, W].
        run_head: Gives an exit's logits.
        rounds: Turns of each part; they interleave, so that a busy machine slows all alike.
    """
    tensors = [taps.stop(backbone, images, idx) for idx in range(len(taps.names))]
    variants: dict[str, Callable[[], object]] = {'main': partial(backbone, images)}
    for idx, tensor in enumerate(tensors):
        variants[f'path {idx}'] = partial(taps.stop, backbone, images, idx)
        variants[f'head {idx}'] = partial(run_head, idx, tensor)
    times = time_interleaved(variants, rounds, images.device, clock=read_wall_clock)
    ms = {name: 1e3 * statistics.median(seconds) / len(images) for name, seconds in times.items()}
    # A deeper tap is never sooner; measured, it may be by the noise.
    paths = accumulate([*(ms[f'path {idx}'] for idx in range(len(tensors))), ms['main']], max)
    return StageCosts(tuple(paths), tuple(ms[f'head {idx}'] for idx in range(len(tensors))), 'ms')


def describe_times(images: Tensor) -> str:
    """Return what times of a batch must be stamped with: hardware, device and batch size.

    Args:
        images: The batch [B, C, H, W] that was timed.
    """
    return f'{describe_environment()["hardware"]}, {images.device}, batch of {len(images)}'
