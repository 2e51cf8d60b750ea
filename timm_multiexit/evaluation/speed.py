"""Speed."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.truncation import truncate
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.timing import describe_ratios, time_interleaved


@torch.no_grad()
def time_policies(
    model: MultiExitModel,
    images: Tensor,
    policies: Mapping[str, ExitPolicy],
    *,
    rounds: int,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, Any]]:
    """Return how fast each policy is on a batch: name -> img/s, and its time as a ratio to plain timm's.

    'plain timm' and 'all exits' are timed with them, in turns.

    Args:
        model: In eval mode.
        images: A batch [B, C, H, W] on the model's device. Images of one class leave alike, so it should be mixed.
        policies: Name -> policy.
        rounds: Turns of each, of whose times and ratios the median counts.
        accelerator: Gives precision; none for that of the model.
    """
    plain = truncate(model, -1).backbone
    variants = {'plain timm': lambda: plain(images), 'all exits': lambda: model(images, exits=True)}
    for name, policy in policies.items():
        variants[name] = lambda policy=policy: model.infer(images, policy)
    with accelerator.autocast() if accelerator else nullcontext():
        times = time_interleaved(variants, rounds, images.device)
    return {
        name: {
            'img/s': len(images) / statistics.median(seconds),
            'time_ratio': describe_ratios(seconds, times['plain timm'])[0],
        }
        for name, seconds in times.items()
    }


@torch.no_grad()
def time_exits(
    model: MultiExitModel, images: Tensor, *, rounds: int, accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """Return how long one image takes to each classifier alone: batch_size, rounds, device, and ms, name -> median.

    Names are 'plain timm', the indices of the exits as `model(x, exit_idx=...)` takes them, and 'main'. All are timed
    in turns.

    Args:
        model: In eval mode.
        images: [B, C, H, W] on the model's device, of which the first is timed.
        rounds: Turns of each.
        accelerator: Gives precision; none for that of the model.
    """
    image, plain = images[:1], truncate(model, -1).backbone
    variants: dict[str, Callable[[], object]] = {'plain timm': partial(plain, image)}
    for idx in range(len(model.exits)):
        variants[str(idx)] = partial(model, image, exit_idx=idx)
    variants['main'] = partial(model, image)
    with accelerator.autocast() if accelerator else nullcontext():
        times = time_interleaved(variants, rounds, image.device)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return {'batch_size': 1, 'rounds': rounds, 'device': str(image.device), 'ms': ms}
