"""Models of a folder or of a repository of the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_multiexit.hub import fetch_files
from timm_multiexit.loading import load_backbone, load_pretrained
from timm_multiexit.model import MultiExitModel
from timm_multiexit.model_config import BACKBONE_NAME, EXITS_NAME
from timm_multiexit.model_folder import ModelFolder, find_folder


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


def find_source(model_name: str, **kwargs: Any) -> Source | None:
    """Return the folder that a model name means, None for a name of timm's registry.

    Raises:
        MultiExitError: See `find_folder`, whose arguments these are.
    """
    found = find_folder(model_name, **kwargs)
    return None if found is None else Source(*found)


def create_backbone(model_name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a plain timm model: `timm.create_model`, but that folders and repositories are not trusted.

    Raises:
        MultiExitError: See `find_source` and `load_backbone`.
    """
    source = find_source(model_name, **kwargs)
    if source is None:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    return source.create_backbone(pretrained=pretrained, **kwargs)
