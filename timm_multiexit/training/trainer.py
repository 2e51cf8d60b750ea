"""The training loop: one epoch of a task."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_multiexit.data.seeding import SeededLoader, Stream, seed_generators
from timm_multiexit.losses.multi_exit_loss import LossTerms, MultiExitLoss
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.training.regimes import RegimeControl
from timm_multiexit.training.running_metrics import RunningMetrics
from timm_multiexit.utils.errors import DataError, InvalidValueError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerConfig:
    """What stays the same from epoch to epoch.

    Attributes:
        epochs: Epochs in all, for the progress line.
        seed: Of every step's random numbers.
        grad_accum_steps: Batches per optimizer step; the last step of an epoch takes what is left.
        clip_grad: Bound for the gradients, None for none.
        clip_mode: 'norm', 'value' or 'agc'.
        log_interval: Batches between progress lines.
        channels_last: Give images to the model in that memory format.
        multi_label: Targets are [B, C] labels.
        loss_scale: Factor of the loss where batches are of several sizes: 'none', 'sqrt' or 'linear' in the size over
            `batch_size`.
        batch_size: Mean size of a batch.
        mixup_off_epoch: Epoch from which `mixup_fn` mixes no more; 0 for never.
        synchronize: Wait for the device after every step.
        shows_progress: Draw a bar.
        freeze_bn_stats: Batch norms, but for those of the heads, normalize by their running statistics and keep them;
            their weights train.
    """

    epochs: int = 1
    seed: int = 42
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    log_interval: int = 50
    channels_last: bool = False
    multi_label: bool = False
    loss_scale: str = 'none'
    batch_size: float = 1.0
    mixup_off_epoch: int = 0
    synchronize: bool = False
    shows_progress: bool = False
    freeze_bn_stats: bool = False


class Trainer:
    """Trains a task, epoch by epoch.

    Args:
        task: Gives the loss of a batch; its `trainable_module` is prepared by `accelerator`.
        optimizer: Prepared by `accelerator`.
        accelerator: Owns device, precision, gradients and their synchronisation.
        config: See `TrainerConfig`.
        scheduler: A timm scheduler; `step_update` is called after every optimizer step.
        mixup_fn: Mixes a batch where the loader does not.
        regime: What trains when; everything, always, if not given.
        on_update: Called after every optimizer step with the trainer.

    Attributes:
        raw_optimizer: The optimizer itself, not what Accelerate made of it.
        epoch: The epoch at work, from 0.
        batch: Batches of it that are done.
        num_updates: Optimizer steps of the run so far.
        progress: Running sums of the epoch, None before its first batch.
        images: The last batch's images.
        batch_metrics: Its numbers, see `RunningMetrics.update`.
        data_seconds: Time that the epoch waited for data.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: Any,
        *,
        accelerator: Accelerator,
        config: TrainerConfig,
        scheduler: Any | None = None,
        mixup_fn: Any | None = None,
        regime: RegimeControl | None = None,
        on_update: Callable[['Trainer'], None] | None = None,
    ):
        self.task, self.optimizer, self.accelerator, self.config = task, optimizer, accelerator, config
        self.scheduler, self.mixup_fn, self.regime, self.on_update = scheduler, mixup_fn, regime, on_update
        self.raw_optimizer = raw = getattr(optimizer, 'optimizer', optimizer)
        # Accelerate's wrapper searches the disk for a package at every step; only loss scaling needs it.
        self._stepping = optimizer if accelerator.scaler else raw
        self._is_second_order = bool(getattr(raw, 'is_second_order', False))
        self._sync_lookahead = getattr(raw, 'sync_lookahead', None)
        module: Any = task.get_trainable_module()
        self._dtype = next(module.parameters()).dtype
        self._fixed_norms = _find_norms(module) if config.freeze_bn_stats else []
        self.epoch = self.batch = self.num_updates = 0
        self.progress: RunningMetrics | None = None
        self.images: Tensor | None = None
        self.batch_metrics: Tensor | None = None
        self.data_seconds = 0.0

    def train_epoch(self, epoch: int, loader: SeededLoader, first_batch: int = 0) -> dict[str, float]:
        """Train for one epoch, or for what is left of it.

        Args:
            epoch: Its number, from 0.
            loader: Batches of images and targets, this rank's share.
            first_batch: Where to begin; `progress` holds the sums of what was before.

        Returns:
            Means over the epoch and all ranks: loss and its parts, top-1 of each classifier in percent.

        Raises:
            StateError: A loss became NaN or infinite; the message names the classifier it began with.
            DataError: There was no batch.
            InvalidValueError: A batch is too small for the batch norms.
        """
        config, accelerator = self.config, self.accelerator
        self._set_training_mode()
        num_batches, accum = len(loader), config.grad_accum_steps
        self.epoch, self.batch = epoch, first_batch
        self.num_updates = epoch * math.ceil(num_batches / accum) + first_batch // accum
        self.progress = self.progress if first_batch else None
        self.data_seconds, self._seen, self._started = 0.0, 0, time.perf_counter()
        self._set_mixing(epoch)
        self.optimizer.zero_grad()
        batches = show_progress(
            loader.epoch(epoch, first_batch),
            is_shown=config.shows_progress,
            total=num_batches - first_batch,
            description=f'Epoch {epoch + 1}/{config.epochs}',
        )
        # A stream may have another number of batches than it says: more would be of no epoch.
        for images, target in self._timed(islice(batches, num_batches - first_batch)):
            batch_idx = self.batch
            is_last = batch_idx + 1 == num_batches
            # The true window: the tail of an epoch is shorter, and its gradient must not be scaled as if it were full.
            window = min(accum, num_batches - batch_idx // accum * accum)
            is_step = is_last or (batch_idx + 1) % accum == 0
            if self.regime and self.regime.begin_step(epoch + batch_idx / num_batches):
                self._set_training_mode()
            seed_generators(config.seed, Stream.STEP, epoch, batch_idx, accelerator.process_index, all_devices=True)
            with nullcontext() if is_step else accelerator.no_sync(self.task.trainable_module):
                result, target = self._forward_backward(images, target, window)
            progress = self._note(result, target)
            self.batch += 1
            if is_last or (batch_idx and batch_idx % config.log_interval == 0):
                progress.check_finite(accelerator)
            if is_step:
                self._step()
                if self.on_update:
                    self.on_update(self)
            if batch_idx and batch_idx % config.log_interval == 0 and not is_last:
                self._log(progress, num_batches)
        if self._sync_lookahead:
            self._sync_lookahead()
        if self.progress is None:
            raise DataError(f'The training data gave no batch in epoch {epoch + 1}: see --batch-size and --workers.')
        if self.batch < num_batches:
            self.progress.check_finite(accelerator)
            self._finish_window(num_batches)
        return self.progress.metrics(self.progress.state_dict(accelerator))

    @property
    def _loss(self) -> MultiExitLoss | None:
        """The loss of a model with exits; timm's tasks have others."""
        loss = getattr(self.task, 'loss', None)
        return loss if isinstance(loss, MultiExitLoss) else None

    def _finish_window(self, num_batches: int) -> None:
        """Take what is left of gradients where a stream ended before it was said to."""
        accum = self.config.grad_accum_steps
        done = self.batch % accum
        if not done:
            return
        if self._loss is not None:
            self._loss.step_skill()  # averaged over the processes already, unlike the gradients
        if self.accelerator.num_processes > 1:  # they are of one process each, never summed
            _logger.warning(f'The data ended {num_batches - self.batch} batches early; its last {done} are not used.')
            self.optimizer.zero_grad()
            return
        window = min(accum, num_batches - self.batch // accum * accum)
        for group in self.optimizer.param_groups:
            for param in group['params']:
                if param.grad is not None:
                    param.grad *= window / done
        self._step()
        if self.on_update:
            self.on_update(self)

    def _set_training_mode(self) -> None:
        self.task.train()
        for norm in self._fixed_norms:
            norm.training = False  # not what it holds besides, as DropBlock

    def _set_mixing(self, epoch: int) -> None:
        if self.mixup_fn is not None and hasattr(self.mixup_fn, 'mixup_enabled'):
            self.mixup_fn.mixup_enabled = not 0 < self.config.mixup_off_epoch <= epoch

    @property
    def images_per_second(self) -> float:
        """Images of all ranks per second, in this epoch."""
        return float(self._seen * self.accelerator.num_processes / (time.perf_counter() - self._started))

    @property
    def learning_rate(self) -> float:
        """Mean over the optimizer's groups."""
        groups = self.optimizer.param_groups
        return float(sum(group['lr'] * group.get('exit_lr_scale', 1.0) for group in groups) / len(groups))

    @property
    def data_share(self) -> float:
        """Share of the epoch's time spent waiting for data, 0 to 1."""
        return self.data_seconds / (time.perf_counter() - self._started)

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.data_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _forward_backward(self, images: Tensor, target: Tensor, window: int) -> tuple[dict[str, Any], Tensor]:
        config, device = self.config, self.accelerator.device
        images, target = images.to(device, self._dtype), target.to(device)
        if self.mixup_fn is not None:
            images, target = self.mixup_fn(images, target)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images
        size = len(images) / config.batch_size
        scale = {'none': 1.0, 'sqrt': math.sqrt(size), 'linear': size}[config.loss_scale]
        if self._loss is not None:
            self._loss.num_skill_calls = window
        with self.accelerator.autocast():
            try:
                result = self.task(images, target)
            except ValueError as error:
                if 'more than 1 value per channel' not in str(error):
                    raise
                raise InvalidValueError(
                    f'A batch of {len(images)} is too small for the batch norms: give a larger --batch-size.'
                ) from error
        kwargs = {'create_graph': True} if self._is_second_order else {}
        self.accelerator.backward(result['loss'] * (scale / window), **kwargs)
        self._seen += len(images)
        return result, target

    def _note(self, result: dict[str, Any], target: Tensor) -> RunningMetrics:
        if self.progress is None:
            count = len(result.get('logits', [0]))
            self.progress = RunningMetrics(count, self.accelerator.device, multi_label=self.config.multi_label)
        self.batch_metrics = self.progress.update(result, target, self.batch)
        return self.progress

    def _step(self) -> None:
        config = self.config
        if config.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            params = self.task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
            params = [param for param in params if param.grad is not None]
            dispatch_clip_grad(params, value=config.clip_grad, mode=config.clip_mode)
        with self.regime.rates() if self.regime else nullcontext():
            self._stepping.step()
        self._stepping.zero_grad()
        self.num_updates += 1
        self.task.update_ema(step=self.num_updates)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.num_updates)
        if config.synchronize and self.accelerator.device.type != 'cpu':
            torch.accelerator.synchronize(self.accelerator.device)

    def _log(self, progress: RunningMetrics, num_batches: int) -> None:
        means = progress.metrics()
        parts = [f'loss {means["loss"]:.3f}']
        added = [f'{name} {means[name]:.3f}' for name in LossTerms._fields[2:] if means[name]]
        if added:
            parts[0] += f' (task {means["task"]:.3f}, {", ".join(added)})'
        for name in progress.names:
            top1 = '' if self.config.multi_label else f' {means[f"{name}_top1"]:.1f}%'
            parts.append(f'{name} {means[f"{name}_loss"]:.3f}{top1}')
        parts.append(f'lr {self.learning_rate:.2e}')
        parts.append(f'{self.images_per_second:.0f} img/s, {100 * self.data_share:.0f}% of it waiting for data')
        _logger.info(
            f'Train {self.epoch + 1:>3}/{self.config.epochs} [{self.batch:>4}/{num_batches}]  {" | ".join(parts)}'
        )


def _find_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch norms of a network without its heads, which are fresh."""
    model = unwrap_model(model)
    backbone = model.backbone if isinstance(model, MultiExitModel) else model
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]


def show_progress(
    batches: Iterable[Any], *, is_shown: bool, total: int | None = None, description: str = ''
) -> Iterator[Any]:
    """Yield the batches; if `is_shown`, as on the main process alone, with a bar on stderr and log lines above it."""
    if is_shown:
        with logging_redirect_tqdm():
            yield from tqdm(batches, desc=description, total=total, leave=False, unit='batch', dynamic_ncols=True)
    else:
        yield from batches
