"""Accuracy by other labels than the data set's, and averages over classes, of every classifier."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor

from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import DataError, one_line
from timm_multiexit.utils.text import ENSEMBLE, exit_names


def read_valid_labels(path: str, num_classes: int) -> list[int]:
    """Return the class indices of a text file, one a line.

    Raises:
        DataError: The file cannot be read, or holds something else than different indices of `num_classes` classes.
    """
    try:
        labels = [int(line) for line in Path(path).read_text(encoding='utf-8').split('\n') if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            f'Cannot read --valid-labels {path}: {one_line(error)}. Give one class index per line.'
        ) from error
    if not labels or len(set(labels)) < len(labels) or not all(0 <= label < num_classes for label in labels):
        raise DataError(
            f'--valid-labels {path} must have different class indices in [0, {num_classes - 1}], one per line.'
        )
    return labels


class LabelMetrics:
    """What answers are by other labels and averages.

    Args:
        num_exits: Exits of the model.
        dataset: The images, in the order of the loader.
        real_labels: JSON file of the labels of ImageNet's validation images, a list per image; '' for none.
        average: 'micro', 'macro' or 'weighted', how scikit-learn averages over classes; None for no averages.

    Raises:
        DataError: The file cannot be read, or is not of these images.

    Source: real labels are those of Beyer et al., arXiv 2006.07159.
    """

    def __init__(self, num_exits: int, dataset: Any, *, real_labels: str = '', average: str | None = None):
        self.names = (*exit_names(num_exits), ENSEMBLE) if num_exits else exit_names(0)
        self.average = average
        self.real = [_read_real_labels(real_labels, dataset) for _ in self.names] if real_labels else []
        self.answers: list[list[Tensor]] = [[] for _ in self.names]
        self.targets: list[Tensor] = []

    @torch.no_grad()
    def run(
        self, model: MultiExitModel, loader: Iterable[Any], *, accelerator: Accelerator, channels_last: bool = False
    ) -> dict[str, dict[str, float]]:
        """Return name -> metrics of each classifier in percent: real_top1, real_top5, macro_precision, ..."""
        param = next(model.parameters())
        for images, target in loader:
            images = images.to(param.device, param.dtype)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = model(images, exits=True).logits if len(model.exits) else (model(images),)
            self._update(logits, target)
        return {name: self._compute(idx) for idx, name in enumerate(self.names)}

    def _update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        logits = [single.float() for single in logits]
        logits.append(torch.stack(logits).mean(0))  # of a plain model, its own again
        for idx, single in zip(range(len(self.names)), logits):
            if self.real:
                self.real[idx].add_result(single)
            self.answers[idx].append(single.argmax(-1).cpu())
        self.targets.append(target.cpu())

    def _compute(self, idx: int) -> dict[str, float]:
        found = {f'real_top{k}': self.real[idx].get_accuracy(k) for k in (1, 5)} if self.real else {}
        if self.average:
            from sklearn.metrics import precision_recall_fscore_support

            answers, targets = torch.cat(self.answers[idx]).numpy(), torch.cat(self.targets).numpy()
            values = precision_recall_fscore_support(targets, answers, average=self.average, zero_division=0)
            for name, value in zip(('precision', 'recall', 'f1_score'), values):
                found[f'{self.average}_{name}'] = 100 * float(value)
        return found


def _read_real_labels(path: str, dataset: Any) -> RealLabelsImagenet:
    if not hasattr(dataset, 'filenames'):
        raise DataError('--real-labels needs the images of ImageNet as files: give --data-dir.')
    names = dataset.filenames(basename=True)
    try:
        real = RealLabelsImagenet(names, real_json=path)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f'Cannot read --real-labels {path}: {one_line(error)}.') from error
    except AssertionError as error:
        num = len(json.loads(Path(path).read_text(encoding='utf-8')))
        raise DataError(f'--real-labels {path} has labels of {num} images, the data set has {len(names)}.') from error
    unknown = next((name for name in names if name not in real.real_labels), None)
    if unknown is not None:
        raise DataError(
            f"--real-labels needs names of ImageNet's validation images, ILSVRC2012_val_*.JPEG, got {unknown}."
        )
    return real
