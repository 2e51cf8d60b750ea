"""What a model name means: a name of timm's registry, a folder, or a repository of the Hugging Face Hub.

timm itself is never given a folder or a repository, only the architecture and what was checked of its configuration.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError
from timm.models import parse_model_name
from torch import nn

from timm_multiexit.checkpoints.architecture import create_empty_architecture, create_empty_truncated
from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_NAME, EXITS_NAME
from timm_multiexit.checkpoints.load import load_backbone, load_pretrained, load_truncated
from timm_multiexit.hub_client.client import explain_download, fetch_files
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.utils.checks import check_path
from timm_multiexit.utils.errors import (
    LIBRARY_ERRORS,
    InvalidValueError,
    MissingFileError,
    MultiExitError,
    one_line,
)

_Model = TypeVar('_Model', bound=nn.Module)


@dataclass(frozen=True)
class ModelSource:
    """A model folder, on this machine or in the cache of the Hub, and the models that can be made of it.

    Attributes:
        folder: The folder. For a repository it has the configuration, and the weights once they were needed.
        config: Its configuration, checked.
        repo_id: The repository on the Hub, None for a local folder.
        commit: Of the repository: all files are from this commit, whatever is pushed meanwhile.
    """

    folder: Path
    config: ModelConfig
    repo_id: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """The model name that means exactly this source."""
        return f'hf-hub:{self.repo_id}@{self.commit}' if self.repo_id else f'local-dir:{self.folder}'

    def __str__(self) -> str:
        return self.name

    @property
    def origin(self) -> Origin:
        """What a model starts from that takes its weights."""
        if self.repo_id:
            return Origin(self.repo_id, self.config.pretrained_cfg.get('license'), self.commit)
        return self.config.origin or Origin('a folder')

    @property
    def has_exits(self) -> bool:
        """Whether it holds a multi-exit model, not a plain timm model."""
        return bool(self.config.exits)

    def create_model(self, *, pretrained: bool = False, **kwargs: Any) -> MultiExitModel:
        """Return the model with the source's own exits; keywords are those of `load_pretrained`."""
        self._fetch_weights(pretrained, kwargs.get('cache_dir'))
        model = load_pretrained(self.folder, config=self.config, pretrained=pretrained, **kwargs)
        return self._sign(model)

    def create_backbone(self, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        """Return the timm model alone, or the truncated model; keywords are those of `timm.create_model`."""
        self._fetch_weights(pretrained, kwargs.get('cache_dir'))
        if self.config.truncated is not None:
            return self._sign(load_truncated(self.folder, self.config, pretrained=pretrained, **kwargs))
        return self._sign(load_backbone(self.config, self.folder, pretrained=pretrained, **kwargs))

    def _fetch_weights(self, pretrained: bool, cache_dir: Any) -> None:
        if pretrained and self.repo_id:
            names = [BACKBONE_NAME] + [EXITS_NAME] * (self.config.exits is not None)
            fetch_files(self.repo_id, names, revision=self.commit, cache_dir=cache_dir)

    def _sign(self, model: _Model) -> _Model:
        """Return the model with the repository where timm keeps it, which is all that a plain model knows of it."""
        if self.repo_id:
            cfg: Any = model.pretrained_cfg
            cfg['hf_hub_id'] = f'{self.repo_id}@{self.commit}'
        return model


def find_source(model: str | ModelSource, **kwargs: Any) -> ModelSource | None:
    """Return the folder or repository that a model name means, None for a name of timm's registry.

    Args:
        model: A timm name, `local-dir:FOLDER` or `hf-hub:ORG/NAME[@REVISION]`, whose configuration is downloaded. A
            source is returned as it is.
        **kwargs: What `timm.create_model` will be given.

    Raises:
        InvalidValueError: timm has no model of this name; the message has the nearest names.
        MissingFileError: `checkpoint_path` does not exist.
        CheckpointError: The folder or repository has no `config.json`, or one with values that are not allowed.
        HubError: The repository cannot be read.
    """
    path = kwargs.get('checkpoint_path')
    if path:
        check_path('checkpoint_path', path)
        if not os.path.isfile(path):  # pathlib raises for names that are too long
            what = 'is a folder' if os.path.isdir(path) else 'does not exist'
            raise MissingFileError(f'checkpoint_path {path} {what}.')
    if isinstance(model, ModelSource):
        return model
    try:
        scheme, name = parse_model_name(model)
    except ValueError as error:
        raise InvalidValueError(str(error)) from error
    if scheme == 'local-dir':
        return ModelSource(Path(name), read_model_config(Path(name), overridden=kwargs))
    if scheme == 'hf-hub':
        repo_id, _, revision = name.partition('@')
        snapshot = fetch_files(repo_id, [CONFIG_NAME], revision=revision or None, cache_dir=kwargs.get('cache_dir'))
        config = read_model_config(snapshot.folder, overridden=kwargs)
        return ModelSource(snapshot.folder, config, repo_id, snapshot.commit)
    if not timm.is_model(name):
        near = get_close_matches(name.split('.')[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f'nearest are {", ".join(near)}' if near else 'timm.list_models() lists all'
        raise InvalidValueError(f"timm has no model '{name}', {hint}.")
    return None


def create_empty_backbone(model: str | ModelSource) -> nn.Module:
    """Return the timm model that a name means, without data, on the meta device."""
    source = find_source(model)
    with torch.device('meta'):
        if source is None:
            return timm.create_model(str(model))
    if source.config.truncated is not None:
        return create_empty_truncated(source.config, source.folder, {})
    return create_empty_architecture(source.config, source.folder, {})


def create_backbone(model: str | ModelSource, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a plain timm model: `timm.create_model`, except that folders and repositories are not trusted.

    Raises:
        MultiExitError: See `find_source`.
        InvalidValueError: There are no trained weights of that name, or timm does not take the keywords.
        HubError: They cannot be downloaded.
    """
    source = find_source(model, **kwargs)
    if source is not None:
        return source.create_backbone(pretrained=pretrained, **kwargs)
    with explain_weights(str(model), **kwargs) if pretrained else nullcontext():
        return _create(str(model), pretrained=pretrained, **kwargs)


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except (MultiExitError, OSError, torch.OutOfMemoryError):
        raise
    except (*LIBRARY_ERRORS, AttributeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        path = kwargs.get('checkpoint_path')
        hint = f'Check checkpoint_path {path}, of a plain timm model; load_checkpoint takes others' if path else ''
        raise InvalidValueError(
            f'Cannot create {name}: {one_line(error)}. {hint or "Check the keywords for timm.create_model"}.'
        ) from error


@contextmanager
def explain_weights(name: str, **kwargs: Any) -> Iterator[None]:
    """Say in one line, and without waiting, why timm cannot load the trained weights that it has of a name.

    Raises:
        InvalidValueError: There are no trained weights of that name.
        HubError: They cannot be downloaded.
    """
    repo_id, file_name = _find_weights(name, kwargs)
    with explain_download(repo_id, file_name, cache_dir=kwargs.get('cache_dir')):
        yield


def _find_weights(name: str, kwargs: dict[str, Any]) -> tuple[str | None, str]:
    """Return repository, None for none, and file of the trained weights that timm has of a name."""
    if kwargs.get('pretrained_cfg') or kwargs.get('pretrained_cfg_overlay'):
        return None, BACKBONE_NAME  # a file, most often
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None and '.' not in name:
        return None, BACKBONE_NAME  # an older name, which timm maps to one of today's
    if cfg is None or not cfg.has_weights:
        raise InvalidValueError(
            f"timm has no trained weights of '{name}': start without them, or take a name of timm.list_pretrained()."
        )
    return None if cfg.file or cfg.state_dict else cfg.hf_hub_id, cfg.hf_hub_filename or BACKBONE_NAME
