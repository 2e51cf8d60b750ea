"""Models that torch's `fully_shard` (FSDP2) has shared out over processes: brought together, and shared out again."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from timm_multiexit.exits.cost import AnyModule, copy_module, empty_like, sharded_units
from timm_multiexit.utils.checks import check_instance
from timm_multiexit.utils.errors import StateError

Item = TypeVar('Item')


def is_sharded(module: nn.Module) -> bool:
    """Return whether torch's `fully_shard` was called with a module or a part of it."""
    return bool(sharded_units(module))


def check_whole(module: nn.Module, what: str) -> None:
    """Raise for a sharded model, on which `what` would change it, or let its processes wait for each other for ever.

    Raises:
        StateError: The model is sharded.
    """
    # The cheap question first: to walk over the parts takes as long as a small network.
    if torch.distributed.is_available() and torch.distributed.is_initialized() and is_sharded(module):
        raise StateError(
            f'{what} needs a whole model, got one that fully_shard shares out over processes. Call it before'
            ' fully_shard, or on gather_model(model), which every process must call.'
        )


def gather_model(model: AnyModule, *, keeps_data: bool = True) -> AnyModule:
    """Return a whole copy, on the CPU, of a model that torch's `fully_shard` shares out over processes.

    The copy is as if the model had never been sharded: it can be saved, and can leave early. All processes must make
    the call. Of a model that is not sharded it is a copy, too.

    Args:
        model: The model; it stays as it is.
        keeps_data: False in processes that have no use for the copy: there its tensors are on the meta device.

    Raises:
        InvalidTypeError: It is not a module.
    """
    check_instance('model', model, nn.Module)
    for unit in sharded_units(model):
        unit.reshard()

    def gather(tensor: Tensor) -> Tensor:
        whole = tensor.detach()
        whole = _gather(whole) if hasattr(whole, 'full_tensor') else whole
        whole = whole.cpu().clone() if keeps_data else empty_like(whole)
        return whole.requires_grad_(tensor.requires_grad)

    return copy_module(model, gather)


def gather_state(state: Any, *, keeps_data: bool = True) -> Any:
    """Return a state of model or optimizer with whole tensors on the CPU in place of sharded ones.

    Processes that must take part and have no use for the tensors leave them out by `keeps_data` False.
    """
    from torch.distributed.tensor import DTensor  # not everywhere, and not for those who do not shard

    def gather(tensor: Any) -> Tensor | None:
        whole = _gather(tensor)
        return whole.cpu() if keeps_data else None

    return tree_map_only(DTensor, gather, state)


def _gather(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor()
    return whole


def shard_tensor(whole: Any, like: Any) -> Any:
    """Return this process's part of a whole tensor, shared out as `like` is; whatever is of another shape, as it is."""
    if not hasattr(like, 'full_tensor') or not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole, so nothing is sent; the part would keep it in memory as long as it is a view of it.
    placed = whole.to(device=like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None).clone()


def shard_state(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole state dict with its tensors shared out as those of `like` are."""
    return {key: shard_tensor(value, like.get(key)) for key, value in state.items()}


def shard_optimizer_state(state: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return a whole state dict of an optimizer with what belongs to its parameters shared out as they are."""
    params = dict(enumerate(param for group in optimizer.param_groups for param in group['params']))
    if not any(hasattr(param, 'full_tensor') for param in params.values()):
        return state
    sharded = {
        idx: {key: shard_tensor(value, params.get(idx)) for key, value in values.items()}
        for idx, values in state['state'].items()
    }
    return {**state, 'state': sharded}


def run_in_step(batches: Iterable[Item], module: nn.Module, device: torch.device) -> Iterator[Item | None]:
    """Yield batches; for a sharded module, whose processes run each forward together, None while others have more."""
    if not is_sharded(module):
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        is_left = torch.tensor(batch is not None, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(is_left, op=torch.distributed.ReduceOp.MAX)
        if not is_left:
            return
        yield batch
