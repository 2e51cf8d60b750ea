"""From a model name to a model, or to the places where exits can be attached."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from timm_multiexit.checkpoints.source import ModelSource, create_backbone, create_empty_backbone, find_source
from timm_multiexit.exits.backbone import resolve_input_size
from timm_multiexit.exits.placement import ExitsArg, stage_points, survey_places
from timm_multiexit.exits.survey import ExitPoint
from timm_multiexit.models.attach import attach_exits, check_attachable
from timm_multiexit.models.multi_exit import MultiExitModel, drop_labels
from timm_multiexit.models.origin import Origin, find_origin
from timm_multiexit.utils.checks import check_image_size, check_instance, check_int, check_number
from timm_multiexit.utils.errors import InvalidValueError, brief

_logger = logging.getLogger(__name__)


def exit_points(
    backbone: nn.Module | str | ModelSource, input_size: tuple[int, int, int] | None = None
) -> tuple[ExitPoint, ...]:
    """Return the places that `feature_info` names where an exit can be attached, shallow to deep.

    Args:
        backbone: A timm classification model, or the name of one: timm's, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        input_size: (channels, height, width) that costs are reported for; the backbone's own if not given.

    Raises:
        MultiExitError: The backbone has no stages, or no classifier; the name is unknown.

    >>> [(point.index, point.module, point.reduction) for point in exit_points('resnet18')]
    [(0, 'act1', 2), (1, 'layer1.1', 4), (2, 'layer2.1', 8), (3, 'layer3.1', 16), (4, 'layer4.1', 32)]
    """
    if isinstance(backbone, str | ModelSource):
        backbone = create_empty_backbone(backbone)
    check_attachable(backbone)
    return stage_points(backbone, survey_places(backbone, (), resolve_input_size(backbone, input_size)))


def create_model(
    model_name: str | ModelSource,
    pretrained: bool = False,
    *,
    exits: ExitsArg | None = None,
    head: str = 'conv',
    head_widths: Sequence[Sequence[int]] | None = None,
    input_size: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> MultiExitModel:
    """Return a timm model with exits; of a folder that holds a `TruncatedModel`, that one.

    Args:
        model_name: A timm name, with or without a tag; `hf-hub:ORG/NAME[@REVISION]`, a repository of the Hugging Face
            Hub; or `local-dir:` and a folder that training or `save_pretrained` wrote. Also what `find_source` returned
            for one of the last two.
        pretrained: Load weights: timm's into the backbone, the exits staying fresh; a folder's or a repository's into
            all of it, and with them its policy and budgets.
        exits: See `attach_exits`. None for the exits that folder or repository have, else 'auto'.
        head: Type of fresh heads: 'conv', 'paper', 'bottleneck' or 'linear'; of no others.
        head_widths: Widths of fresh heads, see `attach_exits`.
        input_size: (channels, height, width) that the costs of the exits are reported for.
        **kwargs: Every other keyword of `timm.create_model`: num_classes, in_chans, drop_rate, ...

    Raises:
        MultiExitError: Unknown model, no such exits, or a folder or repository that does not hold what it should, or
            has values that are not allowed: see `load_pretrained`.

    >>> import torch
    >>> model = create_model('resnet18', exits=[1, 2], num_classes=10)
    >>> model(torch.randn(2, 3, 64, 64), exit_idx=0).shape
    torch.Size([2, 10])
    """
    if not isinstance(model_name, ModelSource):
        check_instance('model_name', model_name, str, hint='timm.list_models() lists names.')
    input_size = _check_arguments(input_size, kwargs)
    source = find_source(model_name, **kwargs)
    if input_size is not None:
        kwargs.setdefault('in_chans', input_size[0])
    if source is not None and source.config.truncated is not None:
        if exits is not None:
            raise InvalidValueError(
                f'exits must be None for {source}, a truncated model without further exits, got {exits!r}: attach them'
                ' to the model that it was cut from.'
            )
        _check_no_heads(source, head, head_widths)
        if input_size is not None:
            raise InvalidValueError(f'input_size must be None for {source}, a truncated model, got {input_size}.')
        return cast(MultiExitModel, source.create_backbone(pretrained=pretrained, **kwargs))
    if source is not None and source.config.exits is not None and exits is None:
        _check_no_heads(source, head, head_widths)
        model = source.create_model(pretrained=pretrained, **kwargs)
        if input_size is not None:
            model.input_size = input_size
        _drop_other_labels(model)
        model.origin = _find_origin(model, source, pretrained, kwargs)
        return model
    backbone = create_backbone(source or model_name, pretrained=pretrained, **kwargs)
    model = attach_exits(
        backbone,
        'auto' if exits is None else exits,
        head=head,
        head_widths=head_widths,
        drop_rate=kwargs.get('drop_rate'),
        input_size=input_size,
    )
    _drop_other_labels(model)
    model.origin = _find_origin(model, source, pretrained, kwargs)
    if pretrained:
        _logger.warning(f'{model_name} is trained, but not its exits ({len(model.exits)}): train them before use.')
    return model


def _check_no_heads(source: ModelSource, head: str, head_widths: Any) -> None:
    if head != 'conv' or head_widths is not None:
        what, value = ('head', head) if head != 'conv' else ('head_widths', head_widths)
        raise InvalidValueError(
            f'{what} must be left out for {source}, which has exits, got {brief(value)}. Pass exits= for fresh ones.'
        )


def _check_arguments(input_size: tuple[int, int, int] | None, kwargs: dict[str, Any]) -> tuple[int, int, int] | None:
    """Return the size of images as ints, and put the keywords for timm in form."""
    for name, low in (('num_classes', 0), ('in_chans', 1)):
        if kwargs.get(name) is not None:
            kwargs[name] = check_int(name, kwargs[name], low)
    if kwargs.get('drop_rate') is not None:
        kwargs['drop_rate'] = check_number('drop_rate', kwargs['drop_rate'], 0, 1)
    if kwargs.get('features_only'):
        raise InvalidValueError('features_only has no classifier to exit from: leave it out, or use timm.create_model.')
    return None if input_size is None else check_image_size('input_size', input_size)


def _drop_other_labels(model: MultiExitModel) -> None:
    """Forget the names of a trained classifier's classes where a fresh one has more or fewer."""
    names = model.pretrained_cfg.get('label_names')
    if names is not None and len(names) != model.num_classes:
        drop_labels(model.backbone)


def _find_origin(model: MultiExitModel, source: ModelSource | None, pretrained: bool, kwargs: dict[str, Any]) -> Origin:
    """Return what the weights of a model that was just created started from."""
    has_file = bool(kwargs.get('checkpoint_path'))
    if source is not None and pretrained and not has_file:
        return source.origin
    origin = find_origin(model.pretrained_cfg, pretrained=pretrained, has_file=has_file)
    return origin if source is None else origin._replace(commit=source.commit)
