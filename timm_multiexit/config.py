"""What is stored beside the weights: the exits of a model, and the one error that users see."""

from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT_VERSION = 1


class MultiExitError(ValueError):
    """A request that cannot be met. The message is one line: what was wrong, what is allowed, what to do."""


@dataclass(frozen=True)
class ExitSpec:
    """One exit: where the backbone is tapped and which head classifies there.

    A list of these rebuilds the heads of a checkpoint without looking at the backbone again.

    Attributes:
        module: Name of the tapped module in the backbone, as in `backbone.named_modules()`.
        channels: Channels of the tapped NCHW map.
        reduction: Input pixels per pixel of the tapped map along one side.
        head: Key of the table of heads (`timm_multiexit.heads.HEADS`).
        widths: Output channels of the head's convolutions, first to last; empty for a head that has none.
    """

    module: str
    channels: int
    reduction: int
    head: str
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ('module', 'head'):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise MultiExitError(f'Exit {name} is {getattr(self, name)!r}, allowed is a non-empty string.')
        object.__setattr__(self, 'widths', tuple(self.widths))
        for number in (self.channels, self.reduction, *self.widths):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 65536:
                raise MultiExitError(
                    f"Exit at '{self.module}' has a channel count, reduction or width of {number!r},"
                    ' allowed are integers from 1 to 65536.'
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the exit as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ExitSpec':
        """Return the exit that `to_dict` wrote.

        Args:
            values: A mapping with this class's fields; other keys are left out.

        Raises:
            MultiExitError: A field is missing or out of range, or `values` is not a mapping.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not set(names) <= set(values):
            raise MultiExitError(f'An exit in config.json must be an object with the keys {", ".join(names)}.')
        if not isinstance(values['widths'], (list, tuple)):
            raise MultiExitError(f'Exit widths are {values["widths"]!r}, allowed is a list of integers.')
        return cls(**{name: values[name] for name in names})
