"""Reads `--config`: a YAML file of flag values, which the parser itself reads like those of a command line."""

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm_multiexit.cli.flags.parser import Choice, KwargsAction, Number, ScriptParser, format_error
from timm_multiexit.utils.errors import CheckpointError, InvalidValueError, MissingFileError, brief
from timm_multiexit.utils.untrusted import read_yaml

# What a run writes into its args.yaml beside its flags, and finds out anew.
_RUN_KEYS = ('is_demo', 'origin', 'resumed')


def read_config(path: str, parser: ScriptParser) -> dict[str, Any]:
    """Return the flag values of a YAML file as dest -> value, as the parser makes them.

    Keys are names of flags, with dashes or underscores. An `args.yaml` that a run wrote is such a file.
    """
    try:
        content = read_yaml(Path(path))
    except MissingFileError as error:
        raise MissingFileError(f'--config {error}') from error
    except CheckpointError as error:
        raise InvalidValueError(f'--config {error}') from error
    names = {
        name.removeprefix('--').replace('-', '_'): action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
        for name in (action.dest, *action.option_strings)
        if not name.startswith('-') or name.startswith('--')
    }
    values = [(str(key).replace('-', '_'), value) for key, value in content.items() if key not in _RUN_KEYS]
    unknown = sorted(key for key, _ in values if key not in names)
    if unknown:
        nearest = [get_close_matches(key, names, n=1) for key in unknown[:10]]
        listed = ', '.join(f'{key} (nearest is {best[0]})' if best else key for key, best in zip(unknown, nearest))
        raise InvalidValueError(f'--config {path} has unknown keys: {listed}. See --help for the flags.')
    config: dict[str, Any] = {}
    for key, value in values:
        action = names[key]
        if action.dest in config:
            raise InvalidValueError(f"--config {path} has two keys for one flag, one of them '{key}': leave one out.")
        try:
            config[action.dest] = _parse(parser, action, value)
        except argparse.ArgumentError as error:
            raise InvalidValueError(f'--config {path}: {format_error(error, key)}') from None
    return config


def _parse(parser: ScriptParser, action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the flag would have made it, or raise argparse's error."""
    if value == action.default and type(value) is type(action.default):
        return value  # what an args.yaml has for a flag that was not given
    if isinstance(action, KwargsAction) and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    if value is True and action.const is not None:
        return action.const
    items = value if isinstance(value, list) and action.nargs else [value]
    kinds = (str,) if action.type in (None, str) else (str, int, float, list)
    if action.nargs != 0 and all(isinstance(item, kinds) and not isinstance(item, bool) for item in items):
        words = [_to_text(item) for item in items]
        if action.option_strings:
            option = action.option_strings[-1]
            words = [option, *words] if action.nargs else [f'{option}={words[0]}']
        parsed = getattr(parser.parse_known_args(words)[0], action.dest)
        if not action.nargs or action.nargs == '?' or len(parsed) == len(items):  # else an item was taken for a flag
            return parsed
    raise argparse.ArgumentError(action, f'must be {_describe(action)}, got {brief(value)}')


def _to_text(value: Any) -> str:
    """Return a value as it would be written on the command line.

    >>> _to_text(3), _to_text([3]), _to_text([[64, 128], [128]])
    ('3', '[3]', '[64-128,128]')
    """
    if not isinstance(value, list):
        return str(value)
    return f'[{",".join("-".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)}]'


def _describe(action: argparse.Action) -> str:
    """Return what a flag takes, in words.

    >>> _describe(argparse.ArgumentParser().add_argument('--amp', action='store_true'))
    'true or false'
    """
    if action.nargs == 0:
        return 'true or false'
    if isinstance(action, KwargsAction):
        return 'a mapping of names to values'
    if isinstance(action.type, (Number, Choice)):
        one = str(action.type)
    elif action.type in (None, str):
        one = 'a string (numbers and dates in quotes)'
    else:
        one = f'a value of {action.option_strings[-1]} ({action.help})'
    return f'a list, each item {one}' if action.nargs and action.nargs != '?' else one
