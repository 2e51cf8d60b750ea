"""What must hold before a run is published: its numbers are of its network, its policies those of its configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import resolve_data_config

from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.run_folder import RESULTS_NAME, VALIDATION_NAME, RunFolder
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.evaluation.stamp import describe_preparation
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import sha256
from timm_multiexit.utils.untrusted import read_json

_BUDGET = 'budget '


class RunFiles(NamedTuple):
    """What is read of a run, checked.

    Attributes:
        args: Of the run.
        config: Of the network in its folder `best`.
        results: What training wrote at its end.
        measured: What is published: results of `validate.py`, else those of training.
        picture: Of `measured`; None for none.
    """

    args: dict[str, Any]
    config: ModelConfig
    results: dict[str, Any]
    measured: dict[str, Any]
    picture: Path | None


def read_run(run: Path, validation: Path | None) -> RunFiles:
    """Return what a run left, if it is all of the network in its folder `best`.

    Args:
        run: Folder of a run of `train.py`.
        validation: What `validate.py --results-file` wrote; None for the run's own `validation.json`, if it has one.

    Raises:
        MultiExitError: Files are missing, or of other weights, other images or other policies.
    """
    folder = RunFolder(run)
    args, config = folder.read_args(), read_model_config(folder.best)
    if not config.exits:
        raise MultiExitError(f'{run} is a run without exits: publish it with timm.models.push_to_hf_hub.')
    results = folder.read_results()
    if validation is None and folder.validation_path.is_file():
        validation = folder.validation_path
    if validation is not None and not validation.is_file():
        raise MultiExitError(f'There is no {validation}: give the JSON that validate.py --results-file wrote.')
    measured = results if validation is None else read_json(validation)
    where = validation or folder.results_path
    _check_weights(measured, where, folder.best)
    _check_preparation(measured, where, folder.best, config)
    for row in measured.get('dynamic', ()):
        _check_policy(row, where, config)
    picture = None if validation is None else _find_picture(measured, validation)
    return RunFiles(args, config, results, measured, picture)


def _check_weights(measured: Mapping[str, Any], where: Path, best: Path) -> None:
    if measured.get('weights') != hash_weights(best):
        raise MultiExitError(f'{where} is of other weights than {best}: {_again(where, best)}.')


def _check_preparation(measured: Mapping[str, Any], where: Path, best: Path, config: ModelConfig) -> None:
    """Raise for numbers that whoever loads the network would not get."""
    own = describe_preparation(resolve_data_config(pretrained_cfg=config.pretrained_cfg))
    found = measured.get('preparation')
    if not isinstance(found, dict):
        raise MultiExitError(f'{where} does not say how its images were prepared: {_again(where, best)}.')
    for name, value in own.items():
        if json.dumps(found.get(name)) != json.dumps(value):
            raise MultiExitError(
                f'{where} is of images prepared with {name} {found.get(name)}, the network is for {value}: measure it'
                ' without the flag of it.'
            )


def _check_policy(row: Mapping[str, Any], where: Path, config: ModelConfig) -> None:
    """Raise for a policy that whoever loads the network would not get by its name."""
    name = row['policy']
    if name.startswith(_BUDGET):
        if config.budgets is None:
            raise MultiExitError(f'{where} has budgets, the network none: run validate.py again with --save-policy.')
        policy = config.budgets.select(name.removeprefix(_BUDGET)).policy
    elif name == "the model's own":
        policy = config.policy
    else:
        return
    if not has_policy(row, policy):
        raise MultiExitError(
            f"{where} has {name} with other thresholds than the network's: run validate.py again with --save-policy."
        )


def has_policy(row: Mapping[str, Any], policy: Any) -> bool:
    """Return whether a row of results is of a policy."""
    return policy is not None and all(row.get(key) == value for key, value in policy.to_dict().items())


def _find_picture(measured: Mapping[str, Any], validation: Path) -> Path | None:
    """Return the picture that was drawn of the numbers, if it is there."""
    drawn = measured.get('picture')
    path = validation.parent / drawn['path'] if drawn else None
    if path is None or not path.is_file():
        return None
    if sha256(path) != drawn['sha256']:
        raise MultiExitError(f'{path} is not the picture of {validation}: run validate.py again, or remove it.')
    return path


def _again(where: Path, best: Path) -> str:
    name = where if where.name != RESULTS_NAME else where.with_name(VALIDATION_NAME)
    return (
        f'measure these with validate.py --model local-dir:{best} --data-dir DIR --results-format json --results-file'
        f' {name}'
    )
