"""Publishing: a run or a model to the Hugging Face Hub, and the list of what is there."""

import shlex
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.run_folder import RunFolder, read_origin
from timm_multiexit.checkpoints.save import hash_weights, save_pretrained
from timm_multiexit.cli.flags.parser import option_name
from timm_multiexit.evaluation.exit_table import ExitTable, make_table
from timm_multiexit.hub_client.client import PushResult, check_push, push_folder
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import find_origin
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


def check_publishing(args: Namespace, *, has_table: bool, asks_hub: bool) -> None:
    """Raise for what would keep a run of `train.py` from being published at its end, before it begins.

    Args:
        args: Of the run.
        has_table: Whether there are images to measure it on.
        asks_hub: Ask the Hub whether it would take it.

    Raises:
        MultiExitError: One line with the flag, or see `hub.check_push`.
    """
    if not args.push_to_hub:
        for dest in ('hub_private', 'hub_license'):
            if getattr(args, dest):
                raise MultiExitError(f'{option_name(dest)} is of no effect without --push-to-hub: give ORG/NAME.')
        return
    if args.exits is None:
        raise MultiExitError('--push-to-hub publishes networks with exits: add --eed or --exits.')
    if not has_table:
        raise MultiExitError('--push-to-hub needs a table to publish: add --val-split or --test-split.')
    find_license(read_origin(vars(args)), Labels(args.hub_license))
    if asks_hub:
        check_push(args.push_to_hub, private=args.hub_private)


def publish_at_end(args: Namespace, folder: Path) -> str:
    """Publish a finished run as its flags say, and return where.

    Raises:
        MultiExitError: It could not be; the run is whole.
    """
    try:
        labels = Labels(args.hub_license)
        return publish_run(folder, args.push_to_hub, labels=labels, private=args.hub_private).url
    except MultiExitError as error:
        again = ['hub/publish.py', str(folder), args.push_to_hub, '--yes', *['--private'] * args.hub_private]
        again += ['--license', args.hub_license] if args.hub_license else []
        raise MultiExitError(
            f'{folder} is whole, but was not published: {error} Try again with {shlex.join(again)}'
        ) from error


def publish_run(run: Path, repo_id: str, *, labels: Labels = NO_LABELS, private: bool = False) -> PushResult:
    """Write the folder `publication` in a run and push it.

    Raises:
        MultiExitError: See `write_publication` and `hub.push_folder`.
    """
    folder = run / PUBLICATION_NAME
    repo_id = check_push(repo_id, private=private)
    # A run that goes on may hold what was measured of its earlier weights.
    files = RunFolder(run)
    is_current = files.read_results()['weights'] == _measured_weights(files.validation_path)
    validation = None if is_current else files.results_path
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
    base, license_ = find_license(
        model.origin or find_origin(model.pretrained_cfg, pretrained=True), Labels(license, base_model)
    )
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
