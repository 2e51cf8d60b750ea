"""What a forward costs: multiply-accumulates (MACs) of one image, and parameters."""

import sys
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """MACs and parameters of one computation.

    Attributes:
        macs: Multiply-accumulates of convolutions, matrix products and attention for one image; norms, activations
            and pooling count nothing, as in the literature.
        params: Parameters that the computation reads.
    """

    macs: int = 0
    params: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(self.macs + other.macs, self.params + other.params)


@dataclass(frozen=True)
class ExitCost:
    """The two costs of one classifier.

    Attributes:
        head: Its head alone; nothing for main, whose classifier is part of the backbone.
        fixed: The path to its tap and its own head: what `exit_idx=k` runs.
        sequential: The same and all shallower heads: what dynamic inference runs to get there.
    """

    head: Cost
    fixed: Cost
    sequential: Cost


# Their first output is like their input, and they cost nothing. For tensors without data torch works that out in
# Python, which is two fifths of the time that the costs of a ResNet take.
NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_layer_norm.default)

AnyCost = TypeVar('AnyCost', float, Cost)
AnyModule = TypeVar('AnyModule', bound=nn.Module)


def add_heads(paths: Sequence[AnyCost], heads: Sequence[AnyCost], used: Collection[int]) -> list[AnyCost]:
    """Return the cost of leaving at each classifier, main last: the path to it and the used heads up to there.

    `paths` are the costs of the backbone up to each tap, and of all of it last: one more than `heads`.

    >>> add_heads([10.0, 20.0, 40.0], [3.0, 2.0], used=(1,))
    [10.0, 22.0, 42.0]
    """
    spent, costs = type(paths[-1])(), []
    for idx, path in enumerate(paths):
        spent = spent + heads[idx] if idx in used else spent
        costs.append(path + spent)
    return costs


def combine_costs(paths: Sequence[Cost], heads: Sequence[Cost]) -> tuple[ExitCost, ...]:
    """Return the cost of every classifier, shallow to deep, main last; arguments as for `add_heads`.

    >>> costs = combine_costs([Cost(10), Cost(20), Cost(40)], [Cost(3), Cost(2)])
    >>> [cost.fixed.macs for cost in costs], [cost.sequential.macs for cost in costs]
    ([13, 22, 40], [13, 25, 45])
    """
    sequential = add_heads(paths, heads, range(len(heads)))
    return tuple(
        ExitCost(head=head, fixed=path + head, sequential=total)
        for path, head, total in zip(paths, (*heads, Cost()), sequential, strict=True)
    )


class CostMeter(TorchDispatchMode):
    """Counts what runs inside its `with` block.

    MACs come from torch's flop counter, halved; a parameter of the module, which may be on the meta device, counts once
    an operation has read it.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._flops = FlopCounterMode(display=False)
        self._sizes = {id(param): param.numel() for param in module.parameters()}
        self._read: set[int] = set()

    def __enter__(self) -> 'CostMeter':
        self._flops.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._flops.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._read.update(self._sizes.keys() & {id(leaf) for leaf in tree_leaves((args, kwargs))})
        if func in NORMS and args[0].is_meta:
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **(kwargs or {}))

    def read(self) -> Cost:
        """Return the cost so far; MACs of the whole batch that was run."""
        return Cost(self._flops.get_total_flops() // 2, sum(self._sizes[param] for param in self._read))


def meta_copy(module: AnyModule) -> AnyModule:
    """Return a copy in eval mode whose tensors hold no data.

    The copy takes no memory for weights, and running it changes nothing in the module: shapes and costs are found
    on it. Tensors kept as plain attributes become meta tensors too.
    """
    return copy_module(module, lambda tensor: empty_like(tensor).requires_grad_(False)).eval()


def empty_like(tensor: Tensor) -> Tensor:
    """Return a tensor without data on the meta device; of one that is shared out over processes, a whole one."""
    if hasattr(tensor, 'full_tensor'):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
    return torch.empty_like(tensor, device='meta')


def copy_module(module: AnyModule, copy_tensor: Callable[[Tensor], Tensor]) -> AnyModule:
    """Return a copy of a module with `copy_tensor` of each parameter, buffer and tensor that is a plain attribute.

    What torch's `fully_shard` made of the module is undone in the copy: it is of the modules' own types, without the
    hooks that gather parameters. A copied parameter requires gradients if `copy_tensor` says so.
    """
    memo: dict[int, Any] = {}
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values(), *vars(child).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                copied = copy_tensor(tensor)
                is_param = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(copied, copied.requires_grad) if is_param else copied
    units = sharded_units(module)
    for unit in units:
        state: Any = unit._get_fsdp_state()
        memo[id(state)] = state  # its process group cannot be copied; the hooks that lead to it go below
    for unit in reversed(units):  # the inner ones first, which torch refuses to copy
        copied_unit: Any = object.__new__(type(unit).__mro__[2])
        memo[id(unit)] = copied_unit
        own = {name: value for name, value in vars(unit).items() if 'composable_api' not in name}
        vars(copied_unit).update(deepcopy(own, memo))
    copy = deepcopy(module, memo)
    if units:
        for child in copy.modules():
            for hooks in (value for name, value in vars(child).items() if name.endswith('_hooks')):
                for key in [key for key, hook in hooks.items() if _is_of_fsdp(hook)]:
                    del hooks[key]
    return copy


def sharded_units(module: nn.Module) -> list[Any]:
    """Return the parts of a module that torch's `fully_shard` was called with, the outer ones first."""
    fsdp = sys.modules.get('torch.distributed.fsdp')  # not there on every system
    kind = getattr(fsdp, 'FSDPModule', None)
    return [part for part in module.modules() if isinstance(part, kind)] if kind else []


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, '__module__', '')).startswith('torch.distributed.fsdp')


def find_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a module computes in: that of its first parameter or buffer of floating-point numbers."""
    tensors = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def empty_images(module: nn.Module, input_size: Sequence[int], count: int = 1) -> Tensor:
    """Return images [count, channels, height, width] without data, as a module's `meta_copy` takes them."""
    return torch.empty(count, *input_size, dtype=find_dtype(module), device='meta')
