"""From a training run to the folder that is published.

A publication holds what `save_pretrained` writes, `args.yaml`, `metrics.json` with all numbers, the picture, and the
card, which is made of `metrics.json` alone. The same run gives the same bytes.
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from timm.models import parse_model_name

from timm_multiexit.card import write_card
from timm_multiexit.checkpoint import hash_weights
from timm_multiexit.config import MultiExitError
from timm_multiexit.files import new_folder
from timm_multiexit.licenses import License, resolve_license
from timm_multiexit.loading import load_pretrained
from timm_multiexit.model_config import BACKBONE_NAME, CONFIG_NAME, EXITS_NAME, ModelConfig, read_model_config
from timm_multiexit.saver import BEST_NAME
from timm_multiexit.untrusted import read_json

ARGS_NAME = 'args.yaml'
CARD_NAME = 'README.md'
RESULTS_NAME = 'results.json'
METRICS_NAME = 'metrics.json'
PUBLICATION_NAME = 'publication'
PICTURE_NAME = 'assets/accuracy_vs_macs.png'
VALIDATION_NAME = 'validation.json'

_MEASURED = ('rows', 'dynamic', 'timing', 'latency', 'compare', 'overthinking', 'curve', 'calibrated_on', 'precision')
_ENVIRONMENT = ('hardware', 'threads', 'versions', 'commit')
_EED = 'arXiv:2104.00299'


class Labels(NamedTuple):
    """What a run does not know of itself.

    Attributes:
        license: Asked for; None for what the rules of `resolve_license` give.
        base_model: Repository of the weights that training started from; None for what the run's flags say.
        dataset_id: Repository of the data set on the Hub.
    """

    license: str | None = None
    base_model: str | None = None
    dataset_id: str | None = None


NO_LABELS = Labels()


def find_license(args: Mapping[str, Any], labels: Labels, saved: str | None = None) -> tuple[str | None, License]:
    """Return the repository that a run's weights started from, None for from scratch, and the license that follows.

    Args:
        args: Of the run.
        labels: Of the publisher.
        saved: License in the configuration that the run started from, where it is not one of timm's registry.

    Raises:
        MultiExitError: See `resolve_license`.
    """
    base, license_id = labels.base_model, None
    source, name = parse_model_name(args['model'])
    if args.get('initial_checkpoint') or args.get('pretrained_path'):
        base = base or 'a file'
    elif args.get('pretrained') and source is None:
        cfg = timm.get_pretrained_cfg(name)
        base, license_id = base or f'timm/{name.split(".")[0]}.{cfg.tag}', cfg.license
    elif args.get('pretrained'):
        base = base or (name.partition('@')[0] if source == 'hf-hub' else 'a folder')
        license_id = saved
    resolved = resolve_license(license_id, asked=labels.license, base=base)
    return (base if base and '/' in base else None), resolved


def write_publication(
    run: Path, folder: Path, repo_id: str, *, labels: Labels = NO_LABELS, validation: Path | None = None
) -> dict[str, Any]:
    """Write the folder that a run is published as, and return what `metrics.json` holds.

    Args:
        run: Folder of a run of `train.py`.
        folder: Made anew; one that is there must be an earlier publication.
        repo_id: Where it will be published, namespace/name.
        labels: What the run does not know of itself.
        validation: What `validate.py --results-file` wrote for the run's `best`, with what policies give; the run's
            own `validation.json` where there is one, else what training measured of each exit.

    Raises:
        MultiExitError: The run has no exits or no results, results are of other weights, or the license is not clear.
    """
    best, args = run / BEST_NAME, _read_args(run)
    config = read_model_config(best)
    if not config.exits:
        raise MultiExitError(f'{run} is a run without exits: publish it with timm.models.push_to_hf_hub.')
    if not (run / RESULTS_NAME).is_file():
        raise MultiExitError(f'{run} has no {RESULTS_NAME}, which train.py writes at the end: let it end.')
    results = read_json(run / RESULTS_NAME)
    if validation is None and (run / VALIDATION_NAME).is_file():
        validation = run / VALIDATION_NAME
    measured = read_json(validation) if validation else results
    weights = hash_weights(best)
    if measured.get('weights') != weights:
        raise MultiExitError(
            f'{validation or run / RESULTS_NAME} is of other weights than {best}: measure these with validate.py'
            f' --model local-dir:{best} ... --results-file {run / VALIDATION_NAME} --results-format json.'
        )
    if config.budgets is None and any(row['policy'].startswith('budget ') for row in measured.get('dynamic', ())):
        raise MultiExitError(f'{validation} has budgets, {best} has none: run validate.py again with --save-policy.')
    base_model, license_ = find_license(args, labels, config.pretrained_cfg.get('license'))
    metrics = {
        **describe_model(config, repo_id, license_, base_model),
        'dataset': {
            'name': measured['dataset'],
            'hub_id': labels.dataset_id,
            'split': measured['split'],
            'num_samples': measured['num_samples'],
        },
        'epoch': {
            'best': None if results['best_epoch'] is None else results['best_epoch'] + 1,
            'epochs': results['epochs'],
            'chosen_by': results['epoch_chosen_by'],
            'chosen_on': results['epoch_chosen_on'],
            'is_reported_split': results['epoch_chosen_on'] == measured['split'],
        },
        **{name: _relative(measured[name]) for name in _MEASURED if name in measured},
        'environment': _environment(measured),
        'training': {
            'command': _relative_command(results['command']),
            'recipe': Path(args['config']).name if args.get('config') else None,
            'seed': args['seed'],
            'epochs': results['epochs'],
            'exit_loss': args['exit_loss'],
            'environment': _environment(results),
        },
        'weights': weights,
    }
    picture = (validation or run).parent / Path(PICTURE_NAME).name if validation else None
    with new_folder(folder, METRICS_NAME) as draft:
        for name in (BACKBONE_NAME, EXITS_NAME):
            shutil.copy2(best / name, draft / name)
        shutil.copy2(best / CONFIG_NAME, draft / CONFIG_NAME)
        restamp(draft, re.sub(r'\W+', '_', f'{args["exit_loss"]}_{measured["dataset"]}'), license_)
        (draft / ARGS_NAME).write_text(yaml.safe_dump({key: _relative(value) for key, value in args.items()}))
        write_papers(draft, metrics, picture)
    return metrics


def describe_model(config: ModelConfig, repo_id: str, license_: License, base_model: str | None) -> dict[str, Any]:
    """Return the part of `metrics.json` that is known without a measurement.

    Raises:
        MultiExitError: The architecture is known to neither timm nor this package, so that nobody could load it.
    """
    package = timm.model_entrypoint(config.architecture).__module__.split('.')[0]
    if package not in ('timm', 'timm_multiexit'):
        raise MultiExitError(
            f'{config.architecture} is registered by {package}, allowed are architectures of timm and timm_multiexit:'
            ' who loads it knows no others.'
        )
    return {
        'format_version': 1,
        'repo_id': repo_id,
        'architecture': config.architecture,
        'num_classes': config.pretrained_cfg['num_classes'],
        'input_size': list(config.pretrained_cfg['input_size']),
        'needs_import': package != 'timm',
        'license': license_._asdict(),
        'base_model': base_model,
    }


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in _ENVIRONMENT if name in results}


def restamp(folder: Path, tag: str, license_: License) -> None:
    """Let `config.json` say of the weights what is true of them now, not of those they started from."""
    values = read_json(folder / CONFIG_NAME)
    old = ('origin_url', 'paper_name', 'description', 'notes', 'test_crop_pct', 'label_offset')
    kept = {name: value for name, value in values['pretrained_cfg'].items() if name not in old}
    values['pretrained_cfg'] = {**kept, 'tag': tag, 'license': license_.name or license_.id, 'paper_ids': _EED}
    _write_json(folder / CONFIG_NAME, values)


def write_papers(folder: Path, metrics: dict[str, Any], picture: Path | None) -> None:
    """Write the picture, `metrics.json` and the card."""
    metrics['has_picture'] = picture is not None and picture.is_file()
    if metrics['has_picture']:
        (folder / PICTURE_NAME).parent.mkdir()
        shutil.copy2(picture, folder / PICTURE_NAME)
    _write_json(folder / METRICS_NAME, metrics)
    (folder / CARD_NAME).write_text(write_card(metrics), encoding='utf-8')
    load_pretrained(folder)  # what is refused when it is loaded is not published


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _read_args(run: Path) -> dict[str, Any]:
    path = run / ARGS_NAME
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MultiExitError(f'{run} is no run of train.py: its {ARGS_NAME} cannot be read.') from error
    if not isinstance(args, dict) or not {'model', 'seed', 'exit_loss'} <= args.keys():
        raise MultiExitError(f'{path} is no {ARGS_NAME} of train.py.')
    return args


def _relative(value: Any) -> Any:
    """Return a value without folders of this machine: of an absolute path its last part."""
    if isinstance(value, list):
        return [_relative(item) for item in value]
    if isinstance(value, dict):
        return {key: _relative(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    is_whole = Path(value).is_absolute() or '://' in value
    prefix, colon, path = ('', '', value) if is_whole else value.rpartition(':')  # local-dir:FOLDER, NAME:CHECKPOINT
    if Path(path).is_absolute() or path.startswith('~'):
        path = Path(path).name
    return prefix + colon + path


def _relative_command(command: list[str]) -> str:
    """Return a command line for a shell, without folders of this machine."""
    words = [_relative(word) for word in command]
    pairs = [word.partition('=') for word in words]
    words = [f'{name}={_relative(value)}' if sign else name for name, sign, value in pairs]
    return shlex.join(words)
