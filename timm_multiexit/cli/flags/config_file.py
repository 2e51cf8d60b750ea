"""Reads `--config`: a YAML file of flag values, each of which must be what the flag itself would take."""

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_multiexit.utils.errors import MultiExitError

_KINDS = {int: ('an integer', 'integers'), float: ('a number', 'numbers'), str: ('a string', 'strings')}


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the flag values of a YAML file as dest -> value, as the parser would have made them.

    Keys are names of flags, with dashes or underscores. An `args.yaml` that a run wrote is such a file.

    Args:
        path: The file.
        parser: Knows the flags; its defaults are untouched.

    Raises:
        MultiExitError: The file cannot be read, or has unknown keys or values that the flag does not take.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MultiExitError(f'--config {path} cannot be read: {" ".join(str(error).split())}.') from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise MultiExitError(f'--config {path} must be a mapping of flag names to values.')
    # What a run writes beside its flags, and finds out anew.
    kept = {key: value for key, value in content.items() if key not in ('is_demo', 'origin')}
    values = [(str(key).replace('-', '_'), value) for key, value in kept.items()]
    actions = _actions_by_key(parser)
    unknown = [key for key, _ in values if key not in actions]
    if unknown:
        names = ', '.join(_with_nearest(key, actions) for key in sorted(unknown)[:10])
        raise MultiExitError(f'--config {path} has unknown keys: {names}. See --help for the flags.')
    config: dict[str, Any] = {}
    for key, value in values:
        action = actions[key]
        if action.dest in config:
            raise MultiExitError(f"--config {path} has two keys for one flag, one of them '{key}': leave one out.")
        try:
            config[action.dest] = convert(action, value)
        except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
            raise MultiExitError(f'--config {path}: {key} is {value!r}, allowed is {describe(action)}.') from None
    return config


def convert(action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the flag would have made it.

    Raises:
        ValueError: It is not what the flag takes (or `ArgumentTypeError`, from the flag's own type).

    >>> action = argparse.ArgumentParser().add_argument('--lr', type=float)
    >>> convert(action, '1e-3'), convert(action, 1), convert(action, None)  # YAML reads 1e-3 as a string
    (0.001, 1.0, None)
    """
    if value == action.default and type(value) is type(action.default):
        return value  # what an args.yaml holds for a flag that was not given
    if isinstance(action, argparse._StoreTrueAction):
        return _checked(value, isinstance(value, bool))
    if isinstance(action, ParseKwargs):
        return _checked(value, isinstance(value, dict) and all(isinstance(key, str) for key in value))
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        least = {'+': 1, '*': 0}.get(action.nargs, action.nargs)
        most = action.nargs if isinstance(action.nargs, int) else len(_checked(value, isinstance(value, list)))
        _checked(value, isinstance(value, list) and least <= len(value) <= most)
        return [_convert_one(action, item) for item in value]
    if value is True and action.const is not None:
        return action.const
    return _convert_one(action, value)


def describe(action: argparse.Action) -> str:
    """Return what a flag takes, in words.

    >>> describe(argparse.ArgumentParser().add_argument('--mean', nargs='+', type=float))
    'a list of numbers or null'
    """
    one, several = _KINDS.get(action.type or str, ('what the flag takes', 'what the flag takes'))
    if isinstance(action, argparse._StoreTrueAction):
        text = 'true or false'
    elif isinstance(action, ParseKwargs):
        text = 'a mapping of names to values'
    elif action.nargs in ('+', '*'):
        text = f'a list of {several}'
    elif isinstance(action.nargs, int):
        text = f'a list of {action.nargs} {several}'
    else:
        text = one
    if action.choices:
        text += ' out of ' + ', '.join(map(str, action.choices))
    elif one == 'what the flag takes' and action.help:
        text += f' ({action.help})'
    elif text == 'a string':
        text += ' (numbers and dates in quotes)'
    return text + (' or null' if action.default is None else '')


def _actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return every name that a key may have, dests before other names of flags."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    names = {
        option.removeprefix('--').replace('-', '_'): action
        for action in actions
        for option in action.option_strings
        if option.startswith('--')
    }
    return names | {action.dest: action for action in actions}


def _with_nearest(key: str, names: Iterable[str]) -> str:
    nearest = get_close_matches(key, names, n=1)
    return f'{key} (nearest is {nearest[0]})' if nearest else key


def _checked(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise ValueError
    return value


def _convert_one(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    if isinstance(value, bool):
        raise ValueError
    if kind is str:
        _checked(value, isinstance(value, str))
    elif kind in (int, float):
        _checked(value, isinstance(value, (str, int) if kind is int else (str, int, float)))
    else:
        value = _as_text(value)
    converted = kind(value)
    return _checked(converted, action.choices is None or converted in action.choices)


def _as_text(value: Any) -> str:
    """Return a value as it would be written on the command line, for flags with a type of ours.

    >>> _as_text(3), _as_text([3]), _as_text([[64, 128], [128]])
    ('3', '[3]', '[64-128,128]')
    """
    if isinstance(value, list):
        items = ['-'.join(map(str, item)) if isinstance(item, list) else str(item) for item in value]
        _checked(items, all(isinstance(item, (str, int, float, list)) for item in value))
        return f'[{",".join(items)}]'
    return str(_checked(value, isinstance(value, (str, int, float))))
