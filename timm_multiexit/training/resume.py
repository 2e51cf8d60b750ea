"""The state of a run: saved in checkpoints, and restored to resume it."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
import yaml
from accelerate.utils import broadcast_object_list
from timm.scheduler import PlateauLRScheduler
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import unwrap_model

from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.checkpoints.timm_checkpoint import read_training_checkpoint
from timm_multiexit.models.sharding import gather_model, is_sharded, shard_optimizer_state
from timm_multiexit.training.epoch_log import EpochLog
from timm_multiexit.training.running_metrics import RunningMetrics
from timm_multiexit.training.saver import GatheredState, RunSaver
from timm_multiexit.training.trainer import Trainer
from timm_multiexit.utils.errors import (
    CheckpointError,
    MissingFileError,
    MultiExitError,
    StateError,
    brief,
    is_integer,
    one_line,
)
from timm_multiexit.utils.files import RESUME, explain_disk_errors, lock_file, write_text

_logger = logging.getLogger(__name__)


# timm's name of a gradient scaler in checkpoints.
_SCALER_KEY = 'amp_scaler'


class RunState:
    """Saves and restores a run: weights, averages, optimizer, schedule, place in the epoch, sums, table.

    Args:
        task: What is trained.
        trainer: Knows where the run stands, its optimizer and its schedule.
        epoch_log: Holds the table.
        record: Stored in `args.yaml` and in checkpoints.
        num_batches: In an epoch.
        save_epochs: Numbers of completed epochs whose checkpoints are kept in any case.
        **saver_options: For timm's `CheckpointSaver`.
    """

    def __init__(
        self,
        task: TrainingTask,
        trainer: Trainer,
        *,
        epoch_log: EpochLog,
        record: Any,
        num_batches: int,
        save_epochs: Sequence[int] = (),
        **saver_options: Any,
    ):
        self.task, self.trainer, self.epoch_log, self.record = task, trainer, epoch_log, record
        self.num_batches, self.save_epochs, self.saver_options = num_batches, save_epochs, saver_options
        self.accelerator, self.optimizer = trainer.accelerator, trainer.raw_optimizer
        self.gathered: GatheredState | None = None
        if is_sharded(unwrap_model(task.get_trainable_module())):
            self.gathered = GatheredState(task, self.optimizer, keeps_data=self.accelerator.is_main_process)
        self.saver: RunSaver | None = None
        self._lock: IO[str] | None = None
        self._progress_state: dict[str, Any] | None = None

    @property
    def best_epoch(self) -> int | None:
        """The best epoch so far, from 0; None before one was measured, and outside of the main process."""
        return self.saver.best_epoch if self.saver else None

    def open(self, folder: Path) -> None:
        """Make the folder, or remove from it what a kill left half written; it is this run's alone until `close`.

        Raises:
            StateError: Another process works in it.
        """
        if not self.accelerator.is_main_process:
            return
        with explain_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(RunFolder(folder).lock_path)
        scaler = self.accelerator.scaler
        self.saver = RunSaver(
            run_state=self._state,
            model=unwrap_model(self.task.get_trainable_module()),
            optimizer=self.gathered or self.optimizer,
            args=self.record,
            task=self.gathered or self.task,
            amp_scaler=scaler and SimpleNamespace(state_dict=scaler.state_dict, state_dict_key=_SCALER_KEY),
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            **self.saver_options,
        )
        self.saver.clean()

    def close(self) -> None:
        """Leave the folder to other processes."""
        if self._lock is not None:
            self._lock.close()

    def restore(self, path: Path, *, with_optimizer: bool = True) -> tuple[int, int]:
        """Load a checkpoint and return the epoch and the batch to continue with.

        Raises:
            CheckpointError: It is of another optimizer, or from the middle of an epoch of other batches, or damaged.
        """
        checkpoint = read_resume(path)
        epoch, batch = read_position(checkpoint)
        run = (checkpoint.get('saver') or {}).get('run') or {}
        if batch:
            self._check_same_epoch(run, path)
        with _explain_damage(path):
            resume_task_checkpoint(self.gathered or self.task, str(path), log_info=False)
        if with_optimizer:
            load_optimizer(self.optimizer, checkpoint, path, has_schedule=self.trainer.scheduler is not None)
            if self.accelerator.scaler and _SCALER_KEY in checkpoint:
                with _explain_damage(path):
                    self.accelerator.scaler.load_state_dict(checkpoint[_SCALER_KEY])
        if self.task.has_ema():
            with _explain_damage(path):
                load_task_ema_checkpoint(self.gathered or self.task, str(path))
        self._gather()
        saver, is_own = self.saver, self._is_own(path)
        if run:
            with _explain_damage(path):
                self._restore_run(run)
        elif is_own and RunFolder(path.parent).summary_path.exists():
            self.epoch_log.summary.read(RunFolder(path.parent).summary_path, before=epoch)  # of timm's own script
        if saver is not None and is_own:
            self.trainer.epoch, self.trainer.batch = epoch, batch
            with _explain_damage(path):
                saver.load_state_dict(checkpoint.get('saver') or {})
            if not batch:
                self._save_milestone(epoch)  # a kill may have come before it
        return epoch, batch

    def go_back(self, epoch: int) -> None:
        """Forget what is known of an epoch and those after it, which are trained again."""
        if self.saver:
            self.saver.go_back(epoch)

    def save_start(self, path: Path, epoch: int, batch: int) -> None:
        """Keep where a run continues from the checkpoint of another, so that it can be resumed before its first own."""
        if self.saver is None or self._is_own(path):
            return
        self.trainer.epoch, self.trainer.batch = epoch, batch
        if batch:
            self.saver.save_recovery(epoch, batch)
        else:
            self.saver.save_last(epoch - 1)

    def _is_own(self, path: Path) -> bool:
        """Return whether a checkpoint lies in the folder of this run; in the main process."""
        return self.saver is not None and path.parent.resolve() == Path(self.saver.checkpoint_dir).resolve()

    def _check_same_epoch(self, run: dict[str, Any], path: Path) -> None:
        """Raise if the rest of an epoch that was begun would be of other batches."""
        config = self.trainer.config
        for key, flag, now in (
            ('num_batches', 'the data, --batch-size and number of processes', self.num_batches),
            ('seed', '--seed', config.seed),
            ('grad_accum_steps', '--grad-accum-steps', config.grad_accum_steps),
        ):
            if run[key] != now:
                raise CheckpointError(
                    f'{path} is from the middle of an epoch: {key} must be {run[key]}, got {now}. Give {flag} it was'
                    ' trained with, or resume from the end of an epoch.'
                )

    def _restore_run(self, run: dict[str, Any]) -> None:
        self.epoch_log.summary.load_state_dict(run['summary'])
        scheduler = self.trainer.scheduler
        if isinstance(scheduler, PlateauLRScheduler) and run['plateau']:
            scheduler.lr_scheduler.load_state_dict(run['plateau']['counters'])
            scheduler.restore_lr = run['plateau']['restore_lr']
            for group, lr in zip(self.optimizer.param_groups, run['plateau']['rates']):
                group['lr'] = lr
        if run['batch']:
            self.trainer.progress = RunningMetrics(
                len(run['progress']['correct']), self.accelerator.device, multi_label=self.trainer.config.multi_label
            )
            if self.accelerator.is_main_process:
                self.trainer.progress.load_state_dict(run['progress'])
            self._progress_state = run['progress']

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides weights and optimizer to resume the run."""
        trainer, plateau = self.trainer, None
        if isinstance(trainer.scheduler, PlateauLRScheduler):  # whose own state_dict leaves its counters out
            plateau = {
                'counters': trainer.scheduler.lr_scheduler.state_dict(),
                'restore_lr': trainer.scheduler.restore_lr,
                'rates': [group['lr'] for group in self.optimizer.param_groups],
            }
        return {
            'epoch': trainer.epoch,
            'batch': trainer.batch,
            'num_batches': self.num_batches,
            'seed': trainer.config.seed,
            'grad_accum_steps': trainer.config.grad_accum_steps,
            'progress': self._progress_state if trainer.batch else None,
            'summary': self.epoch_log.summary.state_dict(),
            'plateau': plateau,
        }

    def save_args(self) -> None:
        """Write `args.yaml`."""
        if self.saver:
            text = yaml.safe_dump(vars(self.record), default_flow_style=False)
            write_text(RunFolder(Path(self.saver.checkpoint_dir)).args_path, text, advice=RESUME)

    def save_epoch(self, epoch: int, model: torch.nn.Module, metric: float | None, **described: Any) -> None:
        """Keep the end of an epoch, and the measured network as a folder if it is the best so far.

        The metric is None where nothing was measured; data_config and label_names are for `save_pretrained`.
        """
        self._gather()
        if self.gathered:
            is_best = broadcast_object_list([self.saver and self.saver.is_best(metric)])[0]
            model = gather_model(model, keeps_data=self.accelerator.is_main_process) if is_best else model
        if not self.saver:
            return
        if self.saver.is_best(metric):
            self.saver.save_best(model, **described)
        self.saver.save_checkpoint(epoch, metric=metric)
        self._save_milestone(epoch + 1)
        self.epoch_log.write(self.best_epoch)

    def save_unmeasured_epoch(self, epoch: int) -> None:
        """Keep the end of an epoch that was not evaluated, so that the run can be resumed there."""
        self._gather()
        if self.saver:
            self.saver.save_last(epoch)
            self._save_milestone(epoch + 1)

    def _gather(self) -> None:
        """Bring the state of a sharded run together for the main process to save."""
        if self.gathered:
            self.gathered.gather()

    def _save_milestone(self, completed_epochs: int) -> None:
        if self.saver is not None and completed_epochs in self.save_epochs:
            self.saver.save_milestone(completed_epochs)

    def save_recovery(self) -> None:
        """Keep the middle of an epoch; all processes take part."""
        trainer = self.trainer
        if trainer.progress is None:
            raise StateError('There was no batch yet to keep.')
        trainer.progress.check_finite(self.accelerator)
        self._progress_state = trainer.progress.state_dict(self.accelerator)
        self._gather()
        if self.saver:
            self.saver.save_recovery(trainer.epoch, trainer.batch)


def find_resume(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of a run's folder that is furthest, None if there is none.

    Files that cannot be read are skipped with a warning. Checkpoints of single epochs count only where neither the last
    one nor one from the middle of an epoch can be read.

    Raises:
        CheckpointError: There are checkpoints, and none can be read.
    """
    folder = Path(folder)
    errors: list[MultiExitError] = []
    for patterns in (('last', 'recovery-*'), ('checkpoint-*', 'milestone-*')):
        found: dict[Path, tuple[int, int]] = {}
        for path in sorted(path for pattern in patterns for path in folder.glob(f'{pattern}.pth.tar')):
            try:
                found[path] = read_position(read_resume(path))
            except MultiExitError as error:
                _logger.warning(f'Skipped: {error}')
                errors.append(error)
        if found:
            return max(found, key=lambda path: (found[path], path.name))
    if errors:
        raise CheckpointError(
            f'{errors[0]} Cannot resume from any of the {len(errors)} checkpoints in {folder}: name another'
            ' --experiment.'
        )
    return None


def read_resume(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint to resume from holds besides its weights, with a state of the run that can be used.

    Raises:
        MissingFileError: It does not exist.
        CheckpointError: It is not a checkpoint of training, cannot be read, or holds something else.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(
            f'--resume must be a checkpoint of training or auto, got the folder {path}. {_hint(path)}'
        )
    if path.suffix == '.safetensors':
        raise CheckpointError(f'{path} holds weights alone, and no state of a run. {_hint(path)}')
    if not os.path.isfile(path):  # pathlib raises for names that are too long
        raise MissingFileError(f'Checkpoint {path} does not exist.')
    with path.open('rb') as file:
        if file.read(2) not in _TORCH_MAGIC:
            hint = 'Flags are given by --config.' if path.suffix in ('.yaml', '.yml') else _hint(path)
            raise CheckpointError(f'Cannot read checkpoint {path}: it was not written by torch.save. {hint}')
    checkpoint = read_training_checkpoint(path)
    saver = checkpoint.get('saver') or {}
    run = (saver.get('run') if isinstance(saver, dict) else None) or {}
    state = checkpoint.get('task_state') or {}
    places: list[tuple[str, Any, Callable[[Any], bool]]]
    places = [(name, value, _is_dict) for name, value in (('task_state', state), ('saver', saver), ('run', run))]
    places += [(name, checkpoint.get(name, 0) or 0, _is_count) for name in ('epoch', 'version')]
    if isinstance(run, dict) and run:
        places += [(name, run.get(name), is_allowed) for name, is_allowed in _RUN_KINDS.items()]
    for name, value, is_allowed in places:
        if not is_allowed(value):
            raise CheckpointError(f'{path} is damaged: {name} must not be {brief(value)}. {_hint(path)}')
    return checkpoint


_TORCH_MAGIC = (b'PK', b'\x80\x02')  # torch.save's archive, and what it wrote before 1.6


def _is_count(value: Any) -> bool:
    return is_integer(value, least=0)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table(value: Any) -> bool:
    rows = value.get('rows') if isinstance(value, dict) else None
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and _is_count(row.get('epoch'))
        and all(isinstance(key, str) and isinstance(number, (int, float)) for key, number in row.items())
        for row in rows
    )


# What a run's state is made of.
_RUN_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('epoch', 'batch', 'num_batches', 'seed', 'grad_accum_steps'), _is_count),
    'summary': _is_table,
    **dict.fromkeys(('progress', 'plateau'), lambda value: value is None or isinstance(value, dict)),
}


def _hint(path: Path) -> str:
    """Return what to give in place of a folder or a file."""
    folder = path if path.is_dir() else path.parent
    for last in (folder / 'last.pth.tar', folder.parent / 'last.pth.tar'):
        if last.is_file() and last != path:
            return f'Give --resume {last}.'
    if (folder / CONFIG_NAME).is_file():
        return f'Start a new run from it by --model local-dir:{folder} --pretrained.'
    if path.suffix == '.safetensors':
        return f'Start a new run from it by --initial-checkpoint {path}.'
    return 'Give another *.pth.tar of a run.'


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except MultiExitError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path} does not fit this run, or is damaged: {one_line(error)}.') from error


def read_position(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Return the epoch and the batch that a run is resumed at, given `read_training_checkpoint`'s dict.

    A checkpoint that timm's own script wrote is resumed at the next epoch.
    """
    run = (checkpoint.get('saver') or {}).get('run')
    if run:
        return int(run['epoch']), int(run['batch'])
    epoch = checkpoint.get('epoch')
    if epoch is None:
        return 0, 0
    return int(epoch) + (1 if checkpoint.get('version', 0) > 1 else 0), 0


# Of an optimizer's defaults, what training changes.
_NOT_SETTINGS = ('lr', 'lookahead_step')


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    has_schedule: bool = True,
) -> None:
    """Load a checkpoint's optimizer state; its settings stay those of this run, and the rate if no schedule sets it.

    Raises:
        CheckpointError: There is none, or it is of another optimizer or of other parameters.
    """
    if 'optimizer' not in checkpoint:
        raise CheckpointError(f'{path} has no optimizer state: resume without it by --no-resume-opt.')
    own = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(shard_optimizer_state(checkpoint['optimizer'], optimizer))
        for before, after in zip(own, optimizer.param_groups):
            # torch takes the settings of another optimizer with as many parameters. The schedule may be another one.
            missing = sorted(before.keys() - after.keys() - {'initial_lr', 'exit_lr_scale'})
            if missing:
                raise ValueError(f'it has no {", ".join(missing)}')
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The optimizer in {path} does not fit this run's: {one_line(error)}. Give the flags"
            ' it was trained with, or --no-resume-opt.'
        ) from error
    settings = {'initial_lr', 'lr_scale', 'exit_lr_scale', *optimizer.defaults}.difference(_NOT_SETTINGS)
    for before, after in zip(own, optimizer.param_groups):
        after.update({name: before[name] for name in settings if before.get(name) is not None})
        if not has_schedule:
            after['lr'] = before['lr']
