"""Checks before a run is published: its results belong to its network, its policies to its configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import resolve_data_config

from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.run_folder import RESULTS_NAME, VALIDATION_NAME, RunFolder
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.evaluation.stamp import describe_preparation
from timm_multiexit.publishing.results import add_row_keys
from timm_multiexit.utils.errors import CheckpointError, MissingFileError
from timm_multiexit.utils.files import sha256
from timm_multiexit.utils.untrusted import read_json


class RunFiles(NamedTuple):
    """Contents of a run, checked: its arguments, the configuration of the network in its folder `best`, and results.

    `measured` are the results to publish: those of `validate.py`, else those of training; `picture` is theirs.
    """

    args: dict[str, Any]
    config: ModelConfig
    results: dict[str, Any]
    measured: dict[str, Any]
    picture: Path | None


def read_run(run: Path, validation: Path | None) -> RunFiles:
    """Return the files of a run of `train.py`, if all belong to the network in its folder `best`.

    `validation` has JSON results of `validate.py`; None for the run's `validation.json`, if it has one.

    Raises:
        CheckpointError: Files are missing, or of other weights, other preparation of images or other policies.
        MissingFileError: `validation` does not exist.
    """
    folder = RunFolder(run)
    args, config = folder.read_args(), read_model_config(folder.best)
    if not config.exits:
        raise CheckpointError(f'{run} is a run without exits: publish it with timm.models.push_to_hf_hub.')
    results = folder.read_results()
    if validation is None and folder.validation_path.is_file():
        validation = folder.validation_path
    if validation is not None and not validation.is_file():
        raise MissingFileError(
            f'{validation} does not exist: give a JSON file written by timm-multiexit validate --results-file.'
        )
    measured = add_row_keys(results if validation is None else read_json(validation))
    where = validation or folder.results_path
    _check_weights(measured, where, folder.best)
    _check_preparation(measured, where, folder.best, config)
    for row in measured.get('dynamic', ()):
        _check_policy(row, where, config)
    picture = None if validation is None else _find_picture(measured, validation)
    return RunFiles(args, config, results, measured, picture)


def _check_weights(measured: Mapping[str, Any], where: Path, best: Path) -> None:
    if measured.get('weights') != hash_weights(best):
        raise CheckpointError(f'{where} has results of other weights than those of {best}: {_again(where, best)}.')


def _check_preparation(measured: Mapping[str, Any], where: Path, best: Path, config: ModelConfig) -> None:
    """Raise for results that the loaded network would not reproduce."""
    own = describe_preparation(resolve_data_config(pretrained_cfg=config.pretrained_cfg))
    found = measured.get('preparation')
    if not isinstance(found, dict):
        raise CheckpointError(f'{where} does not say how its images were prepared: {_again(where, best)}.')
    for name, value in own.items():
        if json.dumps(found.get(name)) != json.dumps(value):
            raise CheckpointError(
                f'{name} of the images in {where} must be {value}, as in the network, got {found.get(name)}: measure'
                ' again without its flag.'
            )


def _check_policy(row: Mapping[str, Any], where: Path, config: ModelConfig) -> None:
    """Raise for a policy that the loaded network would not have by its name."""
    if row['kind'] not in ('budget', 'own'):
        return
    policy = config.policy
    if row['kind'] == 'budget':
        if config.budgets is None:
            raise CheckpointError(
                f'{where} has budgets, the network has none: run timm-multiexit validate again with --save-policy.'
            )
        policy = config.budgets.select(row['budget']).policy
    if not has_policy(row, policy):
        raise CheckpointError(
            f"{row['policy']} of {where} has other thresholds than the network's: run timm-multiexit validate again"
            ' with --save-policy.'
        )


def has_policy(row: Mapping[str, Any], policy: Any) -> bool:
    """Return whether a row of results belongs to a policy."""
    return policy is not None and all(row.get(key) == value for key, value in policy.to_dict().items())


def _find_picture(measured: Mapping[str, Any], validation: Path) -> Path | None:
    """Return the picture that was drawn with the results, if it exists."""
    drawn = measured.get('picture') or {}
    path = validation.parent / str(drawn.get('path'))
    if not drawn or not path.is_file():
        return None
    if sha256(path) != drawn['sha256']:
        raise CheckpointError(
            f'{path} is not the picture of {validation}: run timm-multiexit validate again, or remove it.'
        )
    return path


def _again(where: Path, best: Path) -> str:
    name = where if where.name != RESULTS_NAME else where.with_name(VALIDATION_NAME)
    return (
        f'evaluate it by timm-multiexit validate --model local-dir:{best} --data-dir DIR --results-format json'
        f' --results-file {name}'
    )
