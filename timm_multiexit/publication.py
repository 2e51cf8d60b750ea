"""From a training run, or a model, to the folder that is published, and from there to the Hub.

A publication holds what `save_pretrained` writes, `args.yaml`, `metrics.json` with all numbers, the picture, and the
card, which is made of `metrics.json` alone. The same run gives the same bytes.
"""

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from timm.models import parse_model_name

from timm_multiexit.card import write_card
from timm_multiexit.checkpoint import hash_weights, load_pretrained, save_pretrained
from timm_multiexit.config import MultiExitError
from timm_multiexit.factory import ExitTable, make_table
from timm_multiexit.files import write_text
from timm_multiexit.hub import PushResult, check_push, push_folder
from timm_multiexit.licenses import License, resolve_license
from timm_multiexit.metrics import ENSEMBLE, exit_names
from timm_multiexit.model import MultiExitModel
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


_NO_LABELS = Labels()


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
    run: Path, folder: Path, repo_id: str, *, labels: Labels = _NO_LABELS, validation: Path | None = None
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
        **_describe_model(config, repo_id, license_, base_model),
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
    with _new_folder(folder) as draft:
        for name in (BACKBONE_NAME, EXITS_NAME):
            shutil.copy2(best / name, draft / name)
        values = read_json(best / CONFIG_NAME)
        tag = re.sub(r'\W+', '_', f'{args["exit_loss"]}_{measured["dataset"]}')
        values['pretrained_cfg'] = _restamp(values['pretrained_cfg'], tag, license_)
        _write_json(draft / CONFIG_NAME, values)
        (draft / ARGS_NAME).write_text(yaml.safe_dump({key: _relative(value) for key, value in args.items()}))
        _write_papers(draft, metrics, picture)
    return metrics


def publish_run(
    run: Path, repo_id: str, *, labels: Labels = _NO_LABELS, private: bool = False
) -> tuple[dict[str, Any], PushResult]:
    """Write the folder `publication` in a run and push it, and return its metrics and what the push did.

    Raises:
        MultiExitError: See `write_publication` and `hub.push_folder`.
    """
    folder = run / PUBLICATION_NAME
    repo_id = check_push(repo_id)
    metrics = write_publication(run, folder, repo_id, labels=labels)
    return metrics, push_folder(folder, repo_id, private=private)


def list_model(path: Path, metrics: Mapping[str, Any], result: PushResult, *, tag: str | None = None) -> None:
    """Enter a published model into the list of them, in the place of what the list says of its repository.

    Args:
        path: The list, a YAML file; made if it is not there.
        metrics: What `write_publication` returned.
        result: What the push returned.
        tag: Name of the commit.

    Raises:
        MultiExitError: The list cannot be read or written.
    """
    try:
        models = yaml.safe_load(path.read_text(encoding='utf-8'))['models'] if path.exists() else []
        others = [model for model in models if model['repository'] != result.repo_id]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise MultiExitError(f'{path} is no list of published models: it was pushed, and is not listed.') from error
    rows = metrics['rows']
    metric = next((name for name in ('top-1', 'mAP') if name in rows[0]), None)
    entry = {
        'repository': result.repo_id,
        'commit': result.commit,
        'tag': tag,
        'architecture': metrics['architecture'],
        'dataset': metrics['dataset'],
        'recipe': metrics['training']['recipe'],
        'command': metrics['training']['command'],
        'seed': metrics['training']['seed'],
        metric or 'accuracy': {row['exit']: row.get(metric) for row in rows},
        'policies': {
            row['policy']: {'top-1': row['top-1'], 'MACs, %': row['macs_percent']} for row in metrics.get('dynamic', ())
        },
    }
    models = sorted([*others, entry], key=lambda model: model['repository'])
    head = '# What is published, written by hub/publish.py: repository, commit, how it was made, and what it reaches in'
    write_text(path, f'{head} percent.\n{yaml.safe_dump({"models": models}, sort_keys=False, width=120)}')


def push_to_hub(
    model: MultiExitModel,
    repo_id: str,
    *,
    table: ExitTable | None = None,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
    license: str | None = None,
    **saved: Any,
) -> PushResult:
    """Publish a model, with its policy and budgets, as one commit of a repository of the Hugging Face Hub.

    Trained by `train.py`, a run is better published by `hub/publish.py`, whose card says how it was made.

    Args:
        model: The model; its exits should be trained.
        repo_id: namespace/name; the repository is made if there is none.
        table: What `evaluate` returned, for the card.
        private: Make a private repository.
        tag: Name that the commit gets as well.
        token: None for the one that is logged in.
        license: Of the weights; None for that of the weights that training started from.
        **saved: `data_config` and `label_names` of `save_pretrained`.

    Raises:
        MultiExitError: See `hub.push_folder` and `licenses.resolve_license`.
    """
    cfg = model.backbone.pretrained_cfg
    base = None if cfg.get('tag') is None and cfg.get('license') is None else f'timm/{cfg.get("architecture")}'
    license_ = resolve_license(cfg.get('license'), asked=license, base=base)
    if table is None:
        names = (*exit_names(len(model.exits)), ENSEMBLE)
        table = make_table(model, {name: {} for name in names}, input_size=model.input_size, num_samples=0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pretrained(model, folder, **saved)
        metrics = _describe_model(read_model_config(folder), repo_id, license_, None)
        metrics |= {'rows': table.rows, 'weights': hash_weights(folder)}
        if table.num_samples:
            metrics['dataset'] = {'name': None, 'hub_id': None, 'split': None, 'num_samples': table.num_samples}
        _write_papers(folder, metrics, None)
        return push_folder(folder, repo_id, private=private, tag=tag, token=token)


def _describe_model(config: ModelConfig, repo_id: str, license_: License, base_model: str | None) -> dict[str, Any]:
    module = timm.model_entrypoint(config.architecture).__module__
    return {
        'format_version': 1,
        'repo_id': repo_id,
        'architecture': config.architecture,
        'num_classes': config.pretrained_cfg['num_classes'],
        'input_size': list(config.pretrained_cfg['input_size']),
        'needs_import': module.split('.')[0] != 'timm',
        'license': license_._asdict(),
        'base_model': base_model,
    }


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in _ENVIRONMENT if name in results}


def _restamp(pretrained_cfg: Mapping[str, Any], tag: str, license_: License) -> dict[str, Any]:
    """Return timm's configuration of the weights as they are now, without what is true of those they started from."""
    old = ('origin_url', 'paper_name', 'description', 'notes', 'test_crop_pct', 'label_offset')
    kept = {name: value for name, value in pretrained_cfg.items() if name not in old}
    return {**kept, 'tag': tag, 'license': license_.name or license_.id, 'paper_ids': _EED}


def _write_papers(folder: Path, metrics: dict[str, Any], picture: Path | None) -> None:
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


class _new_folder:  # noqa: N801 - reads as a statement
    """Gives an empty folder beside `folder`, which takes its place if nothing raised.

    Raises:
        MultiExitError: `folder` holds something that is no publication.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        if folder.exists() and any(folder.iterdir()) and not (folder / METRICS_NAME).is_file():
            raise MultiExitError(f'{folder} holds files and is no publication: give another folder.')

    def __enter__(self) -> Path:
        self._draft = self._folder.with_name(f'.{self._folder.name}-new')
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(parents=True)
        return self._draft

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._draft.rename(self._folder)
        else:
            shutil.rmtree(self._draft, ignore_errors=True)
