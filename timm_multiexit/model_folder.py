"""What a model name means: a name of timm's registry, a folder, or a repository of the Hugging Face Hub.

timm itself is never given a folder or a repository, but the architecture and what was checked of its configuration.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from timm_multiexit.config import MultiExitError
from timm_multiexit.hub import fetch_files
from timm_multiexit.model_config import CONFIG_NAME, ModelConfig, read_model_config
from timm_multiexit.refusals import one_line


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


def create_architecture(config: ModelConfig, directory: Path, given: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Return the timm model that a checked configuration describes.

    Args:
        config: The configuration.
        directory: Its folder, for the message.
        given: The caller's keywords of `timm.create_model`, which go before what the configuration says.
        **kwargs: More of them, `pretrained` and `pretrained_cfg`.

    Raises:
        MultiExitError: It cannot be made so.
    """
    kwargs = {'pretrained_cfg': dict(config.pretrained_cfg), 'pretrained_model_args': config.model_args, **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return timm.create_model(config.architecture, **kwargs, **{**config.model_args, **given})
    except Exception as error:  # architectures raise all kinds of errors for what they do not take
        raise MultiExitError(f'{config.architecture} of {directory} cannot be made so: {one_line(error)}.') from error


def create_empty(model_name: str) -> nn.Module:
    """Return the timm model that a name means, without data, on the meta device.

    Raises:
        MultiExitError: See `find_folder` and `create_architecture`.
    """
    found = find_folder(model_name)
    with torch.device('meta'):
        return timm.create_model(model_name) if found is None else create_architecture(found.config, found.folder, {})
