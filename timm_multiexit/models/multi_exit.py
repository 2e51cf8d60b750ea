"""The multi-exit model: a timm backbone, its taps, its heads, and timm's own surface."""

from collections.abc import Sequence

import torch
from timm.layers import use_reentrant_ckpt
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_multiexit.exits.cost import Cost, CostMeter, ExitCost, combine_costs, meta_copy
from timm_multiexit.exits.heads import ExitHead
from timm_multiexit.exits.layouts import combine_features, to_map
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.exits.taps import Taps, classifier_names
from timm_multiexit.models.dynamic import DynamicInference
from timm_multiexit.models.origin import Origin
from timm_multiexit.models.outputs import ExitOutputs, Exits
from timm_multiexit.utils.errors import MultiExitError


class MultiExitModel(DynamicInference):
    """A timm backbone with exits.

    Without `exits` or `exit_idx` it is the plain timm model: same bits, same cost. Its state dict has `backbone.*`
    with timm's keys and `exits.*`. What a call is doing belongs to the call, so threads may share a model.

    Args:
        backbone: A timm classification model.
        specs: Its exits, shallow to deep.
        drop_rate: Dropout probability of the heads.
        input_size: (channels, height, width) that costs are reported for; the backbone's own if not given.

    Raises:
        MultiExitError: The backbone has no classifier module, or a tapped module is not there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        specs: Sequence[ExitSpec],
        *,
        drop_rate: float = 0.0,
        input_size: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self._frozen_names: tuple[str, ...] | None = None
        self.origin: Origin | None = None  # what the weights started from, where `create_model` made them
        self.input_size = tuple(input_size or get_model_input_config(backbone)['input_size'])
        heads = [
            ExitHead(
                spec.head,
                in_chans=spec.channels,
                widths=spec.widths,
                num_classes=backbone.num_classes,
                drop_rate=drop_rate,
            )
            for spec in specs
        ]
        self.exits = Exits(heads, specs)
        param = next(backbone.parameters())
        self.exits.to(device=param.device, dtype=param.dtype)
        # Not self.train(...), which would undo a backbone's frozen parts.
        self.training = backbone.training
        self.exits.train(backbone.training)
        self._set_taps()

    def _set_taps(self) -> None:
        specs = self.exits.specs
        self._forget_inference()
        self._taps = Taps(
            [spec.module for spec in specs],
            classifier_names(self.backbone),
            outputs=[spec.output for spec in specs],
        )
        try:
            self._taps.install(self.backbone)
        except AttributeError as error:
            raise MultiExitError(f'{type(self.backbone).__name__} has no module to tap: {error}.') from error

    def forward(
        self,
        x: Tensor,
        *,
        exits: bool = False,
        exit_idx: int | None = None,
    ) -> Tensor | ExitOutputs:
        """Return main's logits, everybody's, or one exit's.

        Args:
            x: Images, [B, in_chans, H, W].
            exits: Run all classifiers.
            exit_idx: Run this classifier alone and nothing after its tap; 0 is the shallowest exit, -1 is main.

        Returns:
            Logits [B, C] of main, what the plain timm model returns; with `exits` an `ExitOutputs`; with `exit_idx`
            the logits [B, C] of that exit.

        Raises:
            MultiExitError: Both `exits` and `exit_idx` are given, there is no such exit, or one exit is trained alone
                under reentrant gradient checkpointing.
        """
        if exit_idx is not None:
            if exits:
                raise MultiExitError('exits=True and exit_idx exclude each other: ask for all classifiers or for one.')
            return self._forward_one(x, exit_idx)
        if exits:
            return self._forward_all(x)
        return self.backbone(x)

    def _forward_all(self, x: Tensor) -> ExitOutputs:
        output, tensors, entering = self._taps.collect(self.backbone, x)
        results = [self._run_head(idx, tensor, x) for idx, tensor in enumerate(tensors)]
        return ExitOutputs(
            logits=(*(logits for logits, _ in results), output),
            features=(*(features for _, features in results), combine_features(entering)),
        )

    def _run_head(self, idx: int, tensor: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features of exit `idx` for the tensor at its tap; `x` are the images."""
        spec = self.exits.specs[idx]
        return self.exits[idx](
            to_map(
                tensor,
                spec.layout,
                image_size=(x.shape[-2], x.shape[-1]),
                reduction=spec.reduction,
                num_prefix_tokens=spec.num_prefix_tokens,
            )
        )

    def _forward_one(self, x: Tensor, exit_idx: int) -> Tensor:
        num_exits = len(self.exits)
        if not -num_exits - 1 <= exit_idx <= num_exits:
            raise MultiExitError(
                f'exit_idx is {exit_idx}, allowed are {-num_exits - 1} to {num_exits}'
                f' ({num_exits} exits, then main as {num_exits} or -1).'
            )
        idx = exit_idx % (num_exits + 1)
        if idx == num_exits:
            return self.backbone(x)
        if self.training and torch.is_grad_enabled() and use_reentrant_ckpt() and self._checkpoints_gradients():
            raise MultiExitError(
                'One exit cannot be trained alone under reentrant gradient checkpointing, the backbone would get no'
                ' gradient: use exits=True, or timm.layers.set_reentrant_ckpt(False).'
            )
        logits, _ = self._run_head(idx, self._taps.stop(self.backbone, x, idx), x)
        return logits

    def _checkpoints_gradients(self) -> bool:
        return any(getattr(module, 'grad_checkpointing', False) for module in self.backbone.modules())

    @torch.no_grad()
    def cost(self, input_size: tuple[int, int, int] | None = None) -> tuple[ExitCost, ...]:
        """Return what each classifier costs, shallow to deep, main last.

        Args:
            input_size: (channels, height, width) of one image; `self.input_size` if not given.

        Source: MACs are torch's flop counter halved, on a copy of the model without data.
        """
        model = meta_copy(self)
        meter = CostMeter(model.backbone)
        images = torch.empty(1, *(input_size or self.input_size), device='meta')
        paths: dict[int, Cost] = {}
        tensors: dict[int, Tensor] = {}

        def note(idx: int, tensor: Tensor) -> None:
            paths[idx], tensors[idx] = meter.read(), tensor

        with meter:
            model._taps.visit(model.backbone, images, note)
        heads = []
        for idx, head in enumerate(model.exits):
            with CostMeter(head) as head_meter:
                model._run_head(idx, tensors[idx], images)
            heads.append(head_meter.read())
        return combine_costs([*(paths[idx] for idx in range(len(heads))), meter.read()], heads)

    @torch.no_grad()
    def try_exits(self, images: Tensor) -> list[int]:
        """Return the exits in the order in which a forward of images [B, C, H, W] comes to them; each head is run.

        Raises:
            MultiExitError: A tap is not come to, or a head does not take what is there.
        """
        order: list[int] = []

        def run_head(idx: int, tensor: Tensor) -> None:
            if idx < len(self.exits):
                order.append(idx)
                try:
                    self._run_head(idx, tensor, images)
                except Exception as error:  # a tap can give anything
                    reason = ' '.join(str(error).split())[:200]
                    raise MultiExitError(f'the head of exit {idx} does not take its tap: {reason}') from error

        self._taps.visit(self.backbone, images, run_head)
        if len(set(order)) < len(self.exits):
            raise MultiExitError(f'a forward came to exits {order}, there are {len(self.exits)}.')
        return order

    @torch.no_grad()
    def feature_widths(self) -> tuple[int, ...]:
        """Return how wide the features are that each classifier is distilled by, shallow to deep, main last."""
        images = torch.empty(1, *self.input_size, device='meta')
        model = meta_copy(self)
        widths = [features.shape[1] for features in model(images, exits=True).features]
        projectors = [head.projector for head in model.exits]
        return (*(p.out_features if p is not None else w for p, w in zip(projectors, widths)), widths[-1])

    @property
    def hub_commit(self) -> str | None:
        """Commit of the Hub's repository that the model was created from; None if from elsewhere."""
        return self.origin.commit if self.origin else None

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.input_size[0]

    def freeze_backbone(self, freeze: bool = True, *, trains_classifier: bool = False) -> None:
        """Train the heads alone: no gradients for the backbone, and its norms and dropout in eval mode.

        Args:
            freeze: False undoes it.
            trains_classifier: Leave main's own classifier free, for one that is as fresh as the heads.
        """
        if freeze == self.is_backbone_frozen:
            return
        params = dict(self.backbone.named_parameters())
        # Only what is frozen here is let go later: a layer that was frozen before stays so.
        names = [name for name, param in params.items() if param.requires_grad] if freeze else self._frozen_names
        if freeze and trains_classifier:
            free = {id(param) for param in self.classifier_parameters()}
            names = [name for name in names if id(params[name]) not in free]
        for name in names:
            params[name].requires_grad_(not freeze)
        self._frozen_names = tuple(names) if freeze else None
        self.train(self.training)

    def classifier_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of main's own classifier, or of its two in distilled models."""
        modules = [self.backbone.get_submodule(name) for name in classifier_names(self.backbone)]
        return [param for module in modules for param in module.parameters()]

    @property
    def is_backbone_frozen(self) -> bool:
        """Whether only the heads train."""
        return self._frozen_names is not None

    def train(self, mode: bool = True) -> 'MultiExitModel':
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.is_backbone_frozen:
            self.backbone.eval()
        return self

    def add_projectors(self) -> None:
        """Give every head whose features are not as wide as main's a linear map to that width, for training.

        With them features can be distilled into narrow heads. They act in training mode only, and `save_pretrained`
        leaves them out.
        """
        *widths, main = self.feature_widths()
        param = next(self.backbone.parameters())
        for head, width in zip(self.exits, widths):
            if width != main:
                head.projector = nn.Linear(width, main).to(param.device, param.dtype)

    def drop_exits(self, exits: Sequence[int]) -> None:
        """Remove exits for good; the others keep their order and weights.

        Args:
            exits: Which, 0 is the shallowest.

        Raises:
            MultiExitError: There is no such exit.
        """
        num_exits = len(self.exits)
        wrong = [idx for idx in exits if not -num_exits <= idx < num_exits]
        if wrong:
            raise MultiExitError(f'There is no exit {wrong[0]} to drop, allowed are 0 to {num_exits - 1}.')
        dropped = {idx % num_exits for idx in exits}
        kept = [idx for idx in range(num_exits) if idx not in dropped]
        self._taps.remove(self.backbone)
        training = self.exits.training
        self.exits = Exits([self.exits[idx] for idx in kept], [self.exits.specs[idx] for idx in kept])
        self.exits.training = training
        self._set_taps()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give main and every exit a fresh classifier with `num_classes` outputs."""
        self.backbone.reset_classifier(num_classes, *(() if global_pool is None else (global_pool,)))
        for head in self.exits:
            head.reset_classifier(num_classes)
        self._forget_inference()
        self._taps.install(self.backbone)
