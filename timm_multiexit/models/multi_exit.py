"""The multi-exit model: a backbone, its taps, its heads, and timm's own surface."""

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.exits.backbone import ClassifierArg, classifier_names, describe_module, resolve_input_size
from timm_multiexit.exits.cost import Cost, CostMeter, ExitCost, combine_costs, empty_images, find_dtype, meta_copy
from timm_multiexit.exits.heads import ExitHead
from timm_multiexit.exits.layouts import check_tokens, combine_features, main_logits, to_map
from timm_multiexit.exits.spec import ExitSpec
from timm_multiexit.exits.survey import survey_backbone
from timm_multiexit.exits.taps import RunHead, Taps
from timm_multiexit.inference.anytime import OwnThread
from timm_multiexit.inference.deadline import TimeBook
from timm_multiexit.models import dynamic
from timm_multiexit.models.origin import Origin
from timm_multiexit.models.outputs import DistilledOutputs, ExitOutputs, Exits, pack_outputs
from timm_multiexit.models.sharding import check_whole
from timm_multiexit.models.timm_surface import TimmSurface
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy, Prediction
from timm_multiexit.utils.checks import check_image_size, check_images, check_instance, check_int, check_ints
from timm_multiexit.utils.errors import LIBRARY_ERRORS, InvalidValueError, brief, one_line


class MultiExitModel(TimmSurface):
    """A backbone with exits.

    Without `exits` or `exit_idx` it is the plain backbone: same bits, same cost. Its state dict has `backbone.*`
    with the backbone's keys and `exits.*`. What a call is doing belongs to the call, so threads may share a model.

    Args:
        backbone: A timm classification model, or any other with one input and logits.
        specs: Its exits, shallow to deep.
        drop_rate: Dropout probability of the heads.
        input_size: (channels, height, width) that costs are reported for; the backbone's own if not given, which only
            timm's models have.
        classifier: See `attach_exits`.
        num_classes: See `attach_exits`.

    Attributes:
        exits: The heads, and where each is attached.
        policy: Where images leave when `infer` is not told; None until the model is calibrated or it is set.
        budgets: The policies that `calibrate` found for many budgets; None until then.
        origin: What the weights started from, where `create_model` made them.

    Raises:
        InvalidValueError: The backbone has no classifier module, or a tapped module does not exist.
    """

    policy: ExitPolicy | None
    budgets: BudgetTable | None
    _can_leave: tuple[bool, ...] | None

    def __init__(
        self,
        backbone: nn.Module,
        specs: Sequence[ExitSpec],
        *,
        drop_rate: float = 0.0,
        input_size: tuple[int, int, int] | None = None,
        classifier: ClassifierArg | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.module_info = describe_module(
            backbone, classifier=classifier, num_classes=num_classes, input_size=input_size
        )
        check_tokens(backbone, specs)
        self._frozen_names: tuple[str, ...] = ()
        self.origin: Origin | None = None
        self.input_size = resolve_input_size(backbone, input_size)
        heads = [
            ExitHead(
                spec.head, in_chans=spec.channels, widths=spec.widths, num_classes=self.num_classes, drop_rate=drop_rate
            )
            for spec in specs
        ]
        self.exits = Exits(heads, specs)
        param = next(backbone.parameters())
        self.exits.to(device=param.device, dtype=find_dtype(backbone))
        # Not self.train(...), which would undo a backbone's frozen parts.
        self.training = backbone.training
        self.exits.train(backbone.training)
        self._set_taps()

    def _set_taps(self) -> None:
        specs = self.exits.specs
        self._forget_inference()
        names, outputs = [spec.module for spec in specs], [spec.output for spec in specs]
        self._taps = Taps(names, classifier_names(self.backbone, self.module_info), outputs=outputs)
        try:
            self._taps.install(self.backbone)
        except AttributeError as error:
            raise InvalidValueError(f'{type(self.backbone).__name__} has no module to tap: {error}.') from error

    def _forget_inference(self) -> None:
        """Forget what was learnt about exits that have changed."""
        self.policy, self.budgets, self._can_leave = None, None, None
        self._time_book = TimeBook()

    def forward(
        self, x: Tensor, *, exits: bool = False, exit_idx: int | None = None
    ) -> Tensor | ExitOutputs | DistilledOutputs:
        """Return main's logits, everybody's, or one exit's.

        `torch.fx` traces main's path, what is done without `exits` and `exit_idx`.

        Args:
            x: Images, [B, in_chans, H, W].
            exits: Run all classifiers.
            exit_idx: Run this classifier alone and nothing after its tap; 0 is the shallowest exit, -1 is main.

        Returns:
            Logits [B, C] of main, what the plain timm model returns; with `exits` an `ExitOutputs`, in training with
            `set_distilled_training(True)` a `DistilledOutputs`; with `exit_idx` the logits [B, C] of that exit.

        Raises:
            InvalidTypeError: With `exits` or `exit_idx`, the images are not a tensor or of another dtype than the
                weights, or `exit_idx` is not an integer.
            InvalidValueError: Both `exits` and `exit_idx` are given, the exit does not exist, or the images are of
                another shape.
            StateError: One exit is trained alone under reentrant gradient checkpointing.
        """
        if exits is False and exit_idx is None:
            return self.backbone(x)
        if isinstance(exits, Proxy) or isinstance(exit_idx, Proxy):
            exits, exit_idx = _fix_traced(exits, False), _fix_traced(exit_idx, None)
        if exit_idx is not None:
            if exits:
                raise InvalidValueError('exits=True and exit_idx are mutually exclusive: pass one of them.')
            return self._forward_one(x, exit_idx)
        if exits:
            return self._forward_all(x, exits)
        return self.backbone(x)

    def _forward_all(self, x: Tensor, exits: Any) -> ExitOutputs | DistilledOutputs:
        if exits is not True:
            check_instance('exits', exits, bool, hint='exit_idx=0 runs the first exit alone.')
        check_images(x, self.in_chans, self.backbone, allows_empty=True)
        output, tensors, entering = self._taps.collect(self.backbone, x)
        results = [self._run_head(idx, tensor, x.shape[-2:]) for idx, tensor in enumerate(tensors)]
        features = (*(features for _, features in results), combine_features(entering))
        return pack_outputs(self.backbone, output, [logits for logits, _ in results], features)

    def _run_head(self, idx: int, tensor: Tensor, image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return logits and features of exit `idx` for the tensor at its tap; images are (height, width)."""
        return self.exits[idx](to_map(tensor, self.exits.specs[idx], image_size))

    def _head_runner(self, image_size: Sequence[int]) -> RunHead:
        """Return what gives an exit's logits for the tensor at its tap, of images of (height, width)."""
        return lambda idx, tensor: self._run_head(idx, tensor, image_size)[0]

    def _forward_one(self, x: Tensor, exit_idx: int) -> Tensor:
        idx = self.find_classifier(exit_idx)
        check_images(x, self.in_chans, self.backbone, allows_empty=True)
        if idx == len(self.exits):
            return cast(Tensor, main_logits(self.backbone, self.backbone(x)))
        self._check_gradient()
        return self._head_runner(x.shape[-2:])(idx, self._taps.stop(self.backbone, x, idx))

    def find_classifier(self, exit_idx: int) -> int:
        """Return which classifier an index means, counted from 0; main is the number of exits, or -1.

        Raises:
            InvalidTypeError: It is not an integer.
            InvalidValueError: The classifier does not exist.
        """
        num_exits = len(self.exits)
        number = check_int('exit_idx', exit_idx, -num_exits - 1, num_exits, hint=f'Main is {num_exits} or -1.')
        return number % (num_exits + 1)

    def infer(
        self,
        x: Tensor,
        policy: ExitPolicy | None = None,
        *,
        threshold: float | Sequence[float | None] | None = None,
        budget: str | None = None,
        bucket_sizes: Sequence[int] | None = None,
    ) -> Prediction:
        """Return one answer per image; an image that an exit is sure of leaves the batch there.

        The answers are those of `apply_policy` on the logits of all exits. Without policy, threshold and budget the
        model's own policy says where to leave. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].
            policy: Who leaves where.
            threshold: Least confidence (largest probability) to leave with, in [0, 1], for all exits or one for each;
                None for an exit that is not used.
            budget: Mean cost of an image, of those that `calibrate` found: '60%' of main's MACs,
                '1.2GMACs', or '5ms' where times were measured. MACs and times are of images of the size that was
                calibrated with: for others give a share.
            bucket_sizes: Batch sizes to continue with, rising. What is left of the batch is filled up to the next of
                them, so that compiled blocks meet few shapes. None for any size.

        Returns:
            The answers [B, C] and the exit [B] of each image, in input order.

        Raises:
            InvalidTypeError: The images are not a tensor, or of another dtype than the weights.
            InvalidValueError: More or less than one way to decide is given, it does not fit the exits, the batch is
                empty or of another shape, or an exit, or on the CPU main, gives NaN.
            StateError: The model is in training mode, or has no table of budgets.
        """
        return dynamic.run_policy(self, x, policy, threshold, budget, bucket_sizes)

    @property
    def can_leave(self) -> tuple[bool, ...]:
        """For each exit, whether images can leave the batch there, found by a few forwards at the first call.

        Where they cannot, since the backbone carries more than the tapped tensor past it, an image that has decided
        stays in the batch to the next exit where it can leave, or until all have decided.
        """
        return dynamic.try_leaving(self)

    def anytime(self, x: Tensor) -> OwnThread:
        """Yield (exit, logits [B, C]) of each exit as soon as it is known, main last as the number of exits.

        The forward waits in the meantime; leaving the loop ends it, and so does the end of its thread, and the rest is
        not computed. Other calls of the model may come in between. All of it runs on the stream that is current at
        the first step; the stream that is current at a later one is made to wait for it. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].

        Raises:
            InvalidTypeError: The images are not a tensor, or of another dtype than the weights.
            InvalidValueError: The batch is empty or of another shape; in the loop, on the CPU, a classifier gives NaN.
            StateError: The model is in training mode, a loop that began in another thread is continued, or exits,
                classes or mode of the model have changed since it began.
        """
        return dynamic.step_exits(self, x)

    def predict(self, x: Tensor, *, deadline_ms: float) -> Prediction:
        """Return the deepest answer that is known before the deadline, of one exit for the whole batch.

        How long each part takes is learnt by measuring, for each shape of input: the first call with a shape runs a few
        forwards for that before its time begins, every call adds what it sees. A later exit is tried only if it is
        expected to be in time; if it is late nevertheless, an earlier answer counts. If not even the first exit can be
        in time it is the answer, as the earliest there is. Work that was queued on the current stream of the device
        before the call takes its part of the time; other streams are not waited for. Runs without gradients.

        Args:
            x: Images, [B, in_chans, H, W].
            deadline_ms: Milliseconds from the call, above 0.

        Raises:
            InvalidTypeError: The images are not a tensor, or of another dtype than the weights.
            InvalidValueError: The deadline is not above 0, the batch is empty or of another shape, or what answers is
                NaN.
            StateError: The model is in training mode.
        """
        return dynamic.predict_in_time(self, x, deadline_ms)

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        budget: str | None = None,
        max_drop: float | None = None,
        delta: float | None = None,
        criterion: str = 'confidence',
        combine: str | None = None,
        measures_time: bool = False,
    ) -> ExitPolicy:
        """Find where to leave, on held-out data, and keep it as `policy`, and what it is for all budgets as `budgets`.

        Temperatures are fitted for every classifier. The data must be neither what the model was trained on, or it
        would be too sure of itself, nor what results are reported on.

        Args:
            loader: Batches of images and class indices, see `timm_multiexit.data.batches`.
            budget: Mean cost of an image, '60%' of main's MACs, '1.2GMACs', or '5ms' on this machine.
            max_drop: In place of a budget: the share of accuracy, in (0, 1), that may be lost against main, 0.01 for a
                point; the cheapest policy that is known to lose no more with probability 1 - `delta`.
            delta: See `max_drop`, with which alone it goes; 0.1 if not given.
            criterion: See `ExitPolicy`.
            combine: See `ExitPolicy`.
            measures_time: Find policies for budgets in milliseconds too; implied by such a budget. They are of this
                machine, per image, at the batch size of the loader.

        Returns:
            The policy.

        Raises:
            InvalidTypeError: An argument is of the wrong type.
            InvalidValueError: Not one of `budget` and `max_drop`, a number out of range, a budget that cannot be met,
                or logits that are NaN.
            DataError: The loader is empty, or gives something else; see `timm_multiexit.data.batches`.
            StateError: The model is in training mode.
        """
        return dynamic.calibrate_model(self, loader, budget, max_drop, delta, criterion, combine, measures_time)

    def measure_times(self, images: Tensor, rounds: int = 10) -> StageCosts:
        """Return what each part of the model takes on this machine, in milliseconds per image.

        Args:
            images: A batch [B, in_chans, H, W] of the size that will be used.
            rounds: Turns of each part, of whose times the median counts, 1 or more.
        """
        return dynamic.measure_model_times(self, images, rounds)

    @property
    def routing(self) -> tuple[bool, ...]:
        """`can_leave` under its name of version 0.1."""
        _warn_renamed('routing', 'can_leave')
        return self.can_leave

    def measure_costs(self, images: Tensor, rounds: int = 10) -> StageCosts:
        """`measure_times` under its name of version 0.1."""
        _warn_renamed('measure_costs', 'measure_times')
        return self.measure_times(images, rounds)

    @torch.no_grad()
    def cost(self, input_size: tuple[int, int, int] | None = None) -> tuple[ExitCost, ...]:
        """Return what each classifier costs, shallow to deep, main last.

        Args:
            input_size: (channels, height, width) of one image; `self.input_size` if not given.

        Source: MACs are torch's flop counter halved, on a copy of the model without data.
        """
        size = self.input_size if input_size is None else check_image_size('input_size', input_size, self.in_chans)
        model = meta_copy(self)
        meter = CostMeter(model.backbone)
        images = empty_images(self.backbone, size)
        paths: dict[int, Cost] = {}
        tensors: dict[int, Tensor] = {}

        def note(idx: int, tensor: Tensor) -> None:
            paths[idx], tensors[idx] = meter.read(), tensor

        try:
            with meter:
                model._taps.visit(model.backbone, images, note)
        except LIBRARY_ERRORS as error:
            raise InvalidValueError(
                f'input_size must be one that {type(self.backbone).__name__} takes, got {size}: {one_line(error)}.'
            ) from error
        heads = []
        for idx, head in enumerate(model.exits):
            with CostMeter(head) as head_meter:
                model._run_head(idx, tensors[idx], images.shape[-2:])
            heads.append(head_meter.read())
        return combine_costs([*(paths[idx] for idx in range(len(heads))), meter.read()], heads)

    @torch.no_grad()
    def feature_widths(self) -> tuple[int, ...]:
        """Return how wide the features are that each classifier is distilled by, shallow to deep, main last."""
        images = empty_images(self.backbone, self.input_size)
        model = meta_copy(self)
        widths = [features.shape[1] for features in model(images, exits=True).features]
        projectors = [cast(ExitHead, head).projector for head in model.exits]
        return (*(p.out_features if p is not None else w for p, w in zip(projectors, widths)), widths[-1])

    @property
    def hub_commit(self) -> str | None:
        """Commit of the Hub's repository that the model was created from; None if from elsewhere."""
        return self.origin.commit if self.origin else None

    def freeze_backbone(self, freeze: bool = True, *, trains_classifier: bool = False) -> None:
        """Train the heads alone: no gradients for the backbone, and its norms and dropout in eval mode.

        The last call counts. A classifier that `reset_classifier` makes afterwards is free until the next.

        Args:
            freeze: False undoes it.
            trains_classifier: Leave main's own classifier free, for one that is as fresh as the heads.
        """
        check_instance('freeze', freeze, bool)
        if not freeze and not self.is_backbone_frozen:
            return
        params = dict(self.backbone.named_parameters())
        # Only what was frozen here is let go: a layer that was frozen before stays so.
        for name in self._frozen_names:
            if name in params:
                params[name].requires_grad_()
        names = [name for name, param in params.items() if freeze and param.requires_grad]
        if trains_classifier:
            free = {id(param) for param in self.classifier_parameters()}
            names = [name for name in names if id(params[name]) not in free]
        for name in names:
            params[name].requires_grad_(False)
        self.is_backbone_frozen, self._frozen_names = freeze, tuple(names)
        self.train(self.training)

    def classifier_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of main's own classifier, or of its two in distilled models."""
        modules = [self.backbone.get_submodule(name) for name in self._taps.classifiers]
        return [param for module in modules for param in module.parameters()]

    def add_projectors(self) -> None:
        """Give every head whose features are not as wide as main's a linear map to that width, for training.

        With them features can be distilled into narrow heads. They act in training mode only, and `save_pretrained`
        leaves them out.
        """
        check_whole(self, 'add_projectors')
        *widths, main = self.feature_widths()
        param = next(self.backbone.parameters())
        for head, width in zip(self.exits, widths):
            if width != main:
                head.projector = nn.Linear(width, main).to(param.device, find_dtype(self.backbone))

    def drop_exits(self, exits: Sequence[int]) -> None:
        """Remove exits for good, 0 is the shallowest; the others keep their order and weights.

        Raises:
            InvalidTypeError: It is not a list of integers.
            InvalidValueError: An exit does not exist.
        """
        check_whole(self, 'drop_exits')
        num_exits = len(self.exits)
        exits = check_ints('exits', exits, -num_exits, num_exits - 1, hint='Main cannot be dropped.')
        dropped = {idx % num_exits for idx in exits}
        kept = [idx for idx in range(num_exits) if idx not in dropped]
        self._taps.remove(self.backbone)
        training = self.exits.training
        self.exits = Exits([self.exits[idx] for idx in kept], [self.exits.specs[idx] for idx in kept])
        self.exits.training = training
        self._set_taps()

    @property
    def set_input_size(self) -> Callable[..., None]:
        """The backbone's `set_input_size`, which changes the size of images, of a backbone that has one.

        Policy and budgets were for the old size, and are forgotten.
        """
        resize = self.backbone.set_input_size

        @wraps(resize)
        def set_input_size(*args: Any, **kwargs: Any) -> None:
            resize(*args, **kwargs)
            self.input_size = resolve_input_size(self.backbone, None)
            self._forget_inference()
            self._taps.install(self.backbone)
            self._read_reductions()

        return set_input_size

    def _read_reductions(self) -> None:
        """Let the specs follow patches of another size."""
        names = [spec.module for spec in self.exits.specs]
        width = self.input_size[-1]
        points = survey_backbone(self.backbone, names, self.input_size, self.module_info).points
        columns = {(point.module, point.output): point.size[-1] for point in points}
        specs = list(self.exits.specs)
        for idx, spec in enumerate(specs):
            found = columns.get((spec.module, spec.output), width // spec.reduction)
            if found not in (width // spec.reduction, -(-width // spec.reduction)):
                specs[idx] = replace(spec, reduction=max(1, round(width / found)))
        self.exits.specs = tuple(specs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give main and every exit a fresh classifier with `num_classes` outputs, 0 for none.

        Raises:
            InvalidValueError: The backbone has no such `global_pool`; the model stays as it was.
        """
        check_whole(self, 'reset_classifier')
        num_classes = check_int('num_classes', num_classes, 0)
        before = vars(self._timm).get('num_classes')
        try:
            self._timm.reset_classifier(num_classes, *(() if global_pool is None else (global_pool,)))
        except (*LIBRARY_ERRORS, AttributeError) as error:
            if global_pool is None:
                raise
            self._timm.num_classes = before  # timm sets it first
            raise InvalidValueError(
                f'global_pool must be one that {type(self.backbone).__name__} takes, got {brief(global_pool)}:'
                f' {one_line(error)}.'
            ) from error
        if self.module_info is not None:
            self.module_info = replace(self.module_info, num_classes=num_classes)
        for head in self.exits:
            cast(ExitHead, head).reset_classifier(num_classes)
        drop_labels(self.backbone)
        self._taps.remove(self.backbone)
        self._set_taps()  # the classifiers may have other names: without classes some are part of an Identity


def drop_labels(backbone: nn.Module) -> None:
    """Forget the names of classes that a classifier had before."""
    cfg = getattr(backbone, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        kept = {key: cfg[key] for key in cfg if not key.startswith('label_')}
        for name in ('pretrained_cfg', 'default_cfg'):  # two names of one dict, in timm
            if hasattr(backbone, name):
                setattr(backbone, name, kept)


def _fix_traced(value: Any, default: Any) -> Any:
    """Return the default for an argument that a tracer does not know, and have the traced graph refuse other values."""
    if not isinstance(value, Proxy):
        return value
    torch._assert(operator.eq(value, default), "A traced model has main's path alone: call it without exits, exit_idx.")
    return default


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f'model.{old} is deprecated, use model.{new}.', DeprecationWarning, stacklevel=3)


def check_model(model: Any) -> MultiExitModel:
    """Return a model that has exits.

    Raises:
        InvalidTypeError: It is something else, as a plain timm model or one that is wrapped.
    """
    wrapped = next(
        (name for name in ('_orig_mod', 'module') if isinstance(getattr(model, name, None), nn.Module)), None
    )
    hint = f'Pass the model inside: model.{wrapped}.' if wrapped else 'attach_exits(model) makes one of a timm model.'
    return check_instance('model', model, MultiExitModel, hint=hint)
