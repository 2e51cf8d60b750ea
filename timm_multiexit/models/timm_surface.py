"""What timm's optimizers, loaders, savers and scripts expect of a model, answered by the backbone."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import use_reentrant_ckpt
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn

from timm_multiexit.exits.backbone import ModuleInfo, ModuleSurface
from timm_multiexit.utils.errors import StateError

AnySurface = TypeVar('AnySurface', bound='TimmSurface')


class _OfBackbone:
    """An attribute that a model has where its backbone has it, so that `hasattr` answers as for the plain timm model.

    Args:
        of_features: It is about the backbone's last map or deeper ones, which a truncated model does not have.
    """

    def __init__(self, *, of_features: bool = False):
        self._of_features = of_features

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        if self._of_features and not model.is_whole:
            raise AttributeError(self._name)
        return getattr(model.backbone, self._name)


class TimmSurface(nn.Module):
    """A model around a timm backbone that timm's tools take unchanged.

    What only some of timm's models have, such as `forward_intermediates` and `output_fmt`, it has where the backbone
    has it.

    Attributes:
        backbone: The timm model.
        input_size: (channels, height, width) of an image.
        is_whole: Whether the backbone is complete, and its last map there.
        is_backbone_frozen: Whether the heads train alone; the backbone then stays in eval mode.
        module_info: What is known of a backbone that is not timm's, None for timm's.
    """

    backbone: Any  # an nn.Module with what timm adds to it
    input_size: tuple[int, int, int]
    is_whole = True
    is_backbone_frozen = False
    module_info: ModuleInfo | None = None

    @property
    def _timm(self) -> Any:
        """What answers timm's questions: the backbone, or for one that is not timm's what is known of it."""
        return self.backbone if self.module_info is None else ModuleSurface(self.backbone, self.module_info)

    output_fmt: Any = _OfBackbone(of_features=True)
    feature_dim: Any = _OfBackbone(of_features=True)
    out_features: Any = _OfBackbone(of_features=True)
    forward_intermediates: Any = _OfBackbone(of_features=True)
    set_distilled_training: Any = _OfBackbone(of_features=True)
    get_patch_size: Any = _OfBackbone()
    global_pool: Any = _OfBackbone(of_features=True)
    pretrained_model_args: Any = _OfBackbone()
    _model_args: Any = _OfBackbone()  # timm's `get_model_args` reads it

    @property
    def num_classes(self) -> int:
        """Outputs of every classifier."""
        return self._timm.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.input_size[0]

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self._timm.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of main's pre-logits features, as timm gives it; see `feature_widths`."""
        return self._timm.head_hidden_size

    @property
    def feature_info(self) -> Any:
        """The backbone's stages."""
        return self._timm.feature_info

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's own configuration: where its weights come from, what they are called, how input is made."""
        return self._timm.pretrained_cfg

    @property
    def default_cfg(self) -> dict[str, Any]:
        """A copy of `pretrained_cfg` in which 'first_conv' and 'classifier' are the names of modules of this model."""
        cfg = dict(self.pretrained_cfg)
        return cfg | {key: _prefixed(cfg[key]) for key in ('first_conv', 'classifier') if cfg.get(key)}

    @property
    def _traits(self) -> dict[str, Any]:
        """What timm's `get_model_input_config` reads: the size of images, and the first convolution in this model."""
        traits = dict(self.backbone._traits)
        return traits | {key: _prefixed(traits[key]) for key in ('first_conv',) if traits.get(key)}

    def get_classifier(self) -> nn.Module:
        """Return main's classifier."""
        return self._timm.get_classifier()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm exempts from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from parameter name to layer, for layer decay; the heads are in the last layer.

        Fresh heads train at the full rate: put by depth, one after the third block would crawl. A backbone that does
        not say how its parameters are grouped gets timm's automatic groups of twelve.
        """
        if hasattr(self.backbone, 'group_matcher'):
            layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.backbone)
        last = max(layers.values())
        return lambda name: layers.get(re.sub(r'^backbone\.', '', name), last)

    def train(self: AnySurface, mode: bool = True) -> AnySurface:
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.is_backbone_frozen:
            self.backbone.eval()
        return self

    def _check_gradient(self) -> None:
        """Raise where a forward that stops at a tap would leave the backbone without gradients."""
        if self.training and torch.is_grad_enabled() and use_reentrant_ckpt():
            if any(getattr(module, 'grad_checkpointing', False) for module in self.backbone.modules()):
                raise StateError(
                    'One exit cannot be trained alone under reentrant gradient checkpointing, the backbone would get no'
                    ' gradient: call timm.layers.set_reentrant_ckpt(False), or train all exits at once.'
                )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the backbone's activations for a second forward, in training."""
        self._timm.set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last map."""
        return self._timm.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return main's logits, or its features, of the backbone's last map."""
        return self._timm.forward_head(x, pre_logits=pre_logits)


def _prefixed(names: Any) -> Any:
    """Return the backbone's name of a module, or several, as this model has it."""
    return f'backbone.{names}' if isinstance(names, str) else tuple(f'backbone.{name}' for name in names)
