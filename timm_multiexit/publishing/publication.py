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
from typing import Any

import timm
import yaml

from timm_multiexit.checkpoints.config import ModelConfig
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_KEY, CONFIG_NAME, EXITS_NAME
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.run_folder import ARGS_NAME, RunFolder, read_origin
from timm_multiexit.data.datasets import is_same_split
from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.card import PICTURE, write_card
from timm_multiexit.publishing.licenses import NO_LABELS, Labels, License, find_license
from timm_multiexit.publishing.run_checks import has_policy, read_run
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import new_folder
from timm_multiexit.utils.untrusted import read_json

CARD_NAME = 'README.md'

METRICS_NAME = 'metrics.json'

PUBLICATION_NAME = 'publication'

_MEASURED = ('rows', 'dynamic', 'timing', 'latency', 'compare', 'overthinking', 'curve', 'calibrated_on', 'precision')

_ENVIRONMENT = ('hardware', 'threads', 'versions', 'commit')

_EED = 'arXiv:2104.00299'

# Arguments that say where a run is and goes, which whoever repeats it does not want.
_OF_ITS_PLACE = ('output', 'experiment', 'resume', 'push_to_hub', 'hub_private', 'hub_license')


def write_publication(
    run: Path, folder: Path, repo_id: str | None, *, labels: Labels = NO_LABELS, validation: Path | None = None
) -> dict[str, Any]:
    """Write the folder that a run is published as, and return what `metrics.json` holds.

    Args:
        run: Folder of a run of `train.py`.
        folder: Made anew; one that is there must be an earlier publication.
        repo_id: Where it will be published, namespace/name; None for nowhere: the card is of the folder then.
        labels: What the run does not know of itself.
        validation: What `validate.py --results-file` wrote for the run's `best`, with what policies give; the run's
            own `validation.json` where there is one, else what training measured of each exit.

    Raises:
        MultiExitError: The run has no exits or no results, results are of other weights, or the license is not clear.
    """
    best = RunFolder(run).best
    args, config, results, measured, picture = read_run(run, validation)
    base_model, license_ = find_license(read_origin(args), labels)
    is_same = measured['dataset'] == results['dataset'] and is_same_split(results['epoch_chosen_on'], measured['split'])
    metrics = {
        **describe_model(config, _name_model(folder, repo_id), license_, base_model),
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
            'is_reported_split': is_same,
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
        'weights': measured['weights'],
    }
    _mark_default(metrics, config)
    with new_folder(folder, METRICS_NAME) as draft:
        for name in (BACKBONE_NAME, EXITS_NAME):
            shutil.copy2(best / name, draft / name)
        shutil.copy2(best / CONFIG_NAME, draft / CONFIG_NAME)
        restamp(draft, re.sub(r'\W+', '_', f'{args["exit_loss"]}_{measured["dataset"]}'), license_, repo_id)
        kept = {key: _relative(value) for key, value in args.items() if key not in _OF_ITS_PLACE}
        (draft / ARGS_NAME).write_text(yaml.safe_dump(kept))
        write_papers(draft, metrics, picture)
        load_pretrained(draft)  # what is refused when it is loaded is not published
    return metrics


def _name_model(folder: Path, repo_id: str | None) -> str:
    """Return what `create_model` takes; of a folder outside of this one its name, for whoever has it elsewhere."""
    if repo_id is not None:
        return f'hf-hub:{repo_id}'
    is_inside = folder.resolve().is_relative_to(Path.cwd())
    return f'local-dir:{folder.resolve().relative_to(Path.cwd()).as_posix() if is_inside else folder.name}'


def _mark_default(metrics: dict[str, Any], config: ModelConfig) -> None:
    """Mark the row of the policy that `create_model` gives with the network."""
    own = [row for row in metrics.get('dynamic', ()) if has_policy(row, config.policy)]
    for row in own[:1]:
        row['is_default'] = True


def describe_model(config: ModelConfig, model_name: str, license_: License, base_model: str | None) -> dict[str, Any]:
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
        'model_name': model_name,
        'architecture': config.architecture,
        'num_classes': config.pretrained_cfg['num_classes'],
        'input_size': list(config.pretrained_cfg['input_size']),
        'needs_import': package != 'timm',
        'license': license_._asdict(),
        'base_model': base_model,
    }


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in _ENVIRONMENT if name in results}


def restamp(folder: Path, tag: str, license_: License, repo_id: str | None) -> None:
    """Let `config.json` say of the weights what is true of them now, not of those they started from."""
    values = read_json(folder / CONFIG_NAME)
    old = ('origin_url', 'paper_name', 'description', 'notes', 'test_crop_pct', 'label_offset')
    kept = {name: value for name, value in values['pretrained_cfg'].items() if name not in old}
    values['pretrained_cfg'] = {**kept, 'tag': tag, 'license': license_.name or license_.id, 'paper_ids': _EED}
    # What starts from these weights starts from this publication, wherever the folder is then.
    values[CONFIG_KEY]['origin'] = Origin(repo_id or 'a folder', license_.name or license_.id).to_dict()
    _write_json(folder / CONFIG_NAME, values)


def write_papers(folder: Path, metrics: dict[str, Any], picture: Path | None) -> None:
    """Write the picture, `metrics.json` and the card."""
    metrics['has_picture'] = picture is not None
    if metrics['has_picture']:
        (folder / PICTURE).parent.mkdir()
        shutil.copy2(picture, folder / PICTURE)
    _write_json(folder / METRICS_NAME, metrics)
    (folder / CARD_NAME).write_text(write_card(metrics), encoding='utf-8')


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _relative(value: Any) -> Any:
    """Return a value without folders of this machine: of an absolute path or an address its last part."""
    if isinstance(value, list):
        return [_relative(item) for item in value]
    if isinstance(value, dict):
        return {key: _relative(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if '://' in value:  # an address may have names of buckets, tokens and signatures
        return Path(value.partition('?')[0]).name
    # local-dir:FOLDER, NAME:CHECKPOINT
    prefix, colon, path = ('', '', value) if Path(value).is_absolute() else value.rpartition(':')
    if Path(path).is_absolute() or path.startswith('~'):
        path = Path(path).name
    return prefix + colon + path


def _relative_command(command: list[str]) -> str:
    """Return a command line for a shell, without folders of this machine."""
    pairs = [word.partition('=') for word in command]
    # Of an address what comes before its first '=' may be one already.
    is_flag = [bool(sign) and '://' not in name for name, sign, _ in pairs]
    words = [
        f'{name}={_relative(value)}' if has_value else _relative(word)
        for word, (name, _, value), has_value in zip(command, pairs, is_flag)
    ]
    return shlex.join(words)
