"""What a run's network says of the images of a split, brought down to the numbers of the figures."""

import logging
from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_multiexit.analysis.agreement import describe_agreement, predict
from timm_multiexit.analysis.architecture import accuracy_over_macs, describe_architecture
from timm_multiexit.analysis.dissimilarity import choose_samples, collect_representations, describe_dissimilarity
from timm_multiexit.analysis.diversity import describe_members
from timm_multiexit.analysis.runs import Run, teacher_members
from timm_multiexit.calibration.logits import LogitSet, collect_logits
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.cli.validate_data import create_split
from timm_multiexit.data.holdout import TransformSubset
from timm_multiexit.data.loaders import create_eval_loader
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.text import ENSEMBLE, exit_names

_logger = logging.getLogger(__name__)


_TOLERANCE = 1.0  # points between what the run reported and what is measured: precision does not explain more


class Measurer:
    """Measures the networks of runs on the same images, each prepared as its network wants them.

    Args:
        args: The data: `data_dir`, `dataset`, `class_map`, `dataset_download`, `input_img_mode`; `split`; and
            `batch_size`, `workers`, `pin_mem`, `no_prefetcher`, `samples` and `seed`.
        accelerator: Gives the device.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.targets: Tensor | None = None

    def measure(self, run: Run) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
        """Return the numbers of a run, and its dissimilarity matrices; without exits only accuracy and MACs.

        Raises:
            MultiExitError: The data cannot be had, or is not what the network or the other runs are of.
        """
        model = RunFolder(run.folder).load_best(**run.args.model_kwargs).to(self.accelerator.device).eval()
        data_config = resolve_data_config({}, model=model)
        input_size = data_config['input_size']
        collected = collect_logits(model, self._create_loader(data_config))
        self._check_targets(run, collected)
        top1 = measure_top1(collected.logits, collected.targets)
        _check_reported(run, self.args, top1, len(collected.targets))
        numbers: dict[str, Any] = {
            'num_samples': len(collected.targets),
            'top1': top1,
            'accuracy_over_macs': accuracy_over_macs(model, top1, input_size),
        }
        if not len(model.exits):
            return numbers, {}
        numbers['architecture'] = describe_architecture(model, input_size)
        numbers['agreement'] = describe_agreement(collected.logits, collected.targets)
        numbers['diversity'] = self._describe_diversity(run, model, collected)
        # A gigabyte on large data sets, which what follows does not need.
        del collected
        numbers['dissimilarity'], matrices = self._describe_representations(model, data_config)
        return numbers, matrices

    def _create_loader(self, data_config: dict[str, Any], places: list[int] | None = None) -> Any:
        """Return a loader of the split in order, or of the images at some places in it."""
        dataset = create_split(self.args, self.args.split, data_config['input_size'][0])
        if isinstance(dataset, IterableDataset):
            raise MultiExitError('Images cannot be chosen from a stream: give --data-dir a folder of images.')
        if places is not None:
            dataset = TransformSubset(dataset, places)
        return create_eval_loader(self.args, dataset, data_config, self.accelerator)

    def _check_targets(self, run: Run, collected: LogitSet) -> None:
        targets, num_classes = collected.targets, collected.logits[-1].shape[1]
        if targets.ndim != 1 or targets.min() < 0 or targets.max() >= num_classes:
            raise MultiExitError(
                f'{run.name} has {num_classes} classes, and the {self.args.split} split has others: name the data that'
                ' it was trained on.'
            )
        if self.targets is not None and not torch.equal(self.targets, targets):
            raise MultiExitError(
                f'{run.name} was given other images than the runs before it: repair what cannot be read.'
            )
        self.targets = targets

    def _describe_diversity(self, run: Run, model: MultiExitModel, collected: LogitSet) -> dict[str, Any]:
        """Return the diversity of all classifiers, and of those that taught if there are any."""
        count = len(model.exits) + 1
        members = {'all': dict.fromkeys(range(count), 1 / count), 'teacher': teacher_members(run.args, count - 1)}
        return {
            name: describe_members(collected.logits, collected.targets, chosen) if chosen else None
            for name, chosen in members.items()
        }

    def _describe_representations(self, model: MultiExitModel, data_config: dict[str, Any]) -> tuple:
        places = choose_samples(self.targets, self.args.samples, seed=self.args.seed)
        loader = self._create_loader(data_config, places)
        return describe_dissimilarity(*collect_representations(model, loader))


def measure_top1(logits: tuple[Tensor, ...], targets: Tensor) -> dict[str, float]:
    """Return the top-1 of each classifier, and with exits of the ensemble, in percent.

    Args:
        logits: One [N, C] tensor per classifier, main last.
        targets: Class indices, [N].
    """
    names = (*exit_names(len(logits) - 1), ENSEMBLE)
    shares = predict(logits).eq(targets).double().mean(-1).tolist()
    found = dict(zip(names, (100 * share for share in shares)))
    if len(logits) == 1:
        del found[ENSEMBLE]
    return found


def _check_reported(run: Run, args: Namespace, top1: dict[str, float], num_samples: int) -> None:
    """Warn where the run's own table of as many images of this split says something else."""
    if (run.results.get('split'), run.results.get('num_samples')) != (args.split, num_samples):
        return
    reported = next((row.get('top-1') for row in run.results.get('rows', ()) if row['exit'] == 'main'), None)
    if reported is not None and abs(reported - top1['main']) > _TOLERANCE:
        _logger.warning(
            f'{run.name} reported {reported:.2f} % for main on {args.split}, here it is {top1["main"]:.2f} %: are these'
            ' the images that it was measured on?'
        )
