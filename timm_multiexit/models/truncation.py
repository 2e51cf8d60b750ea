"""Truncation: one exit as a network of its own, without what only later classifiers need."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_multiexit.exits.cost import empty_images, meta_copy
from timm_multiexit.exits.heads import ExitHead
from timm_multiexit.exits.layouts import main_logits, to_map
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.exits.taps import Taps
from timm_multiexit.models.multi_exit import MultiExitModel, check_model
from timm_multiexit.models.sharding import check_whole
from timm_multiexit.models.timm_surface import TimmSurface
from timm_multiexit.utils.errors import InvalidValueError, StateError


class TruncatedModel(TimmSurface):
    """A backbone up to one exit and that exit's head, or for main the plain backbone; `truncate` makes it.

    Its features are the map at the tap. The keys of its state dict are those of the model it was cut from, as far as
    it has them.

    Args:
        backbone: The backbone, without what the exit does not need.
        exit_idx: Which classifier of the model this is, main is the number of exits.
        spec: Where the exit is attached; None for main.
        head: Its head; None for main.
        input_size: (channels, height, width) of an image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exit_idx: int,
        spec: ExitSpec | None = None,
        head: ExitHead | None = None,
        *,
        input_size: tuple[int, int, int],
    ):
        super().__init__()
        self.backbone = backbone
        # By its number, so that the keys are the model's.
        self.exits = nn.ModuleDict({} if head is None else {str(exit_idx): head})
        self.exit_idx = exit_idx
        self.spec = spec
        self.input_size = input_size
        self.is_whole = spec is None
        self._taps = Taps([] if spec is None else [spec.module], (), outputs=[] if spec is None else [spec.output])
        self._taps.install(backbone)

    @property
    def head(self) -> ExitHead | None:
        """The exit's head, None for main."""
        return cast(ExitHead, self.exits[str(self.exit_idx)]) if self.exits else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the exit's logits [B, C] of images [B, in_chans, H, W], what the model gives with its `exit_idx`.

        Raises:
            StateError: It is trained under reentrant gradient checkpointing.
        """
        if self.spec is None:
            return cast(Tensor, main_logits(self.backbone, self.backbone(x)))
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map at the tap, [B, channels, H', W'], of main the backbone's last map.

        Raises:
            StateError: It is trained under reentrant gradient checkpointing.
        """
        if self.spec is None:
            return super().forward_features(x)
        self._check_gradient()
        return to_map(self._taps.stop(self.backbone, x, 0), self.spec, x.shape[-2:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [B, C], or what enters the classifier, of the map that `forward_features` gives."""
        if self.head is None:
            return super().forward_head(x, pre_logits)
        logits, features = self.head(x)
        return features if pre_logits else logits

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return super().num_features if self.spec is None else self.spec.channels

    @property
    def head_hidden_size(self) -> int:
        """Width of what enters the classifier."""
        return super().head_hidden_size if self.head is None else self.head.num_features

    @property
    def default_cfg(self) -> dict[str, Any]:
        """A copy of `pretrained_cfg` in which 'first_conv' and 'classifier' are the names of modules of this model."""
        return super().default_cfg | ({} if self.head is None else {'classifier': f'exits.{self.exit_idx}.fc'})

    def get_classifier(self) -> nn.Module:
        """Return the exit's classifier."""
        return super().get_classifier() if self.head is None else self.head.fc


@torch.inference_mode(False)  # its parameters could not be trained
def truncate(model: MultiExitModel, exit_idx: int) -> TruncatedModel:
    """Return one exit as a network of its own, without what only deeper classifiers need.

    Modules none of whose parameters and buffers the exit reads are never copied, `nn.Identity` stands for them; a
    parameter that it does not read, of a module that it needs, is None. So it has the parameters that
    `model.cost()[exit_idx].fixed` counts. The model stays as it is and shares no tensor with the copy.

    Args:
        model: The model.
        exit_idx: The exit, 0 is the shallowest; -1 is main: the plain backbone, all of it, without hooks.

    Raises:
        InvalidTypeError: It is not a `MultiExitModel`, or the exit is not an integer.
        InvalidValueError: The exit does not exist, or the backbone looks, on the way to it, at modules it does not use.

    >>> import timm, timm_multiexit as tme
    >>> model = tme.attach_exits(timm.create_model('resnet18', num_classes=10))
    >>> network = truncate(model, 0)
    >>> sum(param.numel() for param in network.parameters()) == model.cost()[0].fixed.params
    True
    """
    check_model(model)
    check_whole(model, 'truncate')
    idx = model.find_classifier(exit_idx)
    _check_copies(model)
    twin = meta_copy(model)
    trace = _trace(twin, model.input_size, exit_idx=idx)
    if idx == len(model.exits):
        network = TruncatedModel(_copy_backbone(model, {}), idx, input_size=model.input_size)
    else:
        network = _cut(model, idx, twin, trace.read)
        if _try_operations(network, model.input_size) != trace.operations:
            raise InvalidValueError(
                f"Exit {idx} cannot be cut out: {type(model.backbone).__name__}'s forward looks at modules it does not"
                f' use, use model(x, exit_idx={idx}).'
            )
    network.is_backbone_frozen, network.module_info = model.is_backbone_frozen, model.module_info
    network.training, network.exits.training = model.training, model.exits.training
    return network


def _check_copies(model: nn.Module) -> None:
    """Raise for tensors that are computed from parameters and kept, which cannot be copied."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise StateError(
                    f'{name}.{key} is computed from parameters and cannot be copied: make it permanent first, as'
                    ' torch.nn.utils.prune.remove(module, name) does.'
                )


def _cut(model: MultiExitModel, idx: int, twin: nn.Module, read: set[int]) -> TruncatedModel:
    """Return exit `idx` with what it reads: `read` has the ids of those tensors of `twin`, a copy without data."""
    spec = model.exits.specs[idx]
    pairs = list(zip(model.modules(), twin.modules(), strict=True))
    on_path = _path(model.backbone, spec.module)
    memo: dict[int, Any] = {}
    for module, other in pairs:
        tensors = [*other.parameters(), *other.buffers()]
        is_needed = any(id(tensor) in read for tensor in tensors) or module in on_path
        # A list is gone through (by gradient checkpointing a sequence too), so its items are replaced.
        if tensors and not is_needed and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            memo[id(module)] = nn.Identity().train(module.training)
    backbone = _copy_backbone(model, memo)
    head = cast(ExitHead, deepcopy(model.exits[idx], memo))
    for module, other in pairs:
        if id(module) in memo:
            _drop_unread(memo[id(module)], other, read)
    return TruncatedModel(backbone, idx, spec, head, input_size=model.input_size)


def _copy_backbone(model: MultiExitModel, memo: dict[int, Any]) -> nn.Module:
    """Return a copy without the model's taps; `memo` has what stands for modules that are not copied."""
    backbone = deepcopy(model.backbone, memo)
    deepcopy(model._taps, memo).remove(backbone)
    return backbone


def _path(backbone: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that hold the named one, and itself: a tap may be an activation at the start of a block."""
    parts = name.split('.')
    return [backbone.get_submodule('.'.join(parts[:depth])) for depth in range(len(parts) + 1)]


def _drop_unread(module: nn.Module, twin: nn.Module, read: set[int]) -> None:
    """Set to None the parameters that the path does not read, of a module that it needs."""
    for name, param in twin._parameters.items():
        if param is not None and id(param) not in read and name in module._parameters:
            module._parameters[name] = None


class _Trace(TorchDispatchMode):
    """Notes what runs inside its `with` block.

    Attributes:
        read: Ids of the tensors that were read; they identify those that outlive the block.
        operations: The operations, in order, with the shapes they were given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.read.update(id(tensor) for tensor in tensors)
        self.operations.append((func, [tensor.shape for tensor in tensors]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _trace(model: nn.Module, input_size: tuple[int, int, int], **kwargs: Any) -> _Trace:
    with _Trace() as trace:
        model(empty_images(model, input_size), **kwargs)
    return trace


def _try_operations(network: TruncatedModel, input_size: tuple[int, int, int]) -> list[tuple[Any, ...]] | None:
    """Return the operations of its forward, None if it cannot run."""
    try:
        return _trace(meta_copy(network), input_size).operations
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError):
        return None
