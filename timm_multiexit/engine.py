"""One epoch of training, and one pass over a data set: the loops that the scripts share."""

import logging
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from timm_multiexit.config import MultiExitError
from timm_multiexit.metrics import ExitEvaluator, exit_names

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochConfig:
    """What stays the same from epoch to epoch.

    Attributes:
        epochs: Epochs in all, for the progress line.
        grad_accum_steps: Batches per optimizer step; the last step of an epoch takes what is left.
        clip_grad: Bound for the gradients, None for none.
        clip_mode: 'norm', 'value' or 'agc'.
        log_interval: Batches between progress lines.
        channels_last: Give images to the model in that memory format.
    """

    epochs: int
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    log_interval: int = 50
    channels_last: bool = False


class _Progress:
    """Running sums of an epoch, kept on the device: nothing is read before a progress line is due."""

    def __init__(self, num_classifiers: int, device: torch.device):
        self.names = exit_names(num_classifiers - 1)
        self.num_samples = 0
        self.sums = {
            key: torch.zeros(num_classifiers, device=device)
            for key in ('correct', 'task', 'output_distance', 'feature_distance')
        }
        self.loss = torch.zeros((), device=device)
        self.first_bad = torch.full((num_classifiers,), math.inf, device=device)

    @torch.no_grad()
    def update(self, result: dict[str, Any], target: Tensor, batch_idx: int) -> None:
        logits = torch.stack([single.detach() for single in result.get('logits', [result['output']])])
        labels = target.argmax(-1) if target.ndim > 1 else target
        size = len(target)
        self.num_samples += size
        self.loss += result['loss'].detach() * size
        self.sums['correct'] += logits.argmax(-1).eq(labels).float().sum(-1)
        parts = {'task': result['loss'].detach()[None], **result}  # timm's own tasks have one loss and no parts
        for key in ('task', 'output_distance', 'feature_distance'):
            if key in parts:
                self.sums[key] += parts[key].float() * size
        bad = ~torch.isfinite(parts['task'] + parts.get('output_distance', 0) + parts.get('feature_distance', 0))
        self.first_bad.masked_fill_(bad & torch.isinf(self.first_bad), batch_idx)

    def check_finite(self, accelerator: Accelerator) -> None:
        """Raise if a loss was NaN or infinite, on every rank at the same batch."""
        first_bad = self.first_bad
        if accelerator.num_processes > 1:
            first_bad = accelerator.gather(first_bad[None]).amin(0)
        first = float(first_bad.min())
        if math.isfinite(first):
            culprits = [name for name, at in zip(self.names, first_bad.tolist()) if at == first]
            raise MultiExitError(
                f'The loss of {", ".join(culprits)} is NaN or infinite at batch {int(first)} of this epoch. Training'
                ' stops, the checkpoints so far are kept: lower --lr, or set --clip-grad, and resume.'
            )

    def metrics(self) -> dict[str, float]:
        """Return means over the epoch: loss, the parts that distillation adds, top-1 per classifier."""
        count = max(self.num_samples, 1)
        means = {'loss': float(self.loss) / count}
        for key in ('task', 'output_distance', 'feature_distance'):
            means[key] = float(self.sums[key].sum()) / count
        for name, correct in zip(self.names, self.sums['correct'].tolist()):
            means[f'{name}_top1'] = 100.0 * correct / count
        for name, task in zip(self.names, self.sums['task'].tolist()):
            means[f'{name}_loss'] = task / count
        return means


def train_one_epoch(
    epoch: int,
    task: TrainingTask,
    loader: Iterable,
    optimizer: Any,
    *,
    accelerator: Accelerator,
    config: EpochConfig,
    scheduler: Any | None = None,
    mixup_fn: Any | None = None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        epoch: Its number, from 0.
        task: Gives the loss of a batch; its `trainable_module` is prepared by `accelerator`.
        loader: Batches of images and targets, already this rank's share.
        optimizer: Prepared by `accelerator`.
        accelerator: Owns device, precision, gradients and their synchronisation.
        config: See `EpochConfig`.
        scheduler: A timm scheduler; `step_update` is called after every optimizer step.
        mixup_fn: Mixes a batch where the loader does not.

    Returns:
        Means of this rank: loss and its parts, top-1 of each classifier in percent.

    Raises:
        MultiExitError: A loss became NaN or infinite; the message names the classifier it began with.
    """
    task.train()
    num_batches = len(loader)
    accum = config.grad_accum_steps
    num_updates = epoch * math.ceil(num_batches / accum)
    progress, started = None, time.perf_counter()
    optimizer.zero_grad()
    for batch_idx, (images, target) in enumerate(loader):
        images, target = images.to(accelerator.device), target.to(accelerator.device)
        if mixup_fn is not None:
            images, target = mixup_fn(images, target)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        is_last = batch_idx + 1 == num_batches
        # The true window: the tail of an epoch is shorter, and its gradient must not be scaled as if it were full.
        window = min(accum, num_batches - batch_idx // accum * accum)
        is_step = is_last or (batch_idx + 1) % accum == 0
        with nullcontext() if is_step else accelerator.no_sync(task.trainable_module):
            result = task(images, target)
            accelerator.backward(result['loss'] / window)
        if is_step:
            _step(task, optimizer, accelerator, config)
            num_updates += 1
            task.update_ema(step=num_updates)
            if scheduler is not None:
                scheduler.step_update(num_updates=num_updates)
        if progress is None:
            progress = _Progress(len(result.get('logits', [0])), accelerator.device)
        progress.update(result, target, batch_idx)
        if is_last or batch_idx % config.log_interval == 0:
            progress.check_finite(accelerator)
            rate = progress.num_samples * accelerator.num_processes / (time.perf_counter() - started)
            _log_progress(epoch, config.epochs, batch_idx + 1, num_batches, progress, rate, optimizer)
    return progress.metrics()


def _step(task: TrainingTask, optimizer: Any, accelerator: Accelerator, config: EpochConfig) -> None:
    if config.clip_grad is not None:
        accelerator.unscale_gradients(optimizer)
        params = task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
        dispatch_clip_grad(params, value=config.clip_grad, mode=config.clip_mode)
    optimizer.step()
    optimizer.zero_grad()


def _log_progress(epoch, epochs, batch, num_batches, progress, rate, optimizer) -> None:
    means = progress.metrics()
    parts = [f'loss {means["loss"]:.3f}']
    if means['output_distance']:
        parts[0] += f' (task {means["task"]:.3f}, distillation {means["output_distance"]:.3f}'
        parts[0] += f', features {means["feature_distance"]:.3f})' if means['feature_distance'] else ')'
    parts += [f'{name} {means[f"{name}_loss"]:.3f} {means[f"{name}_top1"]:.1f}%' for name in progress.names]
    lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
    parts += [f'lr {lr:.2e}', f'{rate:.0f} img/s']
    _logger.info(f'Train {epoch + 1:>3}/{epochs} [{batch:>4}/{num_batches}]  {" | ".join(parts)}')


@dataclass
class Evaluation:
    """What a pass over a data set found.

    Attributes:
        metrics: name -> {loss, top1, top5, ece}, as `ExitEvaluator.compute` gives them.
        num_samples: Images counted, over all ranks.
        input_size: (channels, height, width) of the first batch.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_samples: int = 0
    input_size: tuple[int, int, int] = (0, 0, 0)


@torch.no_grad()
def evaluate_loader(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
) -> Evaluation:
    """Measure every classifier of a model, and the ensemble, on every sample once.

    Args:
        model: A `MultiExitModel`, or a plain model, which is main alone; not wrapped for distributed training.
        loader: Batches of images and class indices; in distributed runs this rank's share of them.
        device: Where to run; the accelerator's, else where the model is.
        accelerator: Gives precision and, with several processes, sums over all of them.
        channels_last: Give images to the model in that memory format.

    Raises:
        MultiExitError: The loader gives no batch.
    """
    num_exits = len(model.exits) if hasattr(model, 'exits') else 0
    device = torch.device(device or (accelerator.device if accelerator else next(model.parameters()).device))
    evaluator = ExitEvaluator(num_exits, device=device, max_samples=evaluation_sample_limit(loader))
    evaluation = Evaluation()
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            evaluation.input_size = evaluation.input_size if any(evaluation.input_size) else tuple(images.shape[1:])
            with accelerator.autocast() if accelerator else nullcontext():
                logits = model(images, exits=True).logits if num_exits else (model(images),)
            evaluator.update(logits, target)
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode
    if not any(evaluation.input_size):
        raise MultiExitError('The data loader gives no batch, so there is nothing to evaluate.')
    distributed = accelerator is not None and accelerator.num_processes > 1
    evaluation.metrics = evaluator.compute(distributed)
    count = torch.tensor(evaluator.num_samples, device=device)
    evaluation.num_samples = int(accelerator.reduce(count) if distributed else count)
    return evaluation
