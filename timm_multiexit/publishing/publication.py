"""From a training run to the folder that is published.

A publication holds what `save_pretrained` writes, `args.yaml`, `metrics.json` with all numbers, the picture, and the
card, which is made only from `metrics.json`. The same run gives the same bytes.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import yaml

from timm_multiexit.checkpoints.config import ModelConfig
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_KEY, CONFIG_NAME, EXITS_NAME
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.run_folder import ARGS_NAME, RunFolder, read_origin
from timm_multiexit.data.datasets import is_same_split
from timm_multiexit.hub_client.files import EVAL_RESULTS, OWNED_FILES
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.card import PICTURE, write_card, write_eval_results
from timm_multiexit.publishing.licenses import NO_INFO, License, PublicationInfo, find_license
from timm_multiexit.publishing.run_checks import has_policy, read_run
from timm_multiexit.utils.errors import CheckpointError
from timm_multiexit.utils.files import new_folder
from timm_multiexit.utils.untrusted import read_json

CARD_NAME = 'README.md'
METRICS_NAME = 'metrics.json'
PROGRAMS_NAME = 'onnx'
PUBLICATION_NAME = 'publication'
_MEASURED = (
    'rows',
    'dynamic',
    'timing',
    'latency',
    'compare',
    'rivals',
    'overthinking',
    'curve',
    'calibrated_on',
    'precision',
)
_ENVIRONMENT = ('hardware', 'threads', 'versions', 'commit')
_EED = 'arXiv:2104.00299'

# Arguments about the location of a run, which do not apply to a repetition.
_OF_ITS_PLACE = ('output', 'experiment', 'resume', 'push_to_hub', 'hub_private', 'hub_license')


# Writes programs of a model into a folder, and returns what the card says of them.
AddPrograms = Callable[[MultiExitModel, Path], dict[str, Any]]


def write_publication(
    run: Path,
    folder: Path,
    repo_id: str | None,
    *,
    info: PublicationInfo = NO_INFO,
    validation: Path | None = None,
    add_programs: AddPrograms | None = None,
) -> dict[str, Any]:
    """Write the folder that a run is published as, and return the contents of `metrics.json`.

    Args:
        run: Folder of a run of `train.py`.
        folder: Replaced; an existing one must be an earlier publication.
        repo_id: Where it will be published, namespace/name; None for a card that names the folder.
        info: What the publisher says about the run.
        validation: JSON results of `validate.py` for the run's `best`, with its policies; None for the run's
            `validation.json` if it exists, else for the results of training.
        add_programs: Writes the folder `onnx` of the publication; None for none.

    Raises:
        CheckpointError: The run has no exits or no results, or the results are of other weights.
        InvalidValueError: The license is unclear, or see `find_license`.
    """
    best = RunFolder(run).best
    args, config, results, measured, picture = read_run(run, validation)
    base_model, license_ = find_license(read_origin(args), info)
    is_same = measured['dataset'] == results['dataset'] and is_same_split(results['epoch_chosen_on'], measured['split'])
    metrics = {
        **describe_model(config, _name_model(folder, repo_id), license_, base_model),
        'dataset': {
            'name': measured['dataset'],
            'hub_id': info.dataset_id,
            'split': measured['split'],
            'num_samples': measured['num_samples'],
            **({'note': info.dataset_note} if info.dataset_note else {}),
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
    with new_folder(folder, (METRICS_NAME, CONFIG_NAME), (*OWNED_FILES, f'{PROGRAMS_NAME}/.int8-*')) as draft:
        for name in (BACKBONE_NAME, EXITS_NAME, CONFIG_NAME):
            shutil.copy2(best / name, draft / name)
        tag = re.sub(r'\W+', '_', f'{args["exit_loss"]}_{measured["dataset"]}')
        write_publication_config(draft, tag, license_, repo_id)
        kept = {key: _relative(value) for key, value in args.items() if key not in _OF_ITS_PLACE}
        (draft / ARGS_NAME).write_text(yaml.safe_dump(kept))
        model = load_pretrained(draft).eval()  # only what can be loaded is published
        if add_programs is not None:
            metrics['onnx'] = add_programs(model, draft / PROGRAMS_NAME)
        write_card_files(draft, metrics, picture)
    return metrics


def _name_model(folder: Path, repo_id: str | None) -> str:
    """Return the name for `create_model`; of a folder outside of the working directory its last part.

    Of `RUN/publication` these are two, since the name of the run is the network's.
    """
    if repo_id is not None:
        return f'hf-hub:{repo_id}'
    folder = folder.resolve()
    if folder.is_relative_to(Path.cwd()):
        return f'local-dir:{folder.relative_to(Path.cwd()).as_posix()}'
    return (
        f'local-dir:{folder.parent.name}/{folder.name}' if folder.name == 'publication' else f'local-dir:{folder.name}'
    )


def _mark_default(metrics: dict[str, Any], config: ModelConfig) -> None:
    """Mark the row of the policy that `create_model` loads with the network."""
    own = [row for row in metrics.get('dynamic', ()) if has_policy(row, config.policy)]
    for row in own[:1]:
        row['is_default'] = True


def describe_model(config: ModelConfig, model_name: str, license_: License, base_model: str | None) -> dict[str, Any]:
    """Return the part of `metrics.json` that requires no measurement.

    Raises:
        CheckpointError: Neither timm nor this package has the architecture, so nobody else could load it.
    """
    package = timm.model_entrypoint(config.architecture).__module__.split('.')[0]
    if package not in ('timm', 'timm_multiexit'):
        raise CheckpointError(
            f'Architecture must be one of timm or timm_multiexit to be loaded elsewhere, got {config.architecture}'
            f' of {package}.'
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


def write_publication_config(folder: Path, tag: str, license_: License, repo_id: str | None) -> None:
    """Update `config.json` from the base weights to the published ones."""
    values = read_json(folder / CONFIG_NAME)
    old = ('origin_url', 'paper_name', 'description', 'notes', 'test_crop_pct', 'label_offset')
    kept = {name: value for name, value in values['pretrained_cfg'].items() if name not in old}
    values['pretrained_cfg'] = {**kept, 'tag': tag, 'license': license_.name or license_.id, 'paper_ids': _EED}
    if 'num_classes' in values:  # of older runs: transformers would pass it twice
        values.get('model_args', {}).pop('num_classes', None)
    # The origin of whatever is trained from these weights, wherever the folder is then.
    values[CONFIG_KEY]['origin'] = Origin(repo_id or 'a folder', license_.name or license_.id).to_dict()
    _write_json(folder / CONFIG_NAME, values)


def write_card_files(folder: Path, metrics: dict[str, Any], picture: Path | None) -> None:
    """Write the picture, `metrics.json`, the card, and the results for the Hub's leaderboards."""
    metrics['has_picture'] = picture is not None
    if picture is not None:
        (folder / PICTURE).parent.mkdir()
        shutil.copy2(picture, folder / PICTURE)
    _write_json(folder / METRICS_NAME, metrics)
    (folder / CARD_NAME).write_text(write_card(metrics), encoding='utf-8')
    results = write_eval_results(metrics)
    if results is not None:
        (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (folder / EVAL_RESULTS).write_text(results, encoding='utf-8')


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _relative(value: Any) -> Any:
    """Return a value without local folders: absolute paths and addresses are cut to their last part."""
    if isinstance(value, list):
        return [_relative(item) for item in value]
    if isinstance(value, dict):
        return {key: _relative(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if '://' in value:  # an address may contain names of buckets, tokens and signatures
        return Path(value.partition('?')[0]).name
    # local-dir:FOLDER, NAME:CHECKPOINT
    prefix, colon, path = ('', '', value) if Path(value).is_absolute() else value.rpartition(':')
    if Path(path).is_absolute() or path.startswith('~'):
        path = Path(path).name
    return prefix + colon + path


def _relative_command(command: list[str]) -> str:
    """Return a command line for a shell, without local folders."""
    pairs = [word.partition('=') for word in command]
    # The part before the first '=' may be an address itself.
    is_flag = [bool(sign) and '://' not in name for name, sign, _ in pairs]
    words = [
        f'{name}={_relative(value)}' if has_value else _relative(word)
        for word, (name, _, value), has_value in zip(command, pairs, is_flag)
    ]
    return shlex.join(words)
