"""Where the parts of a backbone end: stages, as timm names them or as corrected for some families, and blocks."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_multiexit.exits.backbone import run_empty
from timm_multiexit.exits.cost import empty_images, meta_copy
from timm_multiexit.exits.taps import Taps, resolve_tap
from timm_multiexit.utils.errors import InvalidValueError

# Entries of `feature_info`.
Entries = list[dict[str, Any]]


def _renamed(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Callable[[Entries], Entries]:
    return lambda entries: [{**entry, 'module': re.sub(pattern, replacement, entry['module'])} for entry in entries]


def _coat_stages(entries: Entries) -> Entries:
    return [{'module': f'serial_blocks{idx}', 'reduction': 2 ** (idx + 1)} for idx in range(1, 5)]


def _aligned_xception_stages(entries: Entries) -> Entries:
    # The block of the layer that is named ends at the next stage's reduction.
    return [
        {**entry, 'module': re.sub(r'\.stack\..*', '', entry['module']), 'reduction': following['reduction']}
        for entry, following in zip(entries, [*entries[1:], entries[-1]])
    ]


# Families whose `feature_info` (timm 1.0.31) names modules that are not there, are not called, or lie beside a
# shortcut that has the whole batch, and where to look.
_STAGE_FIXES: dict[str, Callable[[Entries], Entries]] = {
    'CoaT': _coat_stages,  # names a ModuleList, and for some the parallel blocks at the end three times
    'Gemma4VitClassifier': _renamed(r'^blocks\.', 'encoder.blocks.'),  # names as inside the encoder it wraps
    'HighResolutionNet': lambda entries: _renamed('^stem$', 'act1')(_renamed('^stage1$', 'layer1')(entries)),  # no such
    'MobileNetV5': _renamed('^bn1$', 'conv_stem'),  # the norm is inside the stem
    'MultiScaleVit': _renamed(r'^block\.', 'stages.'),  # no such module
    'Twins': _renamed(r'^block\.', 'blocks.'),  # no such module
    # names the activation that the next block starts with
    'Xception': _renamed(r'^block(\d+)\.rep\.0$', lambda match: f'block{int(match[1]) - 1}'),
    'XceptionAligned': _aligned_xception_stages,  # names layers inside the blocks
}


def stage_entries(backbone: nn.Module, *, is_needed: bool = True) -> Entries:
    """Return the backbone's stages as `feature_info` has them, corrected where its family needs that.

    Raises:
        InvalidValueError: It has none, and they are needed.
    """
    info: Any = getattr(backbone, 'feature_info', None)
    entries = info.info if hasattr(info, 'info') else info
    # Of a module that is not timm's the attribute can be anything.
    is_list = isinstance(entries, (list, tuple)) and len(entries)
    if not is_list or not all(isinstance(entry, dict) and 'module' in entry for entry in entries):
        if not is_needed:
            return []
        children = [name for name, child in backbone.named_children() if next(child.parameters(), None) is not None]
        raise InvalidValueError(
            f'{type(backbone).__name__} names no stages (feature_info), so exits must name modules to tap, as'
            f' {children[:2] or ["layer1"]}: those of named_modules().'
        )
    return _STAGE_FIXES.get(type(backbone).__name__, list)(list(entries))


@torch.no_grad()
def find_block_ends(backbone: nn.Module, entries: Entries, input_size: tuple[int, int, int]) -> list[str]:
    """Return the modules at which all that comes later depends on their output alone, in the order of their ends.

    Searched are the parts of the backbone, of its containers and of its stages, not those of single blocks. One branch
    of several, as a layer of a dense block has it, is left out, since the others bypass it.

    Args:
        backbone: A classification model; it stays as it is.
        entries: Its stages.
        input_size: (channels, height, width) of an image.

    Raises:
        InvalidValueError: It does not run without data.
    """
    stages = [f'{entry["module"]}.' for entry in entries]
    names = list(dict.fromkeys(resolve_tap(backbone, name) for name in _part_names(backbone, stages)))
    taps = Taps(names, (), outputs=[None] * len(names))
    images = empty_images(backbone, input_size)
    flow = _Dataflow(images)
    arrived: list[tuple[str, int | None]] = []

    def note(idx: int, output: Any) -> None:
        tensors = _tensors(output)
        if len(tensors) == 1:
            arrived.append((names[idx], flow.find(tensors[0])))

    with flow:
        output = run_empty(backbone, meta_copy(backbone), taps, images, note)
    passed = flow.passed_by(_tensors(output))
    return [name for name, node in arrived if node in passed]


def _part_names(module: nn.Module, stages: list[str], prefix: str = '') -> Iterator[str]:
    """Yield the names of the parts of a module, and theirs where it is not a block that is left in one piece."""
    holds_items = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        path = f'{prefix}{name}'
        yield path
        # Without stages to go by, what is an attribute may hold the blocks; an item of a container is a block.
        is_opened = not holds_items if not stages else any(stage.startswith(f'{path}.') for stage in stages)
        if isinstance(child, _CONTAINERS) or is_opened:
            yield from _part_names(child, stages, f'{path}.')


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Dataflow(TorchDispatchMode):
    """Notes, of each tensor that is computed, the last tensor that all ways from the images to it go through.

    Tensors that share memory are one, as the last operation left it.

    Source: dominators by the intersection of Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm, 2001; in
    the order of computation one pass is enough.
    """

    def __init__(self, images: Tensor):
        super().__init__()
        self._nodes: dict[int, int] = {}  # memory -> node; the images are 0
        self._before = [0]  # node -> the last node that all ways to it go through
        self._depths = [0]
        self._kept: list[Any] = []  # so that no memory is taken for another
        self._put(images, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [node for node in map(self.find, _tensors((args, kwargs))) if node is not None]
        written = _tensors(output)
        if read and written:
            before = self._join(read)
            self._before.append(before)
            self._depths.append(self._depths[before] + 1)
            for tensor in written:
                self._put(tensor, len(self._before) - 1)
        return output

    def find(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor, None of one that does not depend on the images."""
        return self._nodes.get(tensor.untyped_storage()._cdata)

    def passed_by(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the nodes that all ways from the images to these tensors go through."""
        node = self._join([node for node in map(self.find, tensors) if node is not None] or [0])
        passed = {node}
        while node:
            node = self._before[node]
            passed.add(node)
        return passed

    def _put(self, tensor: Tensor, node: int) -> None:
        storage = tensor.untyped_storage()
        self._nodes[storage._cdata] = node
        self._kept.append(storage)

    def _join(self, nodes: list[int]) -> int:
        first, *others = nodes
        for node in others:
            while first != node:
                if self._depths[first] > self._depths[node]:
                    first = self._before[first]
                else:
                    node = self._before[node]
        return first
