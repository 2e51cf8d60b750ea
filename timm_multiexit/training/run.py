"""The end of a run: the best network's table, printed and written beside it."""

import json
import logging
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from timm.models import safe_model_name
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.utils import distribute_bn, random_seed, unwrap_model
from torchvision.utils import save_image

from timm_multiexit.checkpoints.run_folder import BEST_NAME, RunFolder, read_origin
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.checkpoints.timm_checkpoint import read_training_checkpoint
from timm_multiexit.cli.build_model import check_image_size, create_regime, create_train_model, place_model
from timm_multiexit.cli.build_training import (
    create_datasets,
    create_task,
    create_train_optimizer,
    encode_targets,
    prepare,
)
from timm_multiexit.data.datasets import class_names, is_same_split
from timm_multiexit.data.loaders import create_eval_loader, create_train_loader
from timm_multiexit.evaluation.exit_table import Evaluation, evaluate_loader, make_table
from timm_multiexit.evaluation.metrics import evaluation_columns, flatten_metrics
from timm_multiexit.evaluation.stamp import describe_inputs, name_dataset
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.training.epoch_log import Journal
from timm_multiexit.training.regimes import RegimeControl
from timm_multiexit.training.resume import Checkpointing, find_resume
from timm_multiexit.training.trackers import check_trackers
from timm_multiexit.training.trainer import Trainer, TrainerConfig
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import RESUME, write_text
from timm_multiexit.utils.signals import Stopped, Stopper

_logger = logging.getLogger(__name__)


def report(
    args: Namespace,
    accelerator: Accelerator,
    folder: Path,
    dataset: Any,
    *,
    data_config: dict[str, Any],
    best_epoch: int | None,
    num_epochs: int,
) -> None:
    """Print the table of the network in `folder/best` and write it to `folder/results.json`; all ranks take part.

    Args:
        args: Of the run.
        accelerator: Of the run.
        folder: Of the run.
        dataset: What the table is of.
        data_config: How images are made ready.
        best_epoch: From 0; None where no epoch was chosen.
        num_epochs: That the run has trained.
    """
    best = RunFolder(folder).load_best(**args.model_kwargs).to(accelerator.device)
    result = evaluate_loader(
        best,
        create_eval_loader(args, dataset, data_config, accelerator),
        accelerator=accelerator,
        multi_label=args.task == 'multilabel',
        threshold=args.multilabel_threshold,
    )
    if not accelerator.is_main_process:
        return
    split = args.test_split or args.val_split
    chosen_on = args.val_split
    if args.val_from_train:
        chosen_on = f'{args.val_from_train} images held out of {args.train_split}'
    table = make_table(best, result.metrics, input_size=data_config['input_size'], num_samples=result.num_samples)
    chosen = ''
    is_same = best_epoch is not None and is_same_split(split, args.val_split) and not args.val_from_train
    if best_epoch is not None:
        chosen = f', epoch {best_epoch + 1} of {num_epochs} chosen by {args.eval_metric} on'
        chosen += ' this split' if is_same else f' {chosen_on}' if args.val_from_train else f' the {chosen_on} split'
    print(
        f'\n{args.model} on the {split} split, {table.num_samples} images{chosen}:\n\n{table}\n\n'
        f'{folder}/best is the network: create_model("local-dir:{folder}/best", pretrained=True)\n',
        flush=True,
    )
    results = {
        'split': split,
        'num_samples': table.num_samples,
        **describe_inputs(
            best,
            data_config,
            dataset=name_dataset(args.dataset, args.data_dir),
            precision=accelerator.mixed_precision,
            weights=hash_weights(folder / 'best'),
        ),
        'epochs': num_epochs,
        'epoch_chosen_on': chosen_on,
        'epoch_chosen_by': None if best_epoch is None else args.eval_metric,
        'is_reported_split': is_same,
        'best_epoch': best_epoch,
        'rows': table.rows,
        'seed': args.seed,
        'command': sys.argv,
        **describe_environment(),
    }
    write_text(RunFolder(folder).results_path, json.dumps(results, indent=2) + '\n', advice=RESUME)


class TrainingRun:
    """A run of `train.py`. Making it checks all that can be wrong and writes nothing.

    Args:
        args: What `parse_train_args` returned; what the run resolves is written back to it.
        accelerator: What `create_accelerator` returned.

    Raises:
        MultiExitError: Anything that the arguments, the data or the checkpoint have wrong.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        check_trackers(args.log_with)
        self.output_dir = choose_output_dir(args)
        self.resume = self._find_resume()
        random_seed(args.seed, accelerator.process_index)
        self.datasets, num_classes = create_datasets(args)
        if args.is_demo:
            _logger.info(
                'No data named (--data-dir, --dataset): training on the handwritten digits that come with scikit-learn,'
                f' {len(self.datasets[0])} images, with {args.model} and settings made for them.'
            )
        if num_classes and args.num_classes is None and not args.pretrained:
            args.num_classes = num_classes
        model = create_train_model(args, num_classes, self.resume)
        self._note_origin(model)
        from timm_multiexit.cli.train import check_publishing  # called from there with `build_run`

        check_publishing(args, has_table=self.datasets[2] is not None, asks_hub=accelerator.is_main_process)
        self.label_names = class_names(self.datasets[0], args.num_classes)
        encode_targets(args, self.datasets)
        self._check_metric(model)
        self.data_config = resolve_data_config(vars(args), model=model)
        self.regime = create_regime(args, model)
        if self.regime.name == 'frozen':
            model.freeze_backbone(trains_classifier=self.regime.trains_classifier)
        check_image_size(model, self.data_config['input_size'])
        model = place_model(args, model, accelerator)
        if args.kd_model_name:
            # Where the tasks look for how the student's images are normalized.
            model.pretrained_cfg.update(mean=self.data_config['mean'], std=self.data_config['std'])
        self.task = create_task(args, model, accelerator.device)
        self._create_loaders()
        self._create_optimizer()
        num_exits = len(model.exits) if isinstance(model, MultiExitModel) else 0
        self.last_epoch = self.num_epochs if args.stop_epoch is None else min(self.num_epochs, args.stop_epoch)
        self.journal = Journal(args, accelerator, num_exits=num_exits, epochs=self.last_epoch)
        self.checkpoints = Checkpointing(
            args,
            accelerator,
            task=self.task,
            optimizer=self.optimizer,
            trainer=self.trainer,
            journal=self.journal,
            num_batches=len(self.loader),
            is_decreasing=self.is_decreasing,
        )
        self.stopper = Stopper(accelerator)
        self.start_epoch = self.start_batch = 0

    def _find_resume(self) -> Path | None:
        path = self.args.resume
        if path == 'auto':
            path = find_resume(self.output_dir)
            _logger.info(f'Resuming from {path}.' if path else f'Nothing to resume in {self.output_dir}: a new run.')
        return Path(path) if path else None

    def _note_origin(self, model: torch.nn.Module) -> None:
        """Remember what the weights started from; a run that goes on started where the one before it did."""
        args = self.args
        args.origin = None
        if not isinstance(model, MultiExitModel):
            return
        if self.resume:
            before = read_training_checkpoint(self.resume).get('args')
            model.origin = read_origin(vars(before) if isinstance(before, Namespace) else {})
        elif args.initial_checkpoint:
            model.origin = Origin('a file')
        args.origin = model.origin.to_dict()

    def _check_metric(self, model: torch.nn.Module) -> None:
        args = self.args
        is_multi_label = args.task == 'multilabel'
        columns = evaluation_columns(
            len(model.exits) if isinstance(model, MultiExitModel) else 0, multi_label=is_multi_label
        )
        if args.eval_metric not in columns:
            raise MultiExitError(f"--eval-metric is '{args.eval_metric}', allowed are {', '.join(columns)}.")
        self.is_decreasing = args.eval_metric.endswith(('loss', 'ece'))

    def _create_loaders(self) -> None:
        args = self.args
        self.loader, self.mixup_fn = create_train_loader(args, self.datasets[0], self.data_config, self.accelerator)
        self.loader_eval = None
        if self.datasets[1] is not None:
            self.loader_eval = create_eval_loader(args, self.datasets[1], self.data_config, self.accelerator)
        elif args.sched == 'plateau' and args.eval_metric != 'loss':
            raise MultiExitError(
                f'--sched plateau follows {args.eval_metric}, which no split measures: add --val-split.'
            )

    def _create_optimizer(self) -> None:
        args = self.args
        batch_size = getattr(self.loader.loader.batch_sampler, 'average_batch_size', args.batch_size)
        module = self.task.get_trainable_module()
        self.optimizer = create_train_optimizer(args, module, batch_size, self.accelerator, self.regime)
        self.updates_per_epoch = -(-len(self.loader) // args.grad_accum_steps)
        try:
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer,
                **scheduler_kwargs(args, decreasing_metric=self.is_decreasing),
                updates_per_epoch=self.updates_per_epoch,
            )
        except (AssertionError, ValueError) as error:
            raise MultiExitError(f'--sched {args.sched} cannot be made so: {str(error).rstrip(".")}.') from error
        # The copy before anything is wrapped, so that neither compiled nor prepared forwards are copied.
        if args.model_ema:
            self.task.setup_ema(
                decay=args.model_ema_decay,
                use_warmup=args.model_ema_warmup,
                device='cpu' if args.model_ema_force_cpu else None,
            )
        if args.torchcompile:
            torch._dynamo.config.recompile_limit = 64  # one forward serves several modes and batch sizes
            module.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        prepared = prepare(
            self.task,
            self.optimizer,
            self.accelerator,
            broadcast_buffers=not args.no_ddp_bb,
            find_unused_parameters=self.regime.changes,
        )
        self.trainer = Trainer(
            self.task,
            prepared,
            accelerator=self.accelerator,
            config=TrainerConfig(
                epochs=self.num_epochs,
                seed=args.seed,
                grad_accum_steps=args.grad_accum_steps,
                clip_grad=args.clip_grad,
                clip_mode=args.clip_mode,
                log_interval=args.log_interval,
                channels_last=args.channels_last,
                multi_label=args.task == 'multilabel',
                loss_scale=args.variable_batch_loss_scale if args.train_img_sizes else 'none',
                batch_size=batch_size,
                mixup_off_epoch=args.mixup_off_epoch,
                synchronize=args.synchronize_step,
                shows_progress=args.progress and self.accelerator.is_main_process,
            ),
            scheduler=self.scheduler,
            mixup_fn=self.mixup_fn,
            regime=RegimeControl(self.regime, self.task, self.optimizer),
            on_update=self._on_update,
        )

    def open(self) -> None:
        """Make the folder of the run, or go on in that of a checkpoint."""
        args = self.args
        self.checkpoints.open(self.output_dir)
        if self.resume:
            self.start_epoch, self.start_batch = self.checkpoints.restore(self.resume)
        if args.start_epoch is not None:
            self.start_epoch, self.start_batch = args.start_epoch, 0
        self._place_schedule()
        self._describe()
        self.checkpoints.save_args()
        describe_environment()  # finds the commit, before another one is checked out
        self.journal.open(self.output_dir, self._updates_done())
        if self.accelerator.is_main_process:
            self.journal.write()

    def _describe(self) -> None:
        """Log what is about to be trained, in one line."""
        args, model = self.args, unwrap_model(self.task.get_eval_model())
        counts = f'{sum(param.numel() for param in model.parameters()) / 1e6:.2f}M parameters'
        if isinstance(model, MultiExitModel):
            counts += f', exits at {", ".join(spec.module for spec in model.exits.specs)} by {args.exit_loss}'
        precision = self.accelerator.mixed_precision.replace('no', args.model_dtype or 'float32')
        _logger.info(
            f'{args.model} ({counts}) on {len(self.datasets[0])} images, {args.opt} at {args.lr:.2e}, {args.sched},'
            f' epochs {self.start_epoch + 1} to {self.last_epoch} of {self.updates_per_epoch} updates, {precision} on'
            f' {self.accelerator.num_processes} x {self.accelerator.device.type}, into {self.output_dir}'
        )

    def _updates_done(self) -> int:
        return self.start_epoch * self.updates_per_epoch + self.start_batch // self.args.grad_accum_steps

    def _place_schedule(self) -> None:
        is_new = not (self.resume or self.start_epoch)
        # The plateau schedule's rate came with the checkpoint; the others are functions of time.
        if self.scheduler is None or is_new or isinstance(self.scheduler, PlateauLRScheduler):
            return
        self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self._updates_done())

    def fit(self) -> None:
        """Train and evaluate epoch by epoch, and keep what timm keeps, and the best network as a folder.

        Raises:
            Stopped: The process got SIGTERM or SIGINT, and where it was is saved.
        """
        with self.stopper.listening():
            for epoch in range(self.start_epoch, self.last_epoch):
                self._fit_epoch(epoch, self.last_epoch)

    def _fit_epoch(self, epoch: int, last: int) -> None:
        args, trainer, journal = self.args, self.trainer, self.journal
        journal.begin_epoch()
        train_metrics = trainer.train_epoch(epoch, self.loader, self.start_batch)
        self.start_batch = 0
        journal.flush(trainer)
        rate, lr = trainer.images_per_second, trainer.learning_rate
        is_evaluated = (epoch + 1) % args.val_interval == 0 or epoch + 1 == last
        model, metrics = self._evaluate() if is_evaluated else (None, {})
        # Without an evaluation timm chooses by the training loss, if by a loss.
        is_by_training = self.loader_eval is None and args.eval_metric == 'loss'
        metric = train_metrics['loss'] if is_by_training else metrics.get(args.eval_metric)
        journal.note_epoch(epoch, train_metrics, metrics, lr)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)
        # From here on the run stands at the beginning of the next epoch.
        trainer.epoch, trainer.batch = epoch + 1, 0
        if is_evaluated:
            self.checkpoints.save_epoch(
                epoch, model, metric, data_config=self.data_config, label_names=self.label_names
            )
        else:
            self.checkpoints.save_unmeasured_epoch(epoch)
        journal.end_epoch(trainer, rate)
        if epoch + 1 < last and self.stopper.is_asked():
            raise Stopped(self.stopper.signal)

    def _evaluate(self) -> tuple[torch.nn.Module, dict[str, float]]:
        """Return the model that counts, the moving average if there is one, and its metrics as columns."""
        args, accelerator = self.args, self.accelerator
        uses_ema = args.model_ema and not args.model_ema_force_cpu
        if accelerator.num_processes > 1 and args.dist_bn in ('broadcast', 'reduce'):
            for is_ema in (False, True)[: 1 + uses_ema]:
                module = unwrap_model(self.task.get_trainable_module(ema=is_ema))
                distribute_bn(module, accelerator.num_processes, args.dist_bn == 'reduce')
        model = unwrap_model(self.task.get_eval_model(ema=uses_ema))
        if self.loader_eval is None:
            return model, {}
        return model, flatten_metrics(self._measure(model, self.loader_eval).metrics)

    def _measure(self, model: torch.nn.Module, loader: Any) -> Evaluation:
        args = self.args
        return evaluate_loader(
            model,
            loader,
            accelerator=self.accelerator,
            channels_last=args.channels_last,
            multi_label=args.task == 'multilabel',
            threshold=args.multilabel_threshold,
        )

    def _on_update(self, trainer: Trainer) -> None:
        args = self.args
        self.journal.note_step(trainer)
        update_idx = (trainer.batch - 1) // args.grad_accum_steps
        if args.save_images and self.accelerator.is_main_process and update_idx % args.log_interval == 0:
            save_image(trainer.images, self.output_dir / f'train-batch-{trainer.batch - 1}.jpg', normalize=True)
        if trainer.batch == len(self.loader):
            return  # the epoch is closed by its own checkpoint
        is_due = args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0
        is_asked = self.stopper.is_asked(trainer.num_updates)
        if is_due or is_asked:
            self.checkpoints.save_recovery()
        if is_asked:
            raise Stopped(self.stopper.signal)

    def close(self) -> None:
        """Let go of the loaders: left to the garbage collector each of their processes takes five seconds to end."""
        self.loader = self.loader_eval = None

    def report(self) -> None:
        """Print the table of the best network, write it beside the run, and list the best epochs as timm does."""
        self.accelerator.wait_for_everyone()
        best_epoch, folder = broadcast_object_list([self.checkpoints.best_epoch, str(self.output_dir)])
        if self.datasets[2] is not None and Path(folder, BEST_NAME).exists():
            report(
                self.args,
                self.accelerator,
                Path(folder),
                self.datasets[2],
                data_config=self.data_config,
                best_epoch=best_epoch,
                num_epochs=self.last_epoch,
            )
        if self.accelerator.is_main_process:
            # Nothing after these lines: timm's bulk tools read the rest of the output as JSON.
            rows = self.journal.best_epochs(self.args.eval_metric, is_decreasing=self.is_decreasing)
            print('--result\n[' + ',\n '.join(json.dumps(row) for row in rows) + ']', flush=True)


def choose_output_dir(args: Namespace) -> Path:
    """Return the folder of the run: a new one, or that of the checkpoint it goes on from.

    Raises:
        MultiExitError: It holds a run already.
    """
    if args.resume and args.resume != 'auto' and not (args.output or args.experiment):
        return Path(args.resume).parent
    size = (args.input_size or (args.img_size,))[-1]
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    name = args.experiment or '-'.join(str(part) for part in (stamp, safe_model_name(args.model), size) if part)
    path = Path(args.output or 'output/train', name)
    goes_on = args.resume == 'auto' or (args.resume and Path(args.resume).parent.resolve() == path.resolve())
    if not goes_on and RunFolder(path).holds_run:
        raise MultiExitError(f'{path} holds a run: name another --experiment, or go on with --resume auto.')
    return path
