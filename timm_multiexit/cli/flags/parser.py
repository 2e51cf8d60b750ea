"""What a flag is, what its value may be, and the parser of the commands."""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Generic, NoReturn, TypeVar

from timm.utils import ParseKwargs

_T = TypeVar('_T')


@dataclass(frozen=True)
class Number:
    """Type of a flag that takes a number in some range, which messages name as `allowed`."""

    kind: type[int] | type[float]
    allowed: str
    is_allowed: Callable[[float], bool]

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __str__(self) -> str:
        return f'{"an integer" if self.kind is int else "a number"} {self.allowed}'.strip()

    def __call__(self, text: str) -> float:
        """Return the number that a text stands for.

        >>> positive_int('3')
        3
        >>> non_negative('-1')
        Traceback (most recent call last):
            ...
        argparse.ArgumentTypeError: must be >= 0, got -1
        """
        try:
            number = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'must be {self}, got {text!r}') from None
        if isinstance(number, float) and not math.isfinite(number):
            raise argparse.ArgumentTypeError(f'must be finite, got {text}')
        if not self.is_allowed(number):
            raise argparse.ArgumentTypeError(f'must be {self.allowed}, got {text}')
        return number


positive_int = Number(int, '>= 1', lambda number: number >= 1)
non_negative_int = Number(int, '>= 0', lambda number: number >= 0)
seed_int = Number(int, 'in [0, 4294967295]', lambda number: 0 <= number < 2**32)
positive = Number(float, '> 0', lambda number: number > 0)
non_negative = Number(float, '>= 0', lambda number: number >= 0)
share = Number(float, 'in [0, 1]', lambda number: 0 <= number <= 1)
share_below_1 = Number(float, 'in [0, 1)', lambda number: 0 <= number < 1)
share_between = Number(float, 'in (0, 1)', lambda number: 0 < number < 1)
finite = Number(float, '', lambda number: True)


class Choice:
    """Type of a flag that takes one of some names.

    >>> Choice('norm', 'value')('agc')
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: must be one of norm, value, got 'agc'
    """

    __name__ = 'str'

    def __init__(self, *names: str):
        self.names = names

    def __str__(self) -> str:
        return f'one of {", ".join(name or repr(name) for name in self.names)}'

    def __call__(self, text: str) -> str:
        """Return the name."""
        if text not in self.names:
            raise argparse.ArgumentTypeError(f'must be {self}, got {text!r}')
        return text


@dataclass(frozen=True)
class Items(Generic[_T]):
    """Type of a flag that takes a list of values with commas between, in brackets or not.

    >>> Items(int, 'indices such as 0,-1')('[0,-1]')
    [0, -1]
    """

    parse: Callable[[str], _T]
    allowed: str

    __name__ = 'list'

    def __call__(self, text: str) -> list[_T]:
        """Return the values."""
        try:
            return [self.parse(item) for item in self.split(text)]
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f'must be {self.allowed}, got {text!r}') from None

    @staticmethod
    def split(text: str) -> list[str]:
        """Return the items as they are written."""
        return text.strip().removeprefix('[').removesuffix(']').split(',')


@dataclass(frozen=True)
class Flag:
    """One flag: its names with spaces between (without dashes: an argument by position), and what argparse is told."""

    names: str
    type: Any
    default: Any
    metavar: str | None
    help: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dest(self) -> str:
        """Name of the flag's attribute: that of its first long name, unless another is given."""
        long = next((name for name in self.names.split() if name.startswith('--')), self.names)
        return str(self.options.get('dest', long.removeprefix('--').replace('-', '_')))


class KwargsAction(ParseKwargs):
    """timm's action for `KEY=VALUE ...`, with a clear error where the sign is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the pairs as a dict."""
        wrong = [value for value in values if value and '=' not in value]
        if wrong:
            raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {wrong[0]!r}')
        super().__call__(parser, namespace, values, option_string)


class ScriptParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag for one that does not exist."""

    def __init__(self, **kwargs: Any):
        super().__init__(exit_on_error=False, **kwargs)
        # argparse takes -3 for a value and -3ms, -5% and -1,0 for flags; no flag here begins with a digit.
        self._negative_number_matcher = re.compile(r'-\.?\d')

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the arguments, or end the program with code 2."""
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            self.error(format_error(error))
        if unknown:
            name = next((item for item in unknown if item.startswith('-')), None)
            if name is None:
                self.error(f"unexpected argument '{unknown[0]}'. Put values with spaces in quotes.")
            flags = [option for action in self._actions for option in action.option_strings]
            nearest = get_close_matches(name.split('=')[0], flags, n=1)
            hint = f'Did you mean {nearest[0]}?' if nearest else '--help lists the flags.'
            self.error(f"unknown flag '{name}'. {hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and end the program with code 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


def format_error(error: argparse.ArgumentError, name: str | None = None) -> str:
    """Return an error of a flag as one sentence, about `name` or the flag's first long option."""
    options = (error.argument_name or '').split('/')
    name = name or next((option for option in options if option.startswith('--')), options[0])
    if error.message.startswith('must '):
        return f'{name} {error.message}.'
    return f'argument {name}: {error.message}' if name else error.message


def value(names: str, type: Any, default: Any, metavar: str | None, help: str, **options: Any) -> Flag:
    """Return a flag that takes a value, or several with `nargs`."""
    return Flag(names, type, default, metavar, help, options)


def switch(names: str, help: str) -> Flag:
    """Return a flag that is on when given."""
    return Flag(names, None, False, None, help, {'action': 'store_true'})


def pairs(names: str, help: str) -> Flag:
    """Return a flag that takes KEY=VALUE any number of times."""
    return Flag(names, None, {}, None, help, {'action': KwargsAction, 'nargs': '*', 'metavar': 'KEY=VALUE'})


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add flags to a parser under one title; defaults that are not empty are shown in the help.

    >>> parser = ScriptParser()
    >>> images = value('-b --batch-size', positive_int, 128, 'N', 'images')
    >>> add_flags(parser, 'Some', [images, switch('--amp', 'less precise')])
    >>> parser.parse_args(['-b', '4'])
    Namespace(batch_size=4, amp=False)
    """
    group = parser.add_argument_group(title)
    exclusive = None
    for flag in flags:
        shown = flag.default if isinstance(flag.default, list) else [flag.default]
        text = f'{flag.help} (default: {" ".join(map(_shortest, shown))})' if flag.default else flag.help
        options = {'default': copy(flag.default), 'help': text.replace('%', '%%'), **flag.options}
        if options.get('action', 'extend') == 'extend':
            names = f'{{{",".join(flag.type.names)}}}' if isinstance(flag.type, Choice) else None
            options |= {'type': flag.type, 'metavar': flag.metavar or names}
        owner: Any = group
        if flag.dest in ('torchscript', 'torchcompile', 'aot_autograd'):
            owner = exclusive = exclusive or group.add_mutually_exclusive_group()
        owner.add_argument(*flag.names.split(), **options)


def option_name(dest: str) -> str:
    """Return the flag of an attribute: `--batch-size` of `batch_size`."""
    return f'--{dest.replace("_", "-")}'


def _shortest(default: Any) -> str:
    return f'{default:.4g}' if isinstance(default, float) else str(default)
