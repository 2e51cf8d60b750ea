"""What timm's optimizers, loaders, savers and scripts ask of a model, answered by the backbone."""

import re
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from timm_multiexit.utils.errors import MultiExitError


class TimmSurface(nn.Module):
    """A model around a timm backbone that timm's tools take unchanged.

    Attributes:
        backbone: The timm model.
    """

    backbone: nn.Module

    @property
    def num_classes(self) -> int:
        """Outputs of every classifier."""
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of main's pre-logits features, as timm gives it; see `feature_widths`."""
        return self.backbone.head_hidden_size

    @property
    def feature_info(self) -> Any:
        """The backbone's stages."""
        return self.backbone.feature_info

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's configuration: where its weights come from and how its input is made."""
        return self.backbone.pretrained_cfg

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same under timm's older name."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """Return main's classifier."""
        return self.backbone.get_classifier()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm exempts from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}

    def group_matcher(self, coarse: bool = False):
        """Return a function from parameter name to layer, for layer decay; the heads are in the last layer.

        Fresh heads train at the full rate: put by depth, one after the third block would crawl.

        Raises:
            MultiExitError: The backbone does not say how its parameters are grouped.
        """
        if not hasattr(self.backbone, 'group_matcher'):
            raise MultiExitError(
                f'{type(self.backbone).__name__} has no group_matcher, so layer decay cannot know its layers:'
                ' leave layer decay out or take another backbone.'
            )
        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(re.sub(r'^backbone\.', '', name), last)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the backbone's activations for a second forward, in training."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last map."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return main's logits, or its features, of the backbone's last map."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)
