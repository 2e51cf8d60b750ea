"""What a model name means: a name of timm's registry, a folder, or a repository of the Hugging Face Hub.

timm itself is never given a folder or a repository, but the architecture and what was checked of its configuration.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from timm_multiexit.checkpoints.config import ModelConfig, read_model_config
from timm_multiexit.checkpoints.config_rules import BACKBONE_NAME, CONFIG_NAME, EXITS_NAME
from timm_multiexit.checkpoints.load import create_architecture, load_backbone, load_pretrained
from timm_multiexit.hub_client.client import fetch_files
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError


class ModelFolder(NamedTuple):
    """A model folder, on this machine or in the cache of the Hub.

    Attributes:
        folder: The folder; of the Hub's its configuration is there, and the weights once they were asked for.
        config: Its configuration, checked.
        repo_id: Of the Hub, None for a folder of one's own.
        commit: Of the Hub: all files are of this one, whatever is pushed meanwhile.
    """

    folder: Path
    config: ModelConfig
    repo_id: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """The model name that means this very source."""
        return f'hf-hub:{self.repo_id}@{self.commit}' if self.repo_id else f'local-dir:{self.folder}'


def find_folder(model_name: str, **kwargs: Any) -> ModelFolder | None:
    """Return the folder that a model name means, None for a name of timm's registry.

    Args:
        model_name: A timm name, `local-dir:FOLDER` or `hf-hub:ORG/NAME[@REVISION]`, of which the configuration is
            downloaded.
        **kwargs: What `timm.create_model` will be given.

    Raises:
        MultiExitError: There is no such model, the message has the nearest names; no such folder or repository, or it
            says what it must not say.
    """
    try:
        source, name = parse_model_name(model_name)
    except ValueError as error:
        raise MultiExitError(str(error)) from error
    if source == 'local-dir':
        return ModelFolder(Path(name), read_model_config(Path(name), overridden=kwargs))
    if source == 'hf-hub':
        repo_id, _, revision = name.partition('@')
        snapshot = fetch_files(repo_id, [CONFIG_NAME], revision=revision or None, cache_dir=kwargs.get('cache_dir'))
        config = read_model_config(snapshot.folder, overridden=kwargs)
        return ModelFolder(snapshot.folder, config, repo_id, snapshot.commit)
    if not timm.is_model(name):
        near = get_close_matches(name.split('.')[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f'nearest are {", ".join(near)}' if near else 'timm.list_models() lists what there is'
        raise MultiExitError(f"timm has no model '{name}', {hint}.")
    return None


def create_empty(model_name: str) -> nn.Module:
    """Return the timm model that a name means, without data, on the meta device.

    Raises:
        MultiExitError: See `find_folder` and `create_architecture`.
    """
    found = find_folder(model_name)
    with torch.device('meta'):
        return timm.create_model(model_name) if found is None else create_architecture(found.config, found.folder, {})


class Source(ModelFolder):
    """A model folder, and the models that can be made of it."""

    def create_model(self, *, pretrained: bool = False, **kwargs: Any) -> MultiExitModel:
        """Return the model with the source's own exits; keywords are those of `load_pretrained`."""
        model = load_pretrained(self._fetch(pretrained, kwargs), pretrained=pretrained, **kwargs)
        model.hub_commit = self.commit
        return self._signed(model)

    def create_backbone(self, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        """Return the timm model alone; keywords are those of `timm.create_model`."""
        folder = self._fetch(pretrained, kwargs)
        return self._signed(load_backbone(self.config, folder, pretrained=pretrained, **kwargs))

    def _fetch(self, pretrained: bool, kwargs: Mapping[str, Any]) -> Path:
        """Return the folder with the weights in it."""
        if pretrained and self.repo_id:
            names = [BACKBONE_NAME] + [EXITS_NAME] * (self.config.exits is not None)
            fetch_files(self.repo_id, names, revision=self.commit, cache_dir=kwargs.get('cache_dir'))
        return self.folder

    def _signed(self, model: Any) -> Any:
        if self.repo_id:
            model.pretrained_cfg['hf_hub_id'] = f'{self.repo_id}@{self.commit}'
        return model


def find_source(model_name: str | Source, **kwargs: Any) -> Source | None:
    """Return the folder that a model name means, None for a name of timm's registry.

    Raises:
        MultiExitError: See `find_folder`, whose arguments these are.
    """
    if isinstance(model_name, Source):
        return model_name
    found = find_folder(model_name, **kwargs)
    return None if found is None else Source(*found)


def create_backbone(model_name: str | Source, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a plain timm model: `timm.create_model`, but that folders and repositories are not trusted.

    Raises:
        MultiExitError: See `find_source` and `load_backbone`.
    """
    source = find_source(model_name, **kwargs)
    if source is None:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    return source.create_backbone(pretrained=pretrained, **kwargs)
