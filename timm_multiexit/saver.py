"""A training run's files, whole after a kill at any moment: timm's checkpoints, and the best network as a folder."""

import copy
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import SplitBatchNorm2d
from timm.utils import CheckpointSaver
from torch import nn

from timm_multiexit.checkpoint import save_pretrained
from timm_multiexit.config import MultiExitError
from timm_multiexit.files import explained
from timm_multiexit.training_checkpoint import read_training_checkpoint

_logger = logging.getLogger(__name__)

BEST_NAME = 'best'
_OLD_BEST_NAME = '.best-old'
_NEW_BEST_NAME = '.best-new'


class RunSaver(CheckpointSaver):
    """timm's saver, with files that are there whole or not at all, and with where the run stands.

    Args:
        run_state: Returns what the run needs to go on besides weights and optimizer: plain values and tensors.
        **kwargs: For timm's `CheckpointSaver`.
    """

    def __init__(self, *, run_state: Callable[[], dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self.run_state = run_state
        self._keeps_history = True

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """Return timm's bookkeeping and, under 'run', where the run stands."""
        pending = (epoch, metric) if self._keeps_history else (None, None)
        return {**super().state_dict(*pending), 'run': self.run_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the bookkeeping of a checkpoint in this folder; call it when all else has been restored.

        If that checkpoint closed an epoch, its files are written once more: a kill may have come between them.
        """
        epoch, metric = state_dict.get('pending', (None, None))
        super().load_state_dict({**state_dict, 'pending': (None, None)})
        self.clean()
        if epoch is not None and not state_dict.get('run', {}).get('batch'):
            # timm's own list may hold the file already, where the list was read from a later checkpoint.
            path = self._checkpoint_path(epoch)
            self.checkpoint_files = [entry for entry in self.checkpoint_files if entry[0] != path]
            self.save_checkpoint(epoch, metric)

    def is_best(self, metric: float | None) -> bool:
        """Return whether a network with this metric is the best so far; the latest is, where nothing is measured."""
        return metric is None or self.best_metric is None or self.cmp(metric, self.best_metric)

    def save_best(
        self, model: nn.Module, *, data_config: dict[str, Any] | None = None, label_names: list[str] | None = None
    ) -> None:
        """Write a network to the folder `best` in one move; before `save_checkpoint`, which says that it was the best.

        Args:
            model: The network.
            data_config: For `save_pretrained`.
            label_names: For `save_pretrained`.
        """
        best, old, new = (Path(self.checkpoint_dir, name) for name in (BEST_NAME, _OLD_BEST_NAME, _NEW_BEST_NAME))
        shutil.rmtree(new, ignore_errors=True)
        with explained(best):
            data_config = data_config and _fit_channels(data_config)
            save_pretrained(_joined(model), new, data_config=data_config, label_names=label_names)
            shutil.rmtree(old, ignore_errors=True)
            if best.exists():
                best.rename(old)
            new.rename(best)
        shutil.rmtree(old, ignore_errors=True)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """See timm; recovery checkpoints of the epoch are removed, the run has gone past them."""
        best = super().save_checkpoint(epoch, metric)
        self._drop_recovery_files()
        return best

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
        """Remove what a kill left half written."""
        folder = Path(self.checkpoint_dir)
        best, old = folder / BEST_NAME, folder / _OLD_BEST_NAME
        if old.exists() and not best.exists():
            old.rename(best)
        for path in (old, folder / _NEW_BEST_NAME, *folder.glob(f'.{_NEW_BEST_NAME}-*')):
            shutil.rmtree(path, ignore_errors=True)
        for path in (*folder.glob(f'*tmp{self.extension}'), *folder.glob('.link-*'), *folder.glob('.*.tmp')):
            path.unlink(missing_ok=True)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with explained(save_path, draft=save_path), open(save_path, 'wb') as file:
            super()._save(file, epoch, metric)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, src: str, dst: str) -> None:
        # timm removes the old file first, and a kill in between leaves neither.
        with explained(dst):
            os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = Path(dst).with_name(f'.link-{Path(dst).name}')
        temporary.unlink(missing_ok=True)
        with explained(dst, draft=temporary):
            try:
                os.link(src, temporary)
            except (OSError, NotImplementedError):
                shutil.copy2(src, temporary)
            os.replace(temporary, dst)


def _fit_channels(data_config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with one mean and deviation per channel, as timm's loaders normalize other images."""
    channels = data_config['input_size'][0]
    fitted = {
        key: (sum(data_config[key]) / len(data_config[key]),) * channels
        for key in ('mean', 'std')
        if len(data_config[key]) != channels
    }
    return {**data_config, **fitted}


def _joined(model: nn.Module) -> nn.Module:
    """Return the model without the norms that --split-bn gives to further augmentation splits in training."""
    if not any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.aux_bn = nn.ModuleList()
    return model


def find_resume(folder: str | os.PathLike) -> Path | None:
    """Return the checkpoint of a run's folder that is furthest, None if there is none.

    Files that cannot be read are passed over with a warning. Only where neither the last checkpoint nor one from the
    middle of an epoch can be had, the kept ones of single epochs count.

    Raises:
        MultiExitError: There are checkpoints, and none can be read.
    """
    folder = Path(folder)
    errors: list[MultiExitError] = []
    for patterns in (('last', 'recovery-*'), ('checkpoint-*', 'milestone-*')):
        found: dict[Path, tuple[int, int]] = {}
        for path in sorted(path for pattern in patterns for path in folder.glob(f'{pattern}.pth.tar')):
            try:
                found[path] = read_position(read_training_checkpoint(path))
            except MultiExitError as error:
                _logger.warning(f'Passed over: {error}')
                errors.append(error)
        if found:
            return max(found, key=lambda path: (found[path], path.name))
    if errors:
        raise MultiExitError(
            f'{errors[0]} None of the {len(errors)} in {folder} can be gone on with: name another --experiment.'
        )
    return None


def read_position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return the epoch and the batch that a run goes on from, given `read_training_checkpoint`'s dict.

    A checkpoint that timm's own script wrote goes on with the next epoch.
    """
    run = (checkpoint.get('saver') or {}).get('run')
    if run:
        return int(run['epoch']), int(run['batch'])
    epoch = checkpoint.get('epoch')
    if epoch is None:
        return 0, 0
    return int(epoch) + (1 if checkpoint.get('version', 0) > 1 else 0), 0


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Load a checkpoint's optimizer state.

    Raises:
        MultiExitError: There is none, or it is of another optimizer or of other parameters.
    """
    if 'optimizer' not in checkpoint:
        raise MultiExitError(f'{path} has no optimizer state: go on without it by --no-resume-opt.')
    own = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
        _check_settings(own, optimizer.param_groups)
    except (KeyError, ValueError) as error:
        raise MultiExitError(
            f"The optimizer in {path} does not fit this run's: {str(error).splitlines()[0].rstrip('.')}. Give the flags"
            ' it was trained with, or --no-resume-opt.'
        ) from error


def _check_settings(own: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """Raise where torch has loaded the settings of another optimizer: with as many parameters it does not mind."""
    for before, after in zip(own, loaded):
        # A schedule, which may be another one now, notes its highest rate there.
        missing = sorted(before.keys() - after.keys() - {'initial_lr'})
        if missing:
            raise ValueError(f'it has no {", ".join(missing)}')
