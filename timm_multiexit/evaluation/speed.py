"""Measured speed: images per second of policies on a batch, milliseconds of one image to each exit."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.truncation import truncate
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.timing import describe_ratios, time_interleaved


def compile_network(network: nn.Module, **options: Any) -> None:
    """Compile a network in place, see `torch.nn.Module.compile`, and remember how for `make_plain`."""
    network.compile(**options)
    network._compile_options = options  # type: ignore[assignment]


def make_plain(model: MultiExitModel) -> nn.Module:
    """Return main alone, as timm runs it, compiled as the model is."""
    plain = truncate(model, -1).backbone
    if options := getattr(model, '_compile_options', None):
        plain.compile(**options)
    return plain


@torch.no_grad()
def time_policies(
    model: MultiExitModel,
    images: Tensor,
    policies: Mapping[str, ExitPolicy],
    *,
    rounds: int,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, Any]]:
    """Return img/s and time_ratio, the time relative to main's, of each policy on a batch.

    'main', as timm runs it, and 'all exits' are timed with the policies, in turns; numbers are medians of the rounds.
    The model is in eval mode, the batch [B, C, H, W] on its device and of mixed classes: images of one class leave
    alike. The precision is the accelerator's, else the model's.
    """
    plain = make_plain(model)
    variants: dict[str, Callable[[], object]] = {
        'main': partial(plain, images),
        'all exits': partial(model, images, exits=True),
        **{name: partial(model.infer, images, policy) for name, policy in policies.items()},
    }
    with accelerator.autocast() if accelerator else nullcontext():
        times = time_interleaved(variants, rounds, images.device)
    return {
        name: {
            'img/s': len(images) / statistics.median(seconds),
            'time_ratio': describe_ratios(seconds, times['main'])[0],
        }
        for name, seconds in times.items()
    }


@torch.no_grad()
def time_exits(
    model: MultiExitModel, images: Tensor, *, rounds: int, accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """Return the latency of one image to each classifier alone: batch_size, rounds, device, and ms, name -> median.

    Names are 'main in timm', without hooks, the exits' indices as text, and 'main'. All are timed in turns. The model
    is in eval mode, the images [B, C, H, W] are on its device, and the first is timed.
    """
    image = images[:1]
    variants: dict[str, Callable[[], object]] = {
        'main in timm': partial(make_plain(model), image),
        **{str(idx): partial(model, image, exit_idx=idx) for idx in range(len(model.exits))},
        'main': partial(model, image),
    }
    with accelerator.autocast() if accelerator else nullcontext():
        times = time_interleaved(variants, rounds, image.device)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return {'batch_size': 1, 'rounds': rounds, 'device': str(image.device), 'ms': ms}


@torch.no_grad()
def time_networks(
    variants: Mapping[str, Callable[[Tensor], object]],
    images: Mapping[str, Tensor],
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, float]]:
    """Return images per second of networks: name -> batch size as text -> median, all timed in turns.

    Args:
        variants: Name -> what takes a batch [B, C, H, W].
        images: Name -> its images [N, C, H, W] on the device, of mixed classes, N the largest batch size or more. As
            many are taken as make 32, or one batch, and are given batch by batch: one image leaves early or late.
        batch_sizes: From 1 to N.
        rounds: Turns of each.
        accelerator: Gives precision; none for that of the models.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in variants}
    device = next(iter(images.values())).device
    for size in batch_sizes:
        batches = {
            name: tensor[: max(size, min(len(tensor), _TIMED) // size * size)] for name, tensor in images.items()
        }
        calls = {name: partial(_run_each, variant, batches[name].split(size)) for name, variant in variants.items()}
        with accelerator.autocast() if accelerator else nullcontext():
            times = time_interleaved(calls, rounds, device)
        for name, seconds in times.items():
            found[name][str(size)] = len(batches[name]) / statistics.median(seconds)
    return found


_TIMED = 32  # images of a turn where batches are smaller


def _run_each(variant: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
    for batch in batches:
        variant(batch)
