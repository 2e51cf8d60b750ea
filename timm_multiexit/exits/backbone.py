"""What a backbone says of itself, as timm's models do, and what is found out about any other module."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from timm_multiexit.exits.cost import CostMeter, empty_images, meta_copy
from timm_multiexit.exits.taps import Taps
from timm_multiexit.utils.checks import check_image_size, is_list
from timm_multiexit.utils.errors import (
    InvalidTypeError,
    InvalidValueError,
    StateError,
    brief,
    is_integer,
    one_line,
)

InputSize = tuple[int, int, int]
ClassifierArg = str | Sequence[str]


@dataclass(frozen=True)
class ModuleInfo:
    """What a module that is not timm's does not say of itself.

    Attributes:
        classifiers: Names of the modules that make its logits out of features, one as a rule.
        num_classes: Width of its logits.
        input_size: (channels, height, width) of an image.
    """

    classifiers: tuple[str, ...]
    num_classes: int
    input_size: InputSize


class ModuleSurface:
    """What timm's tools expect of a backbone, answered for a module that is not timm's.

    What the module has itself is the module's.
    """

    def __init__(self, module: nn.Module, info: ModuleInfo):
        self._module, self._info = module, info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self._info.num_classes

    @property
    def num_features(self) -> int:
        """Width of what enters the classifiers."""
        widths = [_input_width(module) for module in self._classifiers()]
        if None in widths:
            raise StateError(
                f'The classifier {self._info.classifiers[widths.index(None)]} of {type(self._module).__name__} does not'
                ' say how wide its input is: see feature_widths().'
            )
        return sum(width for width in dict.fromkeys(widths) if width)

    head_hidden_size = num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """No stages: places are named."""
        return []

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Size and classes; the rest is left to timm's defaults."""
        names = self._info.classifiers
        return {
            'num_classes': self._info.num_classes,
            'input_size': self._info.input_size,
            'classifier': names[0] if len(names) == 1 else names,
        }

    default_cfg = pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """Return the classifier, several as a list of modules."""
        modules = self._classifiers()
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers by fresh ones with `num_classes` outputs; those of 0 classes give their input.

        Raises:
            StateError: A classifier is not a linear layer or a convolution, or pooling is to change.
        """
        name = type(self._module).__name__
        if global_pool is not None:
            raise StateError(f'The pooling of {name} cannot be changed: leave global_pool out.')
        fresh = [_fresh_classifier(name, module, num_classes) for module in self._classifiers()]
        for path, module in zip(self._info.classifiers, fresh):
            parent, _, attribute = path.rpartition('.')
            setattr(self._module.get_submodule(parent), attribute, module)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do what the module's own method does."""
        self._call('set_grad_checkpointing', 'checkpoint activations inside its forward')(enable)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the module's last map."""
        features: Tensor = self._call('forward_features', 'see model(x, exits=True).features')(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, or the features, of the module's last map."""
        logits: Tensor = self._call('forward_head', 'see model(x, exits=True).features')(x, pre_logits=pre_logits)
        return logits

    def _classifiers(self) -> list[nn.Module]:
        return [self._module.get_submodule(name) for name in self._info.classifiers]

    def _call(self, name: str, hint: str) -> Any:
        method = getattr(self._module, name, None)
        if method is None:
            raise StateError(f'{type(self._module).__name__} is not a timm model and has no {name}(): {hint}.')
        return method


def _input_width(module: nn.Module) -> int | None:
    width = getattr(module, 'in_features', None) or getattr(module, 'in_channels', None)
    return width if is_integer(width, 1) else None


def _fresh_classifier(owner: str, old: nn.Module, num_classes: int) -> nn.Module:
    if isinstance(old, nn.Linear):
        fresh: nn.Module = (
            nn.Linear(old.in_features, num_classes, old.bias is not None) if num_classes else nn.Identity()
        )
    elif isinstance(old, nn.Conv2d) and num_classes:
        kept = {name: getattr(old, name) for name in ('kernel_size', 'stride', 'padding', 'dilation', 'padding_mode')}
        fresh = nn.Conv2d(old.in_channels, num_classes, bias=old.bias is not None, **kept)
    else:
        raise StateError(
            f'The classifier of {owner}, of type {type(old).__name__}, cannot be replaced by one of {num_classes}'
            ' classes: do it in the module, and attach exits to that.'
        )
    return fresh.to(old.weight.device, old.weight.dtype).train(old.training)


def is_timm_like(backbone: nn.Module) -> bool:
    """Return whether a module says of itself what timm's models do."""
    return hasattr(backbone, 'pretrained_cfg') or (
        hasattr(backbone, 'get_classifier') and hasattr(backbone, 'num_classes')
    )


def check_backbone(backbone: Any) -> None:
    """Raise one line for what exits cannot be attached to as it is, with what to do instead.

    Raises:
        InvalidTypeError: It is not a module.
        InvalidValueError: It is a module that another library, or torch, has put around one.
    """
    if isinstance(backbone, type):
        raise InvalidTypeError(
            f'backbone must be a module, got the class {backbone.__name__}: make one, as {backbone.__name__}(...).'
        )
    if isinstance(backbone, str):
        raise InvalidTypeError(
            f'backbone must be a module, got {brief(backbone)}: create_model({brief(backbone)}) makes one with exits.'
        )
    if not isinstance(backbone, nn.Module):
        raise InvalidTypeError(f'backbone must be a module, got {brief(backbone)}, of type {type(backbone).__name__}.')
    kind = type(backbone).__name__
    hint = _WRAPPERS.get(kind, '')
    if type(backbone).__module__.partition('.')[0] == 'peft':
        hint = 'attach exits to the model inside first, then get_peft_model(model, config); or merge_and_unload() it'
    if isinstance(backbone, torch.jit.ScriptModule):
        hint = 'attach exits to the model that it was made from'
    if getattr(backbone, '_compiled_call_impl', None) is not None:
        hint = 'backbone.compile() was called: attach exits first, then compile the model'
    if hint:
        raise InvalidValueError(f'backbone must be the model itself, got {kind} around it: {hint}.')
    lazy = [name for name, param in backbone.named_parameters() if isinstance(param, UninitializedParameter)]
    if lazy:
        raise InvalidValueError(f'{kind} has parameters without a shape ({lazy[0]}): run it once before.')


_UNWRAP = 'attach exits to its .module first, then wrap the model'

# Names of types, not the types: importing some of them is slow or not possible everywhere.
_WRAPPERS = {
    'DataParallel': _UNWRAP,
    'DistributedDataParallel': _UNWRAP,
    'FullyShardedDataParallel': _UNWRAP,
    'OptimizedModule': 'attach exits to its ._orig_mod first, then torch.compile(model)',
}


def describe_module(
    backbone: nn.Module,
    *,
    classifier: ClassifierArg | None = None,
    num_classes: int | None = None,
    input_size: Sequence[int] | None = None,
) -> ModuleInfo | None:
    """Return what a module that is not timm's does not say of itself, None for timm's.

    What is not given is found by one forward of a data-free copy.

    Raises:
        InvalidValueError: What is given does not fit the module, or which module is the classifier cannot be told.
    """
    name = type(backbone).__name__
    if is_timm_like(backbone):
        _check_timm(backbone, classifier, num_classes)
        return None
    if input_size is None:
        raise InvalidValueError(f'input_size must be given for {name}, which is not a timm model, as (3, 224, 224).')
    size = resolve_input_size(backbone, input_size)
    if num_classes is not None and not is_integer(num_classes, 1):
        raise InvalidValueError(f'num_classes must be an integer >= 1, got {brief(num_classes)}.')
    if classifier is not None:
        names = tuple(_innermost(backbone, path) for path in _checked_names(backbone, classifier))
    if classifier is None or num_classes is None:
        scan = scan_module(backbone, size)
        num_classes = _width(name, scan.output) if num_classes is None else num_classes
        names = names if classifier is not None else (_find_classifier(name, scan, num_classes),)
    return ModuleInfo(names, num_classes, size)


def _check_timm(backbone: nn.Module, classifier: ClassifierArg | None, num_classes: int | None) -> None:
    """Raise if what is given is not what a timm model says."""
    model: Any = backbone
    if num_classes is not None and num_classes != model.num_classes:
        raise InvalidValueError(
            f'num_classes must be that of {type(backbone).__name__}, {model.num_classes}, got {brief(num_classes)}:'
            ' leave it out, or call reset_classifier on the backbone before.'
        )
    if classifier is not None:
        own = classifier_names(backbone)
        if (tuple(classifier) if is_list(classifier) else (classifier,)) != own:
            raise InvalidValueError(
                f'classifier must be that of {type(backbone).__name__}, {", ".join(own)}, got {brief(classifier)}:'
                ' leave it out.'
            )


def resolve_input_size(backbone: nn.Module, input_size: Sequence[int] | None) -> InputSize:
    """Return (channels, height, width) of an image: as given, else the backbone's own."""
    if input_size is not None:
        return check_image_size('input_size', input_size)
    channels, height, width = get_model_input_config(backbone)['input_size']
    return channels, height, width


def classifier_names(backbone: nn.Module, info: ModuleInfo | None = None) -> tuple[str, ...]:
    """Return the names of the modules that make the backbone's logits out of features.

    There is one as a rule; distilled and multi-branch models have several.

    Raises:
        InvalidValueError: There is none.
    """
    if info is not None:
        return info.classifiers
    model: Any = backbone
    try:
        classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    except AttributeError:  # without classes some backbones have an Identity for all of their head, and look inside
        classifier = [_enclosing(backbone, name) for name in _configured_classifiers(backbone)]
    parts: list[Any] = list(classifier) if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]
    parts = [leaf for part in parts for leaf in (part if isinstance(part, nn.ModuleList) else [part])]
    # A timm head that pools before its linear layer is entered by a map.
    parts = [part.fc if hasattr(part, 'fc') and hasattr(part, 'global_pool') else part for part in parts]
    owned = {id(module): name for name, module in backbone.named_modules()}
    names = tuple(owned[id(part)] for part in parts if id(part) in owned)
    if not names:
        raise InvalidValueError(
            f'{type(backbone).__name__} has no classifier module (get_classifier() gives {type(classifier).__name__}):'
            ' exits need a classification model, and num_classes above 0 where the default is 0.'
        )
    return names


def _configured_classifiers(backbone: nn.Module) -> tuple[str, ...]:
    """Return the names that timm's configuration gives the classifiers, whether there are any or not."""
    names = (getattr(backbone, 'pretrained_cfg', None) or {}).get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _enclosing(backbone: nn.Module, name: str) -> nn.Module:
    """Return the module of a name, or the deepest that is there on the way to it."""
    module = backbone
    for part in name.split('.'):
        if part not in module._modules:
            break
        module = module.get_submodule(part)
    return module


class _Call(NamedTuple):
    """One call of a module in a forward.

    Attributes:
        name: Of the module.
        module: Itself.
        output: What it returned.
        macs: Multiply-accumulates of the forward before and after it.
    """

    name: str
    module: nn.Module
    output: Any
    macs: tuple[int, int]


class Scan(NamedTuple):
    """What one forward of a data-free copy calls.

    Attributes:
        calls: Of the modules that have parameters, in order of their ends.
        output: What the forward returned.
        macs: Multiply-accumulates of all of it.
    """

    calls: list[_Call]
    output: Any
    macs: int


@torch.no_grad()
def scan_module(backbone: nn.Module, input_size: InputSize) -> Scan:
    """Run a data-free copy once and note what its modules return.

    Raises:
        InvalidValueError: It does not run without data, or not on images of this size.
    """
    copy = meta_copy(backbone)
    modules = dict(copy.named_modules())
    names = [name for name, child in modules.items() if name and next(child.parameters(), None) is not None]
    taps = Taps(names, names, outputs=[None] * len(names))
    meter, calls = CostMeter(copy), []
    entered: dict[int, int] = {}

    def note(idx: int, value: Any) -> None:
        if idx >= len(names):
            entered[idx - len(names)] = meter.read().macs
        else:
            macs = meter.read().macs
            calls.append(_Call(names[idx], modules[names[idx]], value, (entered.get(idx, macs), macs)))

    with meter:
        output = run_empty(backbone, copy, taps, empty_images(backbone, input_size), note)
    return Scan(calls, output, meter.read().macs)


def run_empty(backbone: nn.Module, copy: nn.Module, taps: Taps, images: Tensor, visitor: Any) -> Any:
    """Run a data-free copy of a backbone on such images with a visitor at its taps, and return its output.

    Raises:
        InvalidValueError: It does not run without data, or not on images of this size; not for timm's models.
    """
    if is_timm_like(backbone):
        return taps.visit(copy, images, visitor)
    try:
        return taps.visit(copy, images, visitor)
    except Exception as error:  # a module of any kind
        raise InvalidValueError(
            f'{type(backbone).__name__} cannot be surveyed with images of {list(images.shape[1:])} by a forward without'
            f' data (device meta): {one_line(error)}. Check input_size; forward must not read values of tensors, nor'
            ' make tensors elsewhere than on the device of its input.'
        ) from error


def _width(name: str, output: Any) -> int:
    """Return the number of classes of what one image gives, raise unless it is logits."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        kind = list(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
        raise InvalidValueError(
            f'The forward of {name} must return logits [B, C] in eval mode, got {kind} for one image: put a module'
            ' around it that returns them.'
        )
    return output.shape[1]


def check_width(backbone: nn.Module, output: Any, info: ModuleInfo) -> None:
    """Raise unless what one image gives is logits of the classes that a module is said to have."""
    width = _width(type(backbone).__name__, output)
    if width != info.num_classes:
        raise InvalidValueError(
            f'num_classes must be that of {type(backbone).__name__}, {width}, got {info.num_classes}.'
        )
    for path in info.classifiers:
        layer = backbone.get_submodule(path)
        given = getattr(layer, 'out_features', None) or getattr(layer, 'out_channels', None)
        if is_integer(given) and given != width:
            raise InvalidValueError(
                f'classifier must give {width} logits, got {path} of {type(backbone).__name__}, which gives {given}.'
            )


def _find_classifier(name: str, scan: Scan, num_classes: int) -> str:
    """Return the module with parameters of its own that does the last multiplications and gives the logits' width."""
    for call in scan.calls:
        before, after = call.macs
        if before < after == scan.macs and _has_own(call.module) and _gives(call.output, num_classes):
            return call.name
    raise InvalidValueError(
        f'{name} does not show which module gives its {num_classes} logits: name it, as classifier="fc", or if a'
        ' parameter of its own does, make that an nn.Linear.'
    )


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None or hasattr(module, 'parametrizations')


def _gives(output: Any, num_classes: int) -> bool:
    """Whether an output has a channel per class: [B, ..., C] or [B, C, H, W]."""
    return isinstance(output, Tensor) and output.ndim > 1 and num_classes in (output.shape[-1], output.shape[1])


def _innermost(backbone: nn.Module, path: str) -> str:
    """Return the classifier of a name: the module, or in a container of layers the last linear one."""
    module = backbone.get_submodule(path)
    if _has_own(module):
        return path
    layers = [(name, child) for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))]
    return f'{path}.{layers[-1][0]}' if layers else path


def _checked_names(backbone: nn.Module, classifier: Any) -> tuple[str, ...]:
    """Return the name or names of the classifier as a tuple; raise unless they are of modules."""
    names = tuple(classifier) if is_list(classifier) else (classifier,)
    modules = dict(backbone.named_modules())
    unknown = [name for name in names if not isinstance(name, str) or name not in modules or not name]
    if unknown or not names:
        wrong = unknown[0] if unknown else list(names)
        hint = nearest_names(str(wrong), modules)
        raise InvalidValueError(
            f'classifier must name a module of {type(backbone).__name__}, got {brief(wrong)}{hint}.'
        )
    return names


def nearest_names(name: str, modules: Iterable[str]) -> str:
    """Return a hint for a message about an unknown module: ', nearest are ...', empty if none is near."""
    near = get_close_matches(name, list(modules), n=3)
    return f', nearest are {", ".join(near)}' if near else ''
