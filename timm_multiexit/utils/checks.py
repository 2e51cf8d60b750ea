"""Checks of arguments: each returns what it accepts in one form, or raises one line before any work is done."""

import operator
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, brief, is_integer, is_number

Kind = TypeVar('Kind')


def check_instance(name: str, value: Any, kind: type[Kind], *, hint: str = '') -> Kind:
    """Return the value if it is of a type.

    Raises:
        InvalidTypeError: It is of another type.
    """
    if not isinstance(value, kind):
        what = 'the class itself' if isinstance(value, type) and issubclass(value, kind) else _describe(value)
        raise InvalidTypeError(f'{name} must be {_article(kind.__name__)}, got {what}.{hint and " "}{hint}')
    return value


def check_path(name: str, value: Any) -> None:
    """Raise unless the value is a path.

    Raises:
        InvalidTypeError: It is something else, or empty text.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InvalidTypeError(f'{name} must be a path, got {brief(value)}.')


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return the value if it is one of a few texts.

    Raises:
        InvalidTypeError: It is not text.
        InvalidValueError: It is another text.
    """
    if isinstance(value, str) and value in choices:
        return value
    error = InvalidValueError if isinstance(value, str) else InvalidTypeError
    raise error(f'{name} must be one of {", ".join(choices)}, got {brief(value)}.')


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None, *, hint: str = '') -> int:
    """Return an integer from `low` to `high` as an int; numpy's integers are some, True and 1.0 are not.

    Raises:
        InvalidTypeError: It is not an integer.
        InvalidValueError: It is out of range.
    """
    if is_integer(value):
        number = operator.index(value)
        if (low is None or low <= number) and (high is None or number <= high):
            return number
    error = InvalidValueError if is_integer(value) else InvalidTypeError
    allowed = f'an integer{_describe_range(low, high)}'
    raise error(f'{name} must be {allowed}, got {brief(value)}.{hint and " "}{hint}')


def check_ints(
    name: str, values: Any, low: int | None = None, high: int | None = None, *, hint: str = ''
) -> tuple[int, ...]:
    """Return a list of integers from `low` to `high` as ints, see `check_int`.

    Raises:
        InvalidTypeError: It is not a list of integers.
        InvalidValueError: One is out of range.
    """
    items: list[Any] = list(values) if is_list(values) else [None]
    wrong = [item for item in items if not is_integer(item)]
    if not wrong:
        numbers = tuple(operator.index(item) for item in items)
        if all((low is None or low <= item) and (high is None or item <= high) for item in numbers):
            return numbers
    error = InvalidTypeError if wrong else InvalidValueError
    shown = items if is_list(values) else values
    allowed = f'a list of integers{_describe_range(low, high)}'
    raise error(f'{name} must be {allowed}, got {brief(shown)}.{hint and " "}{hint}')


def check_number(name: str, value: Any, low: float, high: float, *, is_open: bool = False, hint: str = '') -> float:
    """Return a number from `low` to `high`, or between them if `is_open`, as a float; numpy's numbers are some.

    Raises:
        InvalidTypeError: It is not a number.
        InvalidValueError: It is out of range, or NaN.
    """
    if is_number(value) and (low < value < high if is_open else low <= value <= high):
        return float(value)
    # NaN and infinity are floats that are not numbers here.
    error = InvalidValueError if is_number(value) or isinstance(value, float) else InvalidTypeError
    bounds = f'({low:g}, {high:g})' if is_open else f'[{low:g}, {high:g}]'
    raise error(f'{name} must be in {bounds}, got {brief(value)}.{hint and " "}{hint}')


def check_image_size(name: str, size: Any, in_chans: int | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) as ints, of so many channels if they are known.

    Raises:
        InvalidTypeError: It is not three integers.
        InvalidValueError: They are out of range or in another order.
    """
    numbers = check_ints(name, size, hint='Pass (channels, height, width).')
    if len(numbers) != 3 or min(numbers) < 1:
        raise InvalidValueError(f'{name} must be (channels, height, width), integers >= 1, got {brief(size)}.')
    channels, height, width = numbers
    if in_chans is not None and channels != in_chans:
        raise InvalidValueError(f'{name} must be ({in_chans}, height, width) for this model, got {brief(size)}.')
    if width <= 4 < min(channels, height):
        raise InvalidValueError(
            f'{name} must be (channels, height, width), got {brief(size)}, which looks like (height, width, channels).'
        )
    return channels, height, width


def check_images(x: Any, in_chans: int, backbone: nn.Module, *, allows_empty: bool = False) -> None:
    """Raise unless these are images [B, in_chans, H, W] that a backbone with such weights takes.

    Nothing of the images' values is read. What `torch.compile`, `torch.export` or `torch.fx` trace is let through.

    Raises:
        InvalidTypeError: It is not a tensor, or of another dtype than the weights, which autocast does not change.
        InvalidValueError: It is of another shape, empty, or on another device.
    """
    if torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        return
    if not isinstance(x, Tensor):
        raise InvalidTypeError(f'Images must be a non-empty tensor [B, {in_chans}, H, W], got {_describe(x)}.')
    shape = x.shape
    if len(shape) != 4 or shape[1] != in_chans or 0 in (shape[2:] if allows_empty else shape):
        hint = ' Add the dimension of the batch: x[None].' if len(shape) == 3 and shape[0] == in_chans else ''
        if len(shape) == 4 and shape[1] != in_chans == shape[3]:
            hint = ' Put channels before height and width: x.permute(0, 3, 1, 2).'
        raise InvalidValueError(f'Images must be a non-empty tensor [B, {in_chans}, H, W], got {list(shape)}.{hint}')
    if x.layout is not torch.strided:
        raise InvalidTypeError('Images must be a dense tensor, got a sparse one: x.to_dense().')
    param = next(backbone.parameters(), None)
    if param is not None and (x.dtype != param.dtype or x.device != param.device):
        _check_weights_match(x, backbone)


def _check_weights_match(x: Tensor, backbone: nn.Module) -> None:
    """Raise unless images of this dtype, on this device, go with the weights, of which some may be of others."""
    dtypes = {param.dtype for param in backbone.parameters() if param.is_floating_point()}
    if not x.is_floating_point():
        raise InvalidTypeError(
            f'Images must be floating point, got {_dtype(x)}. Scale and normalize them as in training, e.g. with'
            ' torchvision.transforms.ToTensor and Normalize.'
        )
    # Autocast converts all floats but float64.
    is_autocast = x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)
    is_converted = is_autocast and torch.float64 not in (*dtypes, x.dtype)
    if x.dtype in (torch.float16, torch.bfloat16):  # a policy of fully_shard: weights that are shared out follow later
        is_converted = is_converted or any(hasattr(param, 'full_tensor') for param in backbone.parameters())
    if dtypes and x.dtype not in dtypes and not is_converted:
        param = next(param for param in backbone.parameters() if param.is_floating_point())
        raise InvalidTypeError(
            f'Images must be {_dtype(param)}, as the weights are, got {_dtype(x)}. Convert them: x.to({param.dtype}).'
        )
    devices = {param.device for param in backbone.parameters()}
    # Accelerate's hooks move the images to where the first weights will be.
    if x.device not in devices and not any(hasattr(module, '_hf_hook') for module in backbone.modules()):
        device = next(backbone.parameters()).device
        raise InvalidValueError(f"Images must be on {device}, where the model is, got {x.device}: x.to('{device}').")


def is_list(value: Any) -> bool:
    """Return whether a value is a list of others, such as a tuple, a range or an array, but not text or a mapping."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return False
    return getattr(value, 'ndim', 1) > 0  # an array of no dimension cannot be iterated over


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')


def _describe(value: Any) -> str:
    """Return the type of an object, or the value where it says as much."""
    return brief(value) if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _article(name: str) -> str:
    return f'an {name}' if name[0] in 'AEIOU' else f'a {name}'


def _describe_range(low: int | None, high: int | None) -> str:
    if low is None:
        return '' if high is None else f' <= {high}'
    return f' >= {low}' if high is None else f' in [{low}, {high}]'
