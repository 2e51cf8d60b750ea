"""Plans: which runs of `train.py` a table is made of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.utils.errors import InvalidValueError, MissingFileError, one_line

METHODS_FILE = 'methods.yaml'

_KEYS = {'title', 'protocol', 'data', 'networks', 'methods', 'seeds'}

_NAME = re.compile(r'\w[\w.+-]*')

# Flags that a network without exits has no use for.
_EXIT_FLAGS = ('exit-', 'exits')


@dataclass(frozen=True)
class PlannedRun:
    """One run of `train.py`.

    Attributes:
        protocol: Stem of the recipe's file.
        data: Name of the data set, and of its folder.
        network: timm's name.
        method: Key of methods.yaml.
        seed: Of all randomness.
        recipe: The recipe's file.
        overrides: Flag -> value beyond the recipe's, without dashes in front.
        flags: All flag values, the recipe's too: what is trained, and what says whether two runs are the same.
    """

    protocol: str
    data: str
    network: str
    method: str
    seed: int
    recipe: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder and of its file of results: no plan's, since two plans may share a run."""
        return f'{self.protocol}-{self.data}-{self.network}-{self.method}-s{self.seed}'

    @property
    def group(self) -> tuple[str, str, str]:
        """What runs of one table share: protocol, data, network."""
        return self.protocol, self.data, self.network

    def arguments(self, data_dir: str) -> list[str]:
        """Return the command line for `train.py` but for where it writes."""
        return ['--config', str(self.recipe), '--data-dir', data_dir, *to_command_line(self.overrides)]

    def format_flags(self) -> str:
        """Return all flags as a file for `train.py --config`: what is planned now, whatever becomes of the recipe."""
        return yaml.safe_dump(self.flags, sort_keys=False)


@dataclass(frozen=True)
class Plan:
    """The runs of a plan, in the order in which they are worth having: all methods of a seed before the next seed.

    Attributes:
        name: Stem of the plan's file.
        title: One line on what the runs are for.
        runs: The runs.
    """

    name: str
    title: str
    runs: tuple[PlannedRun, ...]


def read_plan(path: Path | str) -> Plan:
    """Return the plan of a YAML file; its recipe and methods.yaml are taken from the folder above it.

    The file has `protocol` (a recipe), `data` and `networks` (name -> flags, or a list of names), `methods` (keys of
    methods.yaml), `seeds` and a `title`. Flags of a method win over those of a network, those over those of the data,
    those over the recipe's. A method without `exits` trains the plain network.

    Raises:
        MissingFileError: The plan, its recipe or methods.yaml cannot be read.
        InvalidValueError: A file is not what it should be, or a flag is unknown or has a wrong value.
    """
    path = Path(path)
    content = read_yaml(path)
    if set(content) != _KEYS:
        odd = sorted(set(content) ^ _KEYS)
        raise InvalidValueError(f'{path} must have the keys {", ".join(sorted(_KEYS))}; missing or unknown: {odd}.')
    for key in ('methods', 'seeds', 'data', 'networks'):
        kinds = (list, dict) if key in ('data', 'networks') else (list,)
        values = content[key]
        if not isinstance(values, kinds) or not values or len(set(map(str, values))) < len(values):
            raise InvalidValueError(f'{path}: {key} must be a list without anything twice, got {values!r}.')
    methods = read_yaml(path.parent.parent / METHODS_FILE)
    for method in content['methods']:
        if method not in methods:
            raise InvalidValueError(f"{path}: a method must be one of {', '.join(methods)}, got '{method}'.")
    recipe = path.parents[2] / 'recipes' / f'{content["protocol"]}.yaml'
    basis = read_yaml(recipe)
    data, networks = _as_mapping(content['data']), _as_mapping(content['networks'])
    runs = []
    for seed in content['seeds']:
        for data_name, data_flags in data.items():
            for network, network_flags in networks.items():
                for method in content['methods']:
                    overrides = {**data_flags, **network_flags, **(methods[method] or {})}
                    overrides |= {'model': network, 'seed': seed}
                    names = {'data': data_name, 'network': network, 'method': method, 'seed': seed}
                    # The flags of further seeds are the same.
                    is_checked = seed == content['seeds'][0]
                    runs.append(_plan_run(recipe, basis, overrides, names, is_checked=is_checked))
    return Plan(path.stem, str(content['title']), tuple(runs))


def _plan_run(
    recipe: Path,
    basis: Mapping[str, Any],
    overrides: dict[str, Any],
    names: dict[str, Any],
    *,
    is_checked: bool,
) -> PlannedRun:
    if 'exits' not in overrides:
        overrides = {flag: value for flag, value in overrides.items() if not flag.startswith(_EXIT_FLAGS)}
    # Neither file names what the run does not depend on.
    flags = {key.replace('_', '-'): value for key, value in basis.items()}
    for flag, value in overrides.items():
        if value in (None, False) and flags.get(flag, value) != value:
            raise InvalidValueError(
                f'{flag} is {flags[flag]} in {recipe.name}, and no command line sets it to {value}. Write a recipe'
                ' without it.'
            )
    flags |= overrides
    run = PlannedRun(recipe.stem, recipe=recipe, overrides=overrides, flags=flags, **names)
    if not _NAME.fullmatch(run.name):
        raise InvalidValueError(
            f"The name of a run must be of letters, digits, '.', '_', '+' and '-', got '{run.name}'."
        )
    if not is_checked:
        return run
    try:
        parse_train_args(run.arguments('data'))
    except SystemExit:
        raise InvalidValueError(f'{run.name} has a flag that train.py does not take, see the line above.') from None
    return run


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file.

    Raises:
        MissingFileError: The file cannot be read.
        InvalidValueError: It is not a mapping in YAML.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise MissingFileError(f'Cannot read {path}: {one_line(error)}.') from error
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidValueError(f'{path} must be a YAML file: {one_line(error)}.') from error
    if not isinstance(content, dict):
        raise InvalidValueError(f'{path} must be a mapping.')
    return content


def _as_mapping(value: Any) -> dict[str, dict[str, Any]]:
    """Return name -> flags of a list of names, a mapping, or a mapping with nothing behind a name."""
    return {name: dict((value[name] if isinstance(value, dict) else None) or {}) for name in value}


def to_command_line(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as they are written on a command line; switches that are off are left out, and so is None.

    >>> to_command_line({'lr': 0.1, 'scale': [0.5, 1.0], 'amp': True, 'eed': False, 'exits': 'auto'})
    ['--lr', '0.1', '--scale', '0.5', '1.0', '--amp', '--exits', 'auto']
    """
    words = []
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f'--{flag}')
        if value is not True:
            words += map(str, value) if isinstance(value, Sequence) and not isinstance(value, str) else [str(value)]
    return words


def find_data(parent: Path | str, name: str) -> Path:
    """Return the folder of a data set: the one of its name in `parent`, or `parent` if that has its name.

    The name is checked because results say it.

    Raises:
        MissingFileError: Neither exists.
    """
    parent = Path(parent).absolute()
    for folder in (parent / name, parent):
        if folder.name == name and folder.is_dir():
            return folder
    raise MissingFileError(f"--data-dir must be or contain a folder '{name}', got {parent}. Rename or link the data.")
