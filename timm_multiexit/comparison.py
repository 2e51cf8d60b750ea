"""Static models set beside a multi-exit one: other networks, on the same data, each prepared as it wants."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from timm.data import resolve_data_config

from timm_multiexit.config import MultiExitError
from timm_multiexit.engine import evaluate_loader
from timm_multiexit.loaders import create_eval_loader
from timm_multiexit.model import MultiExitModel
from timm_multiexit.refusals import REFUSALS, one_line
from timm_multiexit.sources import create_backbone
from timm_multiexit.training_checkpoint import load_checkpoint


def split_name(text: str) -> tuple[str, str]:
    """Return model name and checkpoint of NAME[:CHECKPOINT]; '' for none.

    >>> split_name('resnet18:last.pth.tar'), split_name('local-dir:runs/small'), split_name('resnet18.a1_in1k')
    (('resnet18', 'last.pth.tar'), ('local-dir:runs/small', ''), ('resnet18.a1_in1k', ''))
    """
    if text.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return text, ''
    name, _, checkpoint = text.partition(':')
    return name, checkpoint


def create_static(text: str, *, num_classes: int, in_chans: int = 3) -> MultiExitModel:
    """Return a trained plain timm model, without exits, on the CPU.

    Args:
        text: A timm name, whose own weights are loaded; NAME:CHECKPOINT, a file of its weights; `local-dir:FOLDER`;
            `hf-hub:ORG/NAME`.
        num_classes: Of the model that it is compared with.
        in_chans: Channels of the images.

    Raises:
        MultiExitError: There is no such model, its weights cannot be had, or it has other classes or channels.
    """
    name, checkpoint = split_name(text)
    try:
        if checkpoint:
            backbone = create_backbone(name, num_classes=num_classes, in_chans=in_chans)
            load_checkpoint(backbone, checkpoint)
        else:
            backbone = create_backbone(name, pretrained=True)
    except MultiExitError as error:
        raise MultiExitError(f'--compare {text}: {error}') from error
    except (*REFUSALS, KeyError, SafetensorError) as error:
        raise MultiExitError(f'--compare {text}: the weights cannot be had: {one_line(error)}.') from error
    if backbone.num_classes != num_classes:
        raise MultiExitError(
            f'--compare {text} has {backbone.num_classes} classes, allowed are the {num_classes} of the model.'
        )
    model = MultiExitModel(backbone, [])
    if model.in_chans != in_chans:
        raise MultiExitError(f'--compare {text} takes images of {model.in_chans} channels, allowed is {in_chans}.')
    return model


def compare(
    models: Mapping[str, MultiExitModel], args: Namespace, dataset: Any, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Return one row per model: its name, the side of its images, params, GMACs, top-1 and top-5.

    Args:
        models: Name -> model; one is on the accelerator's device at a time.
        args: Of the command line; images are prepared by each model's own data configuration.
        dataset: What all are measured on; its transform stays.
        accelerator: Gives device and precision.
    """
    rows = []
    for name, model in models.items():
        data_config = resolve_data_config({}, model=model)
        loader = create_eval_loader(args, copy.copy(dataset), data_config, accelerator)
        metrics = evaluate_loader(model.to(accelerator.device), loader, accelerator=accelerator).metrics['main']
        model.cpu()
        cost = model.cost(data_config['input_size'])[-1].fixed
        row = {'static model': name, 'image, px': data_config['input_size'][-1], 'params': cost.params}
        rows.append({**row, 'GMACs': cost.macs / 1e9, 'top-1': metrics['top1'], 'top-5': metrics['top5']})
    return rows
