"""Stamp."""

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from timm_multiexit.models.multi_exit import MultiExitModel


def describe_preparation(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's `resolve_data_config` says, JSON-ready; mean and std averaged as timm does for grey images."""
    described = {name: list(value) if isinstance(value, tuple) else value for name, value in data_config.items()}
    num_channels = described['input_size'][0]
    for name in ('mean', 'std'):
        if len(described[name]) != num_channels:
            described[name] = [sum(described[name]) / len(described[name])] * num_channels
    return described


# timm's prefixes of names of data sets.
_READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')

_FOLDER_READERS = ('image_folder', 'folder')


# Accelerate's names of mixed precision.
_PRECISIONS = {'fp16': 'amp float16', 'bf16': 'amp bfloat16'}


def describe_inputs(
    model: MultiExitModel,
    data_config: Mapping[str, Any],
    *,
    dataset: str,
    precision: str = 'no',
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what results are of: dataset, input_size, preparation, precision, and the SHA-256 of weights.

    Args:
        model: What was evaluated.
        data_config: How images are prepared.
        dataset: Name of the data set.
        precision: `mixed_precision` of the accelerator.
        weights: What `hash_weights` returned for the folder whose weights were evaluated; None for none.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix('torch.')
    return {
        'dataset': dataset,
        'input_size': list(data_config['input_size']),
        'preparation': describe_preparation(data_config),
        'precision': _PRECISIONS.get(precision, dtype),
        **({} if weights is None else {'weights': dict(weights)}),
    }


def name_dataset(args: Namespace) -> str:
    """Return the name of the data without the reader's, that of the folder where no other is given.

    >>> name_dataset(Namespace(dataset='torch/cifar10', data_dir='data'))
    'cifar10'
    >>> name_dataset(Namespace(dataset='', data_dir='/data/imagenet/'))
    'imagenet'
    """
    name = args.dataset.partition('?')[0]
    if name.partition('/')[0].lower() in _READERS:
        name = name.partition('/')[2]
    if name.lower() in _FOLDER_READERS:
        name = ''
    # No folder of this machine: results are published.
    if not name or os.path.isabs(name):
        name = os.path.basename(os.path.abspath(name or (args.data_dir or '').partition('?')[0]))
    return name


def _fit_channels(data_config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with one mean and deviation per channel, as timm's loaders normalize other images."""
    channels = data_config['input_size'][0]
    fitted = {
        key: (sum(data_config[key]) / len(data_config[key]),) * channels
        for key in ('mean', 'std')
        if len(data_config[key]) != channels
    }
    return {**data_config, **fitted}
