"""Publishing: a run or a model to the Hugging Face Hub, and the list of what is there."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.run_folder import RESULTS_NAME, VALIDATION_NAME
from timm_multiexit.checkpoints.save import hash_weights, save_pretrained
from timm_multiexit.evaluation.evaluate import ExitTable, make_table
from timm_multiexit.hub_client.client import PushResult, check_push, push_folder
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.licenses import NO_LABELS, Labels, find_license
from timm_multiexit.publishing.publication import (
    PUBLICATION_NAME,
    describe_model,
    restamp,
    write_papers,
    write_publication,
)
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_text
from timm_multiexit.utils.text import ENSEMBLE, exit_names
from timm_multiexit.utils.untrusted import read_json


def publish_run(run: Path, repo_id: str, *, labels: Labels = NO_LABELS, private: bool = False) -> PushResult:
    """Write the folder `publication` in a run and push it.

    Raises:
        MultiExitError: See `write_publication` and `hub.push_folder`.
    """
    folder = run / PUBLICATION_NAME
    repo_id = check_push(repo_id, private=private)
    # A run that goes on may hold what was measured of its earlier weights.
    is_current = read_json(run / RESULTS_NAME)['weights'] == _measured_weights(run / VALIDATION_NAME)
    validation = None if is_current else run / RESULTS_NAME
    write_publication(run, folder, repo_id, labels=labels, validation=validation)
    return push_folder(folder, repo_id, private=private)


def _measured_weights(path: Path) -> dict[str, str] | None:
    return read_json(path).get('weights') if path.is_file() else None


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
        same = [model for model in models if (model['repository'], model['commit']) == (result.repo_id, result.commit)]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise MultiExitError(f'{result.url} is pushed, and not listed: {path} is no list of models.') from error
    rows = metrics['rows']
    metric = next((name for name in ('top-1', 'mAP') if name in rows[0]), None)
    entry = {
        'repository': result.repo_id,
        'commit': result.commit,
        'tag': tag or (same[0]['tag'] if same else None),
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
    try:
        write_text(path, f'{head} percent.\n{yaml.safe_dump({"models": models}, sort_keys=False, width=120)}')
    except MultiExitError as error:
        raise MultiExitError(f'{result.url} is pushed, and not listed: {error}') from error


def push_to_hub(
    model: MultiExitModel,
    repo_id: str,
    *,
    table: ExitTable | None = None,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
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
        base_model: Repository of these; None for what `create_model` was told. Of a model that it did not make they
            are taken to be those of timm's registry, where it has some.
        **saved: `data_config` and `label_names` of `save_pretrained`.

    Raises:
        MultiExitError: See `hub.push_folder` and `licenses.resolve_license`.
    """
    base, license_ = find_license(model.origin or _guess_origin(model), Labels(license, base_model))
    if table is None:
        names = (*exit_names(len(model.exits)), ENSEMBLE)
        table = make_table(model, {name: {} for name in names}, input_size=model.input_size, num_samples=0)
    saved['data_config'] = {'input_size': model.input_size, **(saved.get('data_config') or {})}
    repo_id = check_push(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pretrained(model, folder, **saved)
        restamp(folder, 'multiexit', license_, repo_id)
        metrics = describe_model(read_model_config(folder), f'hf-hub:{repo_id}', license_, base)
        metrics |= {'rows': table.rows, 'weights': hash_weights(folder)}
        if table.num_samples:
            metrics['dataset'] = {'name': None, 'hub_id': None, 'split': None, 'num_samples': table.num_samples}
        write_papers(folder, metrics, None)
        load_pretrained(folder)
        return push_folder(folder, repo_id, private=private, tag=tag, token=token)


def _guess_origin(model: MultiExitModel) -> Origin:
    """Return the weights of timm's registry that a model could have: it does not say whether it has them."""
    cfg = model.pretrained_cfg
    if not any(cfg.get(key) for key in ('hf_hub_id', 'url', 'file')):
        return Origin()
    return Origin((cfg.get('hf_hub_id') or 'unnamed weights').partition('@')[0], cfg.get('license'))
