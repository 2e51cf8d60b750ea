"""What a run's network predicts for the images of a split, reduced to the numbers of the figures."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_multiexit.analysis.agreement import describe_agreement, predict_classes
from timm_multiexit.analysis.architecture import accuracy_over_macs, describe_architecture
from timm_multiexit.analysis.dissimilarity import choose_samples, describe_dissimilarity
from timm_multiexit.analysis.diversity import describe_members
from timm_multiexit.analysis.runs import Run, teacher_members
from timm_multiexit.calibration.logits import LogitSet, collect_logits
from timm_multiexit.data.holdout import TransformSubset
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import DataError
from timm_multiexit.utils.text import ENSEMBLE, exit_names

_logger = logging.getLogger(__name__)

_TOLERANCE = 1.0  # points between what the run reported and what is measured: precision does not explain more


@dataclass(frozen=True)
class AnalysisData:
    """The images that runs are measured on: data set, split, and how they are read.

    `create_dataset` is called with the number of channels, `create_loader` with data set and timm's data configuration;
    its loader gives every image once, in order.
    """

    name: str
    split: str
    create_dataset: Callable[[int], Any]
    create_loader: Callable[[Any, Mapping[str, Any]], Any]


class Measurer:
    """Measures the networks of runs on the same images, each prepared as its network expects them.

    The dissimilarity matrices are of `num_samples` images at most, which `seed` chooses.
    """

    def __init__(self, data: AnalysisData, device: torch.device, *, num_samples: int, seed: int):
        self.data, self.device, self.num_samples, self.seed = data, device, num_samples, seed
        self.targets: Tensor | None = None

    def measure(self, run: Run) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
        """Return the numbers of a run, and its dissimilarity matrices; without exits only accuracy and MACs.

        Raises:
            DataError: The data cannot be loaded, or is not that of the network or of the other runs.
        """
        model = run.files.load_best(**run.args['model_kwargs']).to(self.device).eval()
        data_config = resolve_data_config({}, model=model)
        input_size = data_config['input_size']
        try:
            collected = collect_logits(model, self._create_loader(data_config))
        except DataError as error:
            raise DataError(f'{run.name} on the {self.data.split} split: {error}') from error
        targets = self._check_targets(run, collected)
        top1 = measure_top1(collected.logits, targets)
        _check_reported(run, self.data.split, top1, len(targets))
        numbers: dict[str, Any] = {
            'num_samples': len(targets),
            'top1': top1,
            'accuracy_over_macs': accuracy_over_macs(model, top1, input_size),
        }
        if not len(model.exits):
            return numbers, {}
        numbers['architecture'] = describe_architecture(model, input_size)
        numbers['agreement'] = describe_agreement(collected.logits, targets)
        numbers['diversity'] = _describe_diversity(run, model, collected)
        # A gigabyte on large data sets, which what follows does not need.
        del collected
        loader = self._create_loader(data_config, choose_samples(targets, self.num_samples, seed=self.seed))
        chosen = collect_logits(model, loader, features=True)
        numbers['dissimilarity'], matrices = describe_dissimilarity(chosen.features, chosen.logits, chosen.targets)
        return numbers, matrices

    def _create_loader(self, data_config: dict[str, Any], places: list[int] | None = None) -> Any:
        """Return a loader of the split in order, or of the images at some places in it."""
        dataset = self.data.create_dataset(data_config['input_size'][0])
        if isinstance(dataset, IterableDataset):
            raise DataError('Cannot choose images from a stream. Give --data-dir a folder of images.')
        if places is not None:
            dataset = TransformSubset(dataset, places)
        return self.data.create_loader(dataset, data_config)

    def _check_targets(self, run: Run, collected: LogitSet) -> Tensor:
        targets = collected.targets
        if self.targets is not None and not torch.equal(self.targets, targets):
            raise DataError(
                f'{run.name} got other images than the runs before it. Repair or remove images that cannot be read.'
            )
        self.targets = targets
        return targets


def _describe_diversity(run: Run, model: MultiExitModel, collected: LogitSet) -> dict[str, Any]:
    """Return the diversity of all classifiers, and of those that taught if there are any."""
    count = len(model.exits) + 1
    members = {'all': dict.fromkeys(range(count), 1 / count), 'teacher': teacher_members(run.args, count - 1)}
    return {
        name: describe_members(collected.logits, collected.targets, chosen) if chosen else None
        for name, chosen in members.items()
    }


def measure_top1(logits: tuple[Tensor, ...], targets: Tensor) -> dict[str, float]:
    """Return the top-1 of each classifier's logits [N, C], main last, and with exits of the ensemble, in percent."""
    names = (*exit_names(len(logits) - 1), ENSEMBLE)
    shares = predict_classes(logits).eq(targets).double().mean(-1).tolist()
    found = dict(zip(names, (100 * share for share in shares)))
    if len(logits) == 1:
        del found[ENSEMBLE]
    return found


def _check_reported(run: Run, split: str, top1: dict[str, float], num_samples: int) -> None:
    """Warn if the run's own table of as many images of this split says something else."""
    if (run.results.get('split'), run.results.get('num_samples')) != (split, num_samples):
        return
    reported = next((row.get('top-1') for row in run.results.get('rows', ()) if row['exit'] == 'main'), None)
    if reported is not None and abs(reported - top1['main']) > _TOLERANCE:
        _logger.warning(
            f'{run.name} reported {reported:.2f} % for main on {split}, measured here: {top1["main"]:.2f} %. Are these'
            ' the images that it was evaluated on?'
        )
