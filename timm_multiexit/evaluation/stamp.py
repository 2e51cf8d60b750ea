"""What results are of: data set, image size, preprocessing, precision and weights."""

import os
from collections.abc import Mapping
from typing import Any

from timm_multiexit.models.multi_exit import MultiExitModel

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
    """Return what results are of, JSON-ready: dataset, input_size, preparation, precision, and weights if given.

    The data set is named by `name_dataset`, the precision is `mixed_precision` of the accelerator, and weights are
    those of `hash_weights`.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix('torch.')
    return {
        'dataset': dataset,
        'input_size': list(data_config['input_size']),
        'preparation': describe_preparation(data_config),
        'precision': _PRECISIONS.get(precision, dtype),
        **({} if weights is None else {'weights': dict(weights)}),
    }


def describe_preparation(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's data configuration, JSON-ready, with one mean and standard deviation per channel."""
    fitted = fit_channels(data_config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fitted.items()}


def fit_channels(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data configuration with one mean and standard deviation per channel, averaged as in timm's loaders."""
    channels = data_config['input_size'][0]
    fitted = {
        key: (sum(data_config[key]) / len(data_config[key]),) * channels
        for key in ('mean', 'std')
        if len(data_config[key]) != channels
    }
    return {**data_config, **fitted}


def name_dataset(dataset: str, data_dir: str | None) -> str:
    """Return the name of a data set without timm's prefix, or that of its folder, without folders of this machine.

    >>> name_dataset('torch/cifar10', 'data'), name_dataset('', '/data/imagenet/')
    ('cifar10', 'imagenet')
    """
    name = dataset.partition('?')[0]
    if name.partition('/')[0].lower() in _READERS:
        name = name.partition('/')[2]
    if name.lower() in _FOLDER_READERS:
        name = ''
    # Results are published, so they must not hold paths of this machine.
    if not name or os.path.isabs(name):
        name = os.path.basename(os.path.abspath(name or (data_dir or '').partition('?')[0]))
    return name
