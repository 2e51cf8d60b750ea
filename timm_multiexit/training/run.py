"""A training run: its epochs, their evaluation, the files it keeps, and the table at its end."""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from timm.scheduler import PlateauLRScheduler
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model
from torchvision.utils import save_image

from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.data.datasets import is_same_split
from timm_multiexit.data.seeding import SeededLoader
from timm_multiexit.evaluation.exit_table import Evaluation, evaluate_loader, make_table
from timm_multiexit.evaluation.metrics import flatten_metrics
from timm_multiexit.evaluation.stamp import describe_inputs
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.training.epoch_log import EpochLog
from timm_multiexit.training.resume import RunState
from timm_multiexit.training.trackers import TrackerConfig
from timm_multiexit.training.trainer import Trainer
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.files import RESUME, write_text
from timm_multiexit.utils.signals import Stopped, Stopper

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run beside those of its trainer.

    Attributes:
        model: Name of the model, for the report.
        stop_epoch: Epochs after which the run ends before its schedule does; None for all.
        val_interval: Epochs between evaluations.
        eval_metric: Column that the best epoch is chosen by, e.g. 'top1'.
        multilabel_threshold: Probability from which a label counts as predicted.
        dist_bn: 'broadcast' or 'reduce' the statistics of batch norms over processes after an epoch; '' for not.
        evaluates_ema: Evaluate the moving average of the weights in place of the weights.
        recovery_interval: Updates between recovery checkpoints; 0 for none.
        checkpoint_hist: Checkpoints of single epochs that are kept.
        save_epochs: Numbers of completed epochs whose checkpoints are kept in any case.
        save_images: Write the images of a batch at every log interval.
        resume: Checkpoint to resume from.
        resumes_optimizer: Restore the optimizer's state from it.
        start_epoch: Epoch to start with, from 0; None for 0, or that of the checkpoint.
        trackers: Where numbers are logged besides files.
    """

    model: str
    stop_epoch: int | None = None
    val_interval: int = 1
    eval_metric: str = 'top1'
    multilabel_threshold: float = 0.5
    dist_bn: str = ''
    evaluates_ema: bool = False
    recovery_interval: int = 0
    checkpoint_hist: int = 10
    save_epochs: tuple[int, ...] = ()
    save_images: bool = False
    resume: Path | None = None
    resumes_optimizer: bool = True
    start_epoch: int | None = None
    trackers: TrackerConfig = field(default_factory=TrackerConfig)

    @property
    def is_decreasing(self) -> bool:
        """Whether a lower `eval_metric` is better."""
        return self.eval_metric.endswith(('loss', 'ece'))


@dataclass(frozen=True)
class RunData:
    """What a run is trained and evaluated on.

    Attributes:
        train_loader: Images to train on.
        val_loader: Images that the best epoch is chosen on; None for none.
        test_loader: Images of the table at the end; None for none.
        data_config: How images are prepared, as `timm.data.resolve_data_config` returned it.
        split: Name of the test images' split.
        chosen_on: Name of the validation images' split, or words for images held out of the training split.
    """

    train_loader: SeededLoader
    val_loader: Any | None
    test_loader: Any | None
    data_config: dict[str, Any]
    label_names: list[str] | None = None
    name: str = ''
    split: str = ''
    chosen_on: str = ''
    is_held_out: bool = False

    @property
    def evaluation_images(self) -> str:
        """What the epochs are evaluated on, in words."""
        return self.chosen_on if self.is_held_out else f'the {self.chosen_on} split'


class TrainingRun:
    """Trains a task and keeps files of it. Making it writes nothing.

    Args:
        task: What is trained.
        trainer: Trains it; its `on_update` is taken.
        data: What it is trained and evaluated on.
        config: Settings beside those of the trainer.
        record: What `args.yaml` and timm's checkpoints store of how the run was started.
        folder: Of the run.
    """

    def __init__(
        self, task: TrainingTask, trainer: Trainer, *, data: RunData, config: RunConfig, record: Any, folder: Path
    ):
        self.task, self.trainer, self.data, self.config = task, trainer, data, config
        self.record, self.folder = record, folder
        self.accelerator = trainer.accelerator
        epochs = trainer.config.epochs
        self.num_epochs = epochs if config.stop_epoch is None else min(epochs, config.stop_epoch)
        trainer.on_update = self._on_update
        model = unwrap_model(task.get_trainable_module())
        self.epoch_log = EpochLog(
            self.accelerator,
            num_exits=len(model.exits) if isinstance(model, MultiExitModel) else 0,
            num_epochs=self.num_epochs,
            multi_label=trainer.config.multi_label,
            log_interval=trainer.config.log_interval,
            images=data.evaluation_images,
            chosen_by=config.eval_metric,
        )
        self.state = RunState(
            task,
            trainer,
            epoch_log=self.epoch_log,
            record=record,
            num_batches=len(data.train_loader),
            save_epochs=config.save_epochs,
            chosen_by=f'{config.eval_metric} on {data.evaluation_images}',
            decreasing=config.is_decreasing,
            max_history=config.checkpoint_hist,
        )
        self.stopper = Stopper(self.accelerator)
        self.start_epoch = self.start_batch = 0

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.data.train_loader) // self.trainer.config.grad_accum_steps)

    def open(self) -> None:
        """Make the folder of the run, or continue in that of the checkpoint to resume from."""
        config = self.config
        self.state.open(self.folder)
        if config.resume:
            place = self.state.restore(config.resume, with_optimizer=config.resumes_optimizer)
            self.start_epoch, self.start_batch = place
        if config.start_epoch is not None:
            self.start_epoch, self.start_batch = config.start_epoch, 0
            self.state.go_back(config.start_epoch)
        updates_done = self.start_epoch * self.updates_per_epoch
        updates_done += self.start_batch // self.trainer.config.grad_accum_steps
        self._place_schedule(updates_done)
        if config.resume:
            self.state.save_start(config.resume, self.start_epoch, self.start_batch)
        self.state.save_args()
        describe_environment()  # finds the commit, before another one is checked out
        self.epoch_log.open(self.folder, config.trackers, record=vars(self.record), step=updates_done)
        if self.accelerator.is_main_process:
            self.epoch_log.write(self.state.best_epoch)

    def _place_schedule(self, updates_done: int) -> None:
        scheduler = self.trainer.scheduler
        is_new = not (self.config.resume or self.start_epoch)
        # The plateau schedule's rate came with the checkpoint; the others are functions of time.
        if scheduler is None or is_new or isinstance(scheduler, PlateauLRScheduler):
            return
        scheduler.step(self.start_epoch)
        scheduler.step_update(updates_done)

    def fit(self) -> None:
        """Train and evaluate epoch by epoch, and keep what timm keeps, and the best network as a folder.

        Raises:
            Stopped: The process got SIGTERM or SIGINT, and the state of the run is saved.
        """
        with self.stopper.listening():
            for epoch in range(self.start_epoch, self.num_epochs):
                self._fit_epoch(epoch)

    def _fit_epoch(self, epoch: int) -> None:
        config, data, trainer, epoch_log = self.config, self.data, self.trainer, self.epoch_log
        is_last = epoch + 1 == self.num_epochs
        epoch_log.begin_epoch()
        train_metrics = trainer.train_epoch(epoch, data.train_loader, self.start_batch)
        self.start_batch = 0
        epoch_log.flush(trainer)
        rate, lr = trainer.images_per_second, trainer.learning_rate
        self._distribute_norms()
        is_evaluated = (epoch + 1) % config.val_interval == 0 or is_last
        model, metrics = self._evaluate() if is_evaluated else (None, {})
        # Without an evaluation timm chooses by the training loss, if by a loss.
        is_by_training = data.val_loader is None and config.eval_metric == 'loss'
        metric = train_metrics['loss'] if is_by_training else metrics.get(config.eval_metric)
        epoch_log.note_epoch(epoch, train_metrics, metrics, lr, is_evaluated=is_evaluated)
        if trainer.scheduler is not None:
            trainer.scheduler.step(epoch + 1, metric)
        # From here on the run stands at the beginning of the next epoch.
        trainer.epoch, trainer.batch = epoch + 1, 0
        if model is not None:
            self.state.save_epoch(epoch, model, metric, data_config=data.data_config, label_names=data.label_names)
        else:
            self.state.save_unmeasured_epoch(epoch)
        epoch_log.end_epoch(trainer, rate)
        if not is_last and self.stopper.is_asked():
            raise Stopped(self.stopper.signal)

    def _distribute_norms(self) -> None:
        """Make the statistics of batch norms those of all processes; what is fixed stays as it is, to the last bit."""
        config, num_processes = self.config, self.accelerator.num_processes
        if num_processes == 1 or config.dist_bn not in ('broadcast', 'reduce'):
            return
        control = self.trainer.regime
        is_fixed = self.trainer.config.freeze_bn_stats or (control and control.regime.name == 'frozen')
        for is_ema in (False, True)[: 1 + config.evaluates_ema]:
            module = unwrap_model(self.task.get_trainable_module(ema=is_ema))
            if is_fixed:
                module = module.exits if isinstance(module, MultiExitModel) else torch.nn.Module()
            distribute_bn(module, num_processes, config.dist_bn == 'reduce')

    def _evaluate(self) -> tuple[torch.nn.Module, dict[str, float]]:
        """Return the model that counts, the moving average if there is one, and its metrics as columns."""
        config = self.config
        model = unwrap_model(self.task.get_eval_model(ema=config.evaluates_ema))
        if self.data.val_loader is None:
            return model, {}
        channels_last = self.trainer.config.channels_last
        return model, flatten_metrics(self._measure(model, self.data.val_loader, channels_last=channels_last).metrics)

    def _measure(self, model: torch.nn.Module, loader: Any, *, channels_last: bool = False) -> Evaluation:
        return evaluate_loader(
            model,
            loader,
            accelerator=self.accelerator,
            channels_last=channels_last,
            multi_label=self.trainer.config.multi_label,
            threshold=self.config.multilabel_threshold,
        )

    def _on_update(self, trainer: Trainer) -> None:
        config, settings = self.config, trainer.config
        self.epoch_log.note_step(trainer)
        update_idx = (trainer.batch - 1) // settings.grad_accum_steps
        if config.save_images and self.accelerator.is_main_process and update_idx % settings.log_interval == 0:
            save_image(trainer.images, self.folder / f'train-batch-{trainer.batch - 1}.jpg', normalize=True)
        if trainer.batch == len(self.data.train_loader):
            return  # the epoch is closed by its own checkpoint
        is_due = config.recovery_interval and (update_idx + 1) % config.recovery_interval == 0
        is_asked = self.stopper.is_asked(trainer.num_updates)
        if is_due or is_asked:
            self.state.save_recovery()
        if is_asked:
            raise Stopped(self.stopper.signal)

    def close(self) -> None:
        """Leave the folder, and drop the loaders, whose processes take five seconds each to be garbage collected."""
        self.state.close()
        del self.data

    def report(self) -> None:
        """Print the table of the best network, write it beside the run, and list the best epochs as timm does."""
        self.accelerator.wait_for_everyone()
        best_epoch, folder = broadcast_object_list([self.state.best_epoch, str(self.folder)])
        files = RunFolder(Path(folder))
        if self.data.test_loader is not None and files.best.exists():
            self._report_best(files, best_epoch)
        if self.accelerator.is_main_process:
            # Nothing after these lines: timm's bulk tools read the rest of the output as JSON.
            rows = self.epoch_log.best_epochs(self.config.eval_metric, is_decreasing=self.config.is_decreasing)
            print('--result\n[' + ',\n '.join(json.dumps(row) for row in rows) + ']', flush=True)

    def _report_best(self, files: RunFolder, best_epoch: int | None) -> None:
        """Print the table of the best network and write it to the folder of the run; all ranks take part."""
        config, data = self.config, self.data
        best = files.load_best(**self.record.model_kwargs).to(self.accelerator.device)
        result = self._measure(best, data.test_loader)
        if not self.accelerator.is_main_process:
            return
        input_size = data.data_config['input_size']
        table = make_table(best, result.metrics, input_size=input_size, num_samples=result.num_samples)
        chosen, is_same = '', False
        if best_epoch is not None:
            is_same = not data.is_held_out and is_same_split(data.split, data.chosen_on)
            chosen = f', epoch {best_epoch + 1} of {self.num_epochs} chosen by {config.eval_metric} on'
            chosen += ' this split' if is_same else f' {data.evaluation_images}'
        print(
            f'\n{config.model} on the {data.split} split, {table.num_samples} images{chosen}:\n\n{table}\n\n'
            f'{files.best} is the network: create_model({json.dumps(f"local-dir:{files.best}")}, pretrained=True)\n',
            flush=True,
        )
        control = self.trainer.regime
        if best_epoch is not None and control and best_epoch + 1 <= control.regime.joint_from:
            _logger.warning(
                f'{files.best} is epoch {best_epoch + 1}, and backbone and heads learned together only after'
                f' {control.regime.joint_from:g}. --eval-metric mean_top1 chooses by all classifiers.'
            )
        results = {
            'split': data.split,
            'num_samples': table.num_samples,
            **describe_inputs(
                best,
                data.data_config,
                dataset=data.name,
                precision=self.accelerator.mixed_precision,
                weights=hash_weights(files.best),
            ),
            'epochs': self.num_epochs,
            'epoch_chosen_on': data.chosen_on,
            'epoch_chosen_by': None if best_epoch is None else config.eval_metric,
            'is_reported_split': is_same,
            'best_epoch': best_epoch,
            'rows': table.rows,
            'seed': self.trainer.config.seed,
            'command': sys.argv,
            **describe_environment(),
        }
        write_text(files.results_path, json.dumps(results, indent=2) + '\n', advice=RESUME)
