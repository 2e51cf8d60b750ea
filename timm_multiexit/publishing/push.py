"""Publish a run or a model on the Hugging Face Hub."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.checkpoints.save import hash_weights, save_pretrained
from timm_multiexit.evaluation.exit_table import ExitTable, make_table
from timm_multiexit.hub_client.client import PushResult, check_push, push_folder
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import find_origin
from timm_multiexit.publishing.licenses import NO_INFO, PublicationInfo, find_license
from timm_multiexit.publishing.publication import (
    PUBLICATION_NAME,
    describe_model,
    write_card_files,
    write_publication,
    write_publication_config,
)
from timm_multiexit.utils.checks import check_instance
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, brief
from timm_multiexit.utils.text import ENSEMBLE, exit_names
from timm_multiexit.utils.untrusted import read_json


def publish_run(run: Path, repo_id: str, *, info: PublicationInfo = NO_INFO, private: bool = False) -> PushResult:
    """Write the folder `publication` in a run and push it.

    Raises:
        MultiExitError: See `write_publication`.
        HubError: See `hub_client.client.push_folder`.
    """
    folder = run / PUBLICATION_NAME
    repo_id = check_push(repo_id, private=private)
    files = RunFolder(run)
    measured = read_json(files.validation_path) if files.validation_path.is_file() else {}
    # A resumed run may hold a validation of its earlier weights.
    is_current = files.read_results()['weights'] == measured.get('weights')
    validation = None if is_current else files.results_path
    write_publication(run, folder, repo_id, info=info, validation=validation)
    return push_folder(folder, repo_id, private=private)


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

    A run of `train.py` is better published by `hub/publish.py`, whose card also describes the training.

    Args:
        model: The model; its exits should be trained.
        repo_id: namespace/name; the repository is created if it does not exist.
        table: Result of `evaluate`, for the card.
        private: Create a private repository.
        tag: Tag of the commit.
        token: None for the one that is logged in.
        license: License of the weights; None for that of the base weights, which training started from.
        base_model: Repository of the base weights; None for those that `create_model` loaded. For a model created
            otherwise they are assumed to be those of timm's registry, if it has any.
        **saved: `data_config` and `label_names` of `save_pretrained`.

    Raises:
        HubError: See `hub_client.client.push_folder`.
        InvalidTypeError: The model is a truncated or a plain one.
        InvalidValueError: See `licenses.resolve_license`.
    """
    if not isinstance(model, MultiExitModel):
        what = type(model).__name__ if isinstance(model, nn.Module) else brief(model)
        raise InvalidTypeError(
            f'model must be a MultiExitModel to be published, got {what}: save_pretrained writes a'
            ' folder of it, which `hf upload` pushes.'
        )
    if model.module_info is not None:
        raise InvalidValueError(
            f'model must have a timm backbone to be published, got {type(model.backbone).__name__}, which nobody could'
            ' create from the repository: upload the folder of save_pretrained together with its code.'
        )
    for name, value, kind in (('tag', tag, str), ('license', license, str), ('base_model', base_model, str)):
        if value is not None:
            check_instance(name, value, kind)
    if table is not None:
        check_instance('table', table, ExitTable)
    origin = model.origin or find_origin(model.pretrained_cfg, pretrained=True)
    base, license_ = find_license(origin, PublicationInfo(license, base_model))
    if table is None:
        names = (*exit_names(len(model.exits)), ENSEMBLE)
        table = make_table(model, {name: {} for name in names}, input_size=model.input_size, num_samples=0)
    saved['data_config'] = {'input_size': model.input_size, **(saved.get('data_config') or {})}
    repo_id = check_push(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pretrained(model, folder, **saved)
        write_publication_config(folder, 'multiexit', license_, repo_id)
        metrics = describe_model(read_model_config(folder), f'hf-hub:{repo_id}', license_, base)
        metrics |= {'rows': table.rows, 'weights': hash_weights(folder)}
        if table.num_samples:
            metrics['dataset'] = {'name': None, 'hub_id': None, 'split': None, 'num_samples': table.num_samples}
        write_card_files(folder, metrics, None)
        load_pretrained(folder)
        return push_folder(folder, repo_id, private=private, tag=tag, token=token)
