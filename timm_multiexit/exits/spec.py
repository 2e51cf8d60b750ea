"""One exit as it is stored beside the weights: where it is attached, and which head it has."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, InvalidValueError, brief, is_integer

LAYOUTS = ('NCHW', 'NHWC', 'NLC')


@dataclass(frozen=True)
class ExitSpec:
    """One exit: where the backbone is tapped and which head classifies there.

    A list of these rebuilds the heads of a checkpoint without looking at the backbone again.

    Attributes:
        module: Name of the tapped module in the backbone, as in `backbone.named_modules()`.
        channels: Channels of the tapped map or tokens.
        reduction: Input pixels per pixel (or token) of the tapped map along one side.
        head: Key of the table of heads (`timm_multiexit.exits.heads.HEADS`).
        widths: Output channels of the head's convolutions, first to last, 0 for a 2x2 max pooling between two;
            empty for a head that has none.
        layout: How the module lays its output out: 'NCHW', 'NHWC' or 'NLC' (tokens).
        num_prefix_tokens: Tokens in front of the grid (class, register tokens) that are left out; of 'NLC'.
        output: Which output to read of a module that has several.
    """

    module: str
    channels: int
    reduction: int
    head: str
    widths: tuple[int, ...] = ()
    layout: str = 'NCHW'
    num_prefix_tokens: int = 0
    output: int = 0

    def __post_init__(self) -> None:
        for name in ('module', 'head'):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidValueError(f'The {name} of an exit must be text, got {brief(getattr(self, name))}.')
        if not is_list(self.widths):
            raise InvalidTypeError(
                f'The widths of the exit at {brief(self.module)} must be a list of integers, got {brief(self.widths)}.'
            )
        object.__setattr__(self, 'widths', tuple(self.widths))
        if self.layout not in LAYOUTS:
            raise InvalidValueError(
                f'The layout of an exit must be one of {", ".join(LAYOUTS)}, got {brief(self.layout)}.'
            )
        numbers = [('channel count', self.channels, 1), ('reduction', self.reduction, 1)]
        numbers += [('width', width, 0) for width in self.widths]
        numbers += [('count of prefix tokens', self.num_prefix_tokens, 0), ('output index', self.output, 0)]
        if self.widths and 0 in (self.widths[0], self.widths[-1]):
            raise InvalidValueError(
                f'The widths of the exit at {brief(self.module)} must begin and end with a convolution, got'
                f' {brief(list(self.widths))}.'
            )
        for name, number, least in numbers:
            if not is_integer(number, least, 65536):
                raise InvalidValueError(
                    f'The {name} of the exit at {brief(self.module)} must be an integer in [{least}, 65536], got'
                    f' {brief(number)}.'
                )
        # JSON cannot hold numpy's numbers.
        for field in ('channels', 'reduction', 'num_prefix_tokens', 'output'):
            object.__setattr__(self, field, int(getattr(self, field)))
        object.__setattr__(self, 'widths', tuple(int(width) for width in self.widths))

    def to_dict(self) -> dict[str, Any]:
        """Return the exit as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ExitSpec':
        """Return the exit that `to_dict` wrote; keys that are not fields of this class are left out.

        Raises:
            CheckpointError: A field is missing, or `values` is not a mapping.
            InvalidValueError: A field is out of range.
        """
        names = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls) if field.default is MISSING] + ['widths']
        if not isinstance(values, dict) or not set(required) <= set(values):
            raise CheckpointError(f'An exit in config.json must be an object with the keys {", ".join(required)}.')
        if not isinstance(values['widths'], (list, tuple)):
            raise CheckpointError(f'The widths of an exit must be a list of integers, got {brief(values["widths"])}.')
        return cls(**{name: values[name] for name in names if name in values})
