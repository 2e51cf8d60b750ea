"""The stages of a backbone, as timm names them, and corrections for families where it names the wrong modules."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

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
