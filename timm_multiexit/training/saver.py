"""A training run's files, whole after a kill at any moment: timm's checkpoints, and the best network as a folder."""

import copy
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import SplitBatchNorm2d
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from torch import nn

from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.checkpoints.run_folder import BEST_NAME
from timm_multiexit.checkpoints.save import hash_weights, write_model
from timm_multiexit.evaluation.stamp import fit_channels
from timm_multiexit.models.sharding import gather_state, shard_state
from timm_multiexit.utils.files import explain_disk_errors

_logger = logging.getLogger(__name__)

_OLD_BEST_NAME = '.best-old'
_NEW_BEST_NAME = '.best-new'


class RunSaver(CheckpointSaver):
    """timm's saver, with files that are there whole or not at all, and with where the run stands.

    Args:
        run_state: Returns what the run needs to be resumed besides weights and optimizer: plain values and tensors.
        chosen_by: What the best epoch is chosen by, and on which images.
        **kwargs: For timm's.
    """

    def __init__(self, *, run_state: Callable[[], dict[str, Any]], chosen_by: str = '', **kwargs: Any):
        super().__init__(**kwargs)
        self.run_state, self.chosen_by = run_state, chosen_by
        self._best_weights: dict[str, str] | None = None
        self._keeps_history = True

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """Return timm's bookkeeping and, under 'run', where the run stands."""
        pending = (epoch, metric) if self._keeps_history else (None, None)
        best = {'chosen_by': self.chosen_by, 'best_weights': self._best_weights}
        return {**super().state_dict(*pending), **best, 'run': self.run_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the bookkeeping of a checkpoint in this folder; call it when all else has been restored.

        If that checkpoint closed an epoch, its files are written once more: a kill may have come between them, and
        where the run goes back, the last checkpoint is of what it leaves.
        """
        epoch, metric = state_dict.get('pending', (None, None))
        super().load_state_dict({**state_dict, 'pending': (None, None)})
        self._cleanup_checkpoints()  # to the present number, the best of them
        run = state_dict.get('run', {})
        self._best_weights = state_dict.get('best_weights')
        self.clean()
        self._place_best()
        was_chosen_by = state_dict.get('chosen_by', self.chosen_by)
        if was_chosen_by != self.chosen_by:
            self._choose_anew(f'until here it was chosen by {was_chosen_by}')
            self.checkpoint_files = [(path, None) for path, _ in self.checkpoint_files]
            metric = None
        if epoch is not None and not run.get('batch'):
            # timm's own list may hold the file already, where the list was read from a later checkpoint.
            path = self._checkpoint_path(epoch)
            self.checkpoint_files = [entry for entry in self.checkpoint_files if entry[0] != path]
            self.save_checkpoint(epoch, metric)
            if path not in [entry[0] for entry in self.checkpoint_files]:
                Path(path).unlink(missing_ok=True)
        elif run.get('epoch') and not run.get('batch'):
            self.save_last(run['epoch'] - 1)
        best = Path(self.checkpoint_dir, BEST_NAME)
        # Last: what was just written says the same, should another kill come now.
        if self.best_epoch is not None and (not best.exists() or self._best_weights not in (None, hash_weights(best))):
            self._choose_anew(f'{best} is not of epoch {self.best_epoch + 1}, which was the best until here')

    def go_back(self, epoch: int) -> None:
        """Forget an epoch and those after it, which are trained again; their files stay until then."""
        kept = {self._checkpoint_path(idx) for idx in range(epoch)}
        self.checkpoint_files = [entry for entry in self.checkpoint_files if entry[0] in kept]
        if self.best_epoch is not None and self.best_epoch >= epoch:
            self._choose_anew(f'epoch {self.best_epoch + 1} is trained again')

    def _choose_anew(self, reason: str) -> None:
        if self.best_epoch is not None:
            _logger.warning(f'The best epoch is chosen anew, by {self.chosen_by}: {reason}.')
        self.best_epoch = self.best_metric = self._best_weights = None

    def is_best(self, metric: float | None) -> bool:
        """Return whether a network with this metric is the best so far; the latest is, where nothing is measured."""
        return metric is None or self.best_metric is None or self.cmp(self._ranked(metric), self.best_metric)

    def _ranked(self, metric: float) -> float:
        """Return a metric that can be compared: NaN is worse than all others."""
        worst = math.inf if self.decreasing else -math.inf
        return worst if math.isnan(metric) else metric

    def save_best(
        self, model: nn.Module, *, data_config: dict[str, Any] | None = None, label_names: list[str] | None = None
    ) -> None:
        """Write a network for the folder `best`, where `save_checkpoint` puts it; call that next.

        `last` and `best` cannot both change in one move. So `last` is first: it has the hash of the new network, which
        lies ready beside it, and after a kill in between the resumed run puts it in its place.
        """
        new = Path(self.checkpoint_dir, _NEW_BEST_NAME)
        shutil.rmtree(new, ignore_errors=True)
        with explain_disk_errors(Path(self.checkpoint_dir, BEST_NAME)):
            data_config = data_config and fit_channels(data_config)
            write_model(_joined(model), new, data_config=data_config, label_names=label_names)
            self._best_weights = hash_weights(new)

    def _place_best(self) -> None:
        """Move the network that lies ready to the folder `best`, if it is whole and the one of the bookkeeping."""
        best, old, new = (Path(self.checkpoint_dir, name) for name in (BEST_NAME, _OLD_BEST_NAME, _NEW_BEST_NAME))
        if (new / CONFIG_NAME).exists() and hash_weights(new) == self._best_weights:
            with explain_disk_errors(best):
                shutil.rmtree(old, ignore_errors=True)
                if best.exists():
                    best.rename(old)
                new.rename(best)
        for path in (old, new):
            shutil.rmtree(path, ignore_errors=True)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """See timm; `best` is put in its place, and recovery checkpoints of the epoch are removed."""
        metric = None if metric is None else self._ranked(metric)
        super().save_checkpoint(epoch, metric)
        self._place_best()
        if metric is not None and self.is_best(metric):  # timm looks only at what is better than its history
            self.best_metric, self.best_epoch = metric, epoch
            last, best = (Path(self.checkpoint_dir, f'{name}{self.extension}') for name in ('last', 'model_best'))
            self._duplicate(str(last), str(best))
        self._drop_recovery_files()
        return self.best_metric, self.best_epoch

    def save_last(self, epoch: int) -> None:
        """Save the end of an epoch that was not evaluated as `last`, without a place in the history."""
        temporary = os.path.join(self.checkpoint_dir, f'tmp{self.extension}')
        self._keeps_history = False
        try:
            self._save(temporary, epoch)
        finally:
            self._keeps_history = True
        self._replace(temporary, os.path.join(self.checkpoint_dir, f'last{self.extension}'))
        self._drop_recovery_files()

    def _drop_recovery_files(self) -> None:
        for path in self.recovery_files():
            path.unlink(missing_ok=True)
        self.curr_recovery_file = self.prev_recovery_file = ''

    def recovery_files(self) -> list[Path]:
        """Return the checkpoints from the middle of an epoch."""
        return sorted(Path(self.checkpoint_dir).glob(f'{self.recovery_prefix}-*{self.extension}'))

    def clean(self) -> None:
        """Remove what a kill left half written; a network that `last` may be waiting for stays."""
        folder = Path(self.checkpoint_dir)
        best, old, new = (folder / name for name in (BEST_NAME, _OLD_BEST_NAME, _NEW_BEST_NAME))
        if old.exists() and not best.exists():
            old.rename(best)
        unwanted = () if Path(folder, f'last{self.extension}').exists() else (new,)
        for path in (old, *unwanted, *folder.glob(f'.{_NEW_BEST_NAME}-*')):
            shutil.rmtree(path, ignore_errors=True)
        for path in (*folder.glob(f'*tmp{self.extension}'), *folder.glob('.link-*'), *folder.glob('.*.tmp')):
            path.unlink(missing_ok=True)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with explain_disk_errors(save_path, draft=save_path), open(save_path, 'wb') as file:
            super()._save(file, epoch, metric)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, src: str, dst: str) -> None:
        # timm removes the old file first, and a kill in between leaves neither.
        with explain_disk_errors(dst):
            os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = Path(dst).with_name(f'.link-{Path(dst).name}')
        temporary.unlink(missing_ok=True)
        with explain_disk_errors(dst, draft=temporary):
            try:
                os.link(src, temporary)
            except (OSError, NotImplementedError):
                shutil.copy2(src, temporary)
            os.replace(temporary, dst)


class GatheredState:
    """Task and optimizer of a sharded run as timm's saver and loader ask for them: whole.

    Args:
        task: What is trained.
        optimizer: Its optimizer.
        keeps_data: Whether this process is the one that saves; the others take part in `gather` alone.
    """

    def __init__(self, task: TrainingTask, optimizer: torch.optim.Optimizer, *, keeps_data: bool):
        self.task, self.optimizer, self.keeps_data = task, optimizer, keeps_data
        self._states: tuple[dict[str, Any], ...] = ({}, {})
        self._optimizer_state: dict[str, Any] = {}

    def gather(self) -> None:
        """Bring the present state together; all processes take part."""
        self._states = tuple(
            gather_state(self.task.get_checkpoint_state(ema=is_ema), keeps_data=self.keeps_data)
            for is_ema in (False, True)
        )
        self._optimizer_state = gather_state(self.optimizer.state_dict(), keeps_data=self.keeps_data)

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = None) -> dict[str, Any]:
        """Return what was gathered of the task, as its own method does."""
        return self._states[ema]

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered of the optimizer."""
        return self._optimizer_state

    def load_checkpoint_state(
        self, state_dict: dict[str, Any], task_state: Any = None, ema: bool = False, strict: bool = True
    ) -> None:
        """Share out whole weights and load them into the task."""
        own = self.task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
        self.task.load_checkpoint_state(shard_state(state_dict, own), task_state, ema=ema, strict=strict)


def _joined(model: nn.Module) -> nn.Module:
    """Return the model without the norms that --split-bn gives to further augmentation splits in training."""
    if not any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.aux_bn = nn.ModuleList()
    return model
