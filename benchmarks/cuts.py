"""Networks cut by hand: what somebody would write who needs one exit and nothing else."""

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from timm_multiexit.exits.layouts import to_map
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.models.multi_exit import MultiExitModel

Network = Callable[[Tensor], Tensor]


def copy_plain(model: MultiExitModel) -> nn.Module:
    """Return the plain timm model: a copy of the backbone without hooks."""
    plain = deepcopy(model.backbone)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return plain


@torch.inference_mode()
def cut_by_hand(model: MultiExitModel, plain: nn.Module, exit_idx: int, images: Tensor) -> Network | None:
    """Return the backbone up to a tap without hooks, and the exit's head: images [B, C, H, W] -> logits.

    The backbone is cut by timm's `forward_intermediates`, or by calling its children one after the other.

    Args:
        model: In eval mode.
        plain: Its backbone without hooks, see `copy_plain`.
        exit_idx: Exit, 0 is the shallowest.
        images: What a cut is tried on; it counts where logits and features are those of the model.

    Returns:
        None where neither way gives the tap's tensor.
    """
    head = model.exits[exit_idx]
    outputs = model(images, exits=True)
    for path in _find_paths(plain, model.exits.specs[exit_idx], images):
        # What does not fit together fails in many ways, and a cut that fails is only left out.
        try:
            results = head(path(images))
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
            continue
        if all(map(_is_close, results, (outputs.logits[exit_idx], outputs.features[exit_idx]))):
            return lambda x: head(path(x))[0]
    return None


def _is_close(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and bool((given - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def _find_paths(plain: nn.Module, spec: ExitSpec, images: Tensor) -> Iterator[Network]:
    """Yield functions from images to what may be the map at a tap."""
    if hasattr(plain, 'forward_intermediates'):
        takes = inspect.signature(plain.forward_intermediates).parameters
        if next(iter(takes)) == 'x' and {'indices', 'stop_early', 'intermediates_only'} <= set(takes):
            kwargs = {'intermediates_only': True, **({'norm': False} if 'norm' in takes else {})}
            maps = plain.forward_intermediates(images, **kwargs)
            for idx, features in enumerate(maps):
                if isinstance(features, Tensor) and features.shape[1] == spec.channels:
                    # The index as a default, since the loop continues.
                    yield lambda x, idx=idx: plain.forward_intermediates(x, indices=[idx], stop_early=True, **kwargs)[0]
    layers = nn.Sequential(*_layers_up_to(plain, spec.module.split('.')))
    yield lambda x: to_map(layers(x), spec, x.shape[-2:])


def _layers_up_to(module: nn.Module, path: list[str]) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name == path[0]:
            yield from _layers_up_to(child, path[1:]) if path[1:] else (child,)
            return
        yield child
