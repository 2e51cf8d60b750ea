"""Run folder."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_multiexit.checkpoints.source import create_backbone
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.utils.errors import MultiExitError


def read_origin(args: Mapping[str, Any]) -> Origin:
    """Return what a run of `train.py` started from, as its arguments remember it.

    Args:
        args: Of the run; those of a run of timm's own script say nothing, so that its weights are a file's.
    """
    return Origin(**args['origin']) if args.get('origin') else Origin('a file')


ARGS_NAME = 'args.yaml'

RESULTS_NAME = 'results.json'

VALIDATION_NAME = 'validation.json'


def read_args(run: Path) -> dict[str, Any]:
    """Return the arguments of a run.

    Raises:
        MultiExitError: It is no run of `train.py`.
    """
    path = run / ARGS_NAME
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MultiExitError(f'{run} is no run of train.py: its {ARGS_NAME} cannot be read.') from error
    if not isinstance(args, dict) or not {'model', 'seed', 'exit_loss'} <= args.keys():
        raise MultiExitError(f'{path} is no {ARGS_NAME} of train.py.')
    return args


def load_best(args: Namespace, folder: str) -> MultiExitModel:
    """Return the network of a run's folder, without exits if the run had none."""
    name = f'local-dir:{folder}'
    if args.exits is not None:
        return create_model(name, pretrained=True, **args.model_kwargs)
    return MultiExitModel(create_backbone(name, pretrained=True, **args.model_kwargs), [])


BEST_NAME = 'best'
