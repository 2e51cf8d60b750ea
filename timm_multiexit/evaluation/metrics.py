"""Accuracy, loss and calibration error of every classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor

from timm_multiexit.utils.checks import check_number
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.text import ENSEMBLE, exit_names


class ConfidenceBins:
    """Samples binned by their largest softmax probability, and what follows from it: top-1 and calibration error.

    The expected calibration error (ECE) is the mean gap between confidence and accuracy; bins are of equal width, and
    the gap of a bin is weighted by the number of its samples.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3, with 15 bins as there.
    """

    def __init__(self, num_bins: int = 15, device: torch.device | str = 'cpu'):
        self.num_bins = num_bins
        # float32 on MPS, which has no float64
        dtype = torch.float32 if torch.device(device).type == 'mps' else torch.float64
        self.sums = torch.zeros(3, num_bins, dtype=dtype, device=device)  # [count, confidence, correct] x bins

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits [B, C], class indices [B]."""
        confidence, prediction = logits.float().softmax(-1).amax(-1), logits.argmax(-1)
        # Bins are open to the left, (0, 1/n], (1/n, 2/n], ...
        bins = (confidence * self.num_bins).ceil().long().sub(1).clamp(0, self.num_bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, prediction.eq(target).float()])
        self.sums.index_add_(1, bins, values.to(self.sums.dtype))

    def compute_ece(self, distributed: bool = False) -> float:
        """Return the ECE in percent, over all ranks if `distributed`; 0 without samples."""
        count, confidence, correct = self._sum_up(distributed)
        return 100.0 * float((confidence - correct).abs().sum() / count.sum().clamp(min=1))

    def compute_top1(self, distributed: bool = False) -> float:
        """Return the share of right answers in percent; of equal logits the first answers, as where policies do."""
        count, _, correct = self._sum_up(distributed)
        return 100.0 * float(correct.sum() / count.sum().clamp(min=1))

    def _sum_up(self, distributed: bool) -> Tensor:
        sums = self.sums.clone()
        if distributed:
            dist.all_reduce(sums)
        return sums


class ExitEvaluator:
    """Accuracy and loss of every classifier, and of their ensemble if there are exits, over a data set.

    The ensemble's logits are the mean of all classifiers' logits. Metrics are timm's; every sample counts once, the
    padding of distributed samplers is excluded.

    Args:
        num_exits: Number of exits, without main.
        device: Device of the running sums.
        max_samples: Real samples on this rank (`timm.task.evaluator.evaluation_sample_limit`); None for all.
        multi_label: Targets are [B, C] labels, and timm's multi-label metrics replace top-1, top-5 and ECE.
        threshold: Probability from which a class counts as predicted, in (0, 1); for the F1 of `multi_label`.

    Raises:
        InvalidValueError: The threshold is out of range.

    Source: the ensemble is that of Lee and Lee, arXiv 2104.00299, equation 5.
    """

    def __init__(
        self,
        num_exits: int,
        *,
        device: torch.device | str = 'cpu',
        max_samples: int | None = None,
        multi_label: bool = False,
        threshold: float = 0.5,
    ):
        threshold = check_number('threshold', threshold, 0, 1, is_open=True)
        self.names = (*exit_names(num_exits), ENSEMBLE) if num_exits else exit_names(0)
        self.max_samples, self.multi_label = max_samples, multi_label
        self.default_metric = default_metric(multi_label)
        self.num_samples = 0
        # Batches are cut to max_samples before they reach timm's evaluators.
        self.accuracy: list[Any]
        self.bins: list[ConfidenceBins] = []
        if multi_label:
            self.accuracy = [MultiLabelClassificationEvaluator(device, threshold=threshold) for _ in self.names]
        else:
            self.accuracy = [ClassificationEvaluator(device) for _ in self.names]
            self.bins = [ConfidenceBins(device=device) for _ in self.names]

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: One [B, C] tensor per classifier, main last.
            target: Class indices [B], or with `multi_label` [B, C] numbers in [0, 1].

        Raises:
            InvalidValueError: The targets have another shape.
        """
        expected = logits[-1].shape if self.multi_label else logits[-1].shape[:1]
        if target.shape != expected:
            kind = 'multi-label' if self.multi_label else 'single-label'
            raise InvalidValueError(
                f'Targets of {kind} evaluation must have shape {list(expected)} for logits of shape'
                f' {list(logits[-1].shape)}, got {list(target.shape)}. Check the task and the number of classes.'
            )
        count = len(target)
        if self.max_samples is not None:
            count = max(0, min(count, self.max_samples - self.num_samples))
        if count == 0:
            return
        self.num_samples += count
        target = target[:count]
        logits = [single[:count].float() for single in logits]
        logits.append(torch.stack(logits).mean(0))
        for single, meter in zip(logits, self.accuracy):
            meter.update(single, target)
        for single, bins in zip(logits, self.bins):
            bins.update(single, target)

    def compute(self, distributed: bool = False) -> dict[str, dict[str, float]]:
        """Return the metrics of each classifier, over all ranks if `distributed`.

        Returns:
            name -> {loss, top1, top5, ece}, with `multi_label` name -> {loss, map, micro_f1, macro_f1, sample_f1};
            in percent except for the loss.
        """
        metrics = {name: dict(meter.compute(distributed)) for name, meter in zip(self.names, self.accuracy)}
        for name, bins in zip(self.names, self.bins):
            metrics[name] |= {'top1': bins.compute_top1(distributed), 'ece': bins.compute_ece(distributed)}
        return metrics


def default_metric(multi_label: bool = False) -> str:
    """Return the metric of main by which timm chooses the best epoch.

    >>> default_metric(), default_metric(multi_label=True)
    ('top1', 'map')
    """
    return (MultiLabelClassificationEvaluator if multi_label else ClassificationEvaluator).default_metric


def flatten_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics as columns: main's under timm's names, then each exit's, the ensemble's, and the mean.

    The mean is over the exits and main; a model without exits has main's columns alone.

    >>> flatten_metrics({'exit0': {'loss': 2.0, 'top1': 50.0}, 'main': {'loss': 1.0, 'top1': 60.0}})
    {'loss': 1.0, 'top1': 60.0, 'exit0_loss': 2.0, 'exit0_top1': 50.0, 'mean_loss': 1.5, 'mean_top1': 55.0}
    """
    columns = dict(metrics['main'])
    for name, values in metrics.items():
        if name != 'main':
            columns |= {f'{name}_{key}': value for key, value in values.items()}
    single = [values for name, values in metrics.items() if name != ENSEMBLE]
    if len(single) > 1:
        columns |= {f'mean_{key}': sum(values[key] for values in single) / len(single) for key in metrics['main']}
    return columns


def evaluation_columns(num_exits: int, multi_label: bool = False) -> tuple[str, ...]:
    """Return the columns of `flatten_metrics` for a model with that many exits, main's first.

    >>> evaluation_columns(0)
    ('loss', 'top1', 'top5', 'ece')
    >>> evaluation_columns(0, multi_label=True)
    ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1')
    """
    return tuple(flatten_metrics(ExitEvaluator(num_exits, multi_label=multi_label).compute()))
