"""Train a timm model, plain or with exits: `accelerate launch train.py --eed --data-dir DIR`.

Flags and files are timm's (`train.py --help`); Accelerate owns device, precision and distribution.
"""

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data.config import resolve_data_config
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model

from timm_multiexit.checkpoints.run_folder import RunFolder, read_origin
from timm_multiexit.checkpoints.source import find_source
from timm_multiexit.cli.build_model import (
    check_takes_images,
    create_regime,
    create_train_model,
    place_model,
    synchronizes_norms,
)
from timm_multiexit.cli.build_training import (
    create_datasets,
    create_run_data,
    create_task,
    create_train_optimizer,
    resolve_lr,
)
from timm_multiexit.cli.flags.parser import option_name
from timm_multiexit.cli.flags.resume_rules import check_changes, format_changes
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.launch import create_accelerator, setup_logging, warn_of_workers
from timm_multiexit.cli.sharding import check_flags, shard_task, share_weights
from timm_multiexit.evaluation.metrics import evaluation_columns
from timm_multiexit.hub_client.client import check_push
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.licenses import PublicationInfo, find_license
from timm_multiexit.publishing.push import publish_run
from timm_multiexit.training.regimes import Regime, RegimeControl
from timm_multiexit.training.resume import find_resume, read_position, read_resume
from timm_multiexit.training.run import RunConfig, RunData, TrainingRun
from timm_multiexit.training.trackers import TrackerConfig, check_trackers
from timm_multiexit.training.trainer import Trainer, TrainerConfig
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError, one_line
from timm_multiexit.utils.signals import Stopped

_logger = logging.getLogger(__name__)

_Config = TypeVar('_Config', RunConfig, TrainerConfig)


def main(argv: Sequence[str] | None = None, prog: str = 'train.py') -> int:
    """Run the command line and return the exit code: 0, 2 for an error of one line, 128 + N after signal N."""
    setup_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files every epoch
    run, code = None, 0
    try:
        args = parse_train_args(argv, prog)
        accelerator = create_accelerator(args)
        logging.disable(logging.NOTSET if accelerator.is_main_process else logging.WARNING)
        warn_of_workers(args.workers)
        run = build_run(args, accelerator)
        run.open()
        _log_start(args, run)
        _warn_of_warmup(args, run.trainer.regime)
        run.fit()
        run.report()
    except MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        code = 128 + stopped.signal
        if run is not None and accelerator.is_main_process:
            where = ['--resume', 'auto', '--output', str(run.folder.parent), '--experiment', run.folder.name]
            print(f'{prog}: stopped, continue with {shlex.join(where)}', file=sys.stderr)
    finally:
        if run is not None:
            run.close()
    # Together: a process that leaves while others still talk to it takes them along.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if code == 0 and run is not None and args.push_to_hub and accelerator.is_main_process:
        code = publish(args, run.folder, prog)
    return code


def build_run(args: Namespace, accelerator: Accelerator) -> TrainingRun:
    """Return the run that the flags describe. All that can be wrong is checked, and nothing is written."""
    check_trackers(args.log_with)
    if accelerator.is_fsdp2:
        check_flags(args)
    if args.resume and args.resume != 'auto':
        read_resume(args.resume)  # before the folder that follows from it is asked
    folder = choose_output_dir(args)
    resume = _find_resume(args, folder)
    resumed = {} if resume is None else read_resume(resume)
    is_untrained = not (args.pretrained or args.initial_checkpoint or resume)
    if args.freeze_bn_stats and is_untrained:
        raise InvalidValueError(
            '--freeze-bn-stats keeps the statistics of trained weights, of which --resume auto found none: add'
            ' --pretrained or --initial-checkpoint.'
        )
    random_seed(args.seed, accelerator.process_index)
    datasets, num_classes = create_datasets(args)
    if args.is_demo:
        _logger.info(
            'No data named (--data-dir, --dataset): training on the handwritten digits that come with scikit-learn,'
            f' {len(datasets[0])} images, with {args.model} and settings made for them.'
        )
    source = find_source(args.model, **args.model_kwargs)
    model = create_train_model(args, source, num_classes=num_classes, resume=resume)
    origin = _find_origin(args, model, resumed)
    check_publishing(args, origin, has_table=datasets[2] is not None, asks_hub=accelerator.is_main_process)
    _check_metric(args, model)
    data_config = resolve_data_config(vars(args), model=model)
    regime = create_regime(args, model, source)
    if regime.name == 'frozen':
        if is_untrained:
            _logger.warning(
                'The backbone stays as it is, and it is not trained: add --pretrained or --initial-checkpoint.'
            )
        model.freeze_backbone(trains_classifier=regime.trains_classifier)
    check_takes_images(model, data_config['input_size'])
    model = place_model(args, model, accelerator)
    if accelerator.is_fsdp2:
        share_weights(model)
    if args.kd_model_name:
        # Where the tasks look for how the student's images are normalized.
        model.pretrained_cfg.update(mean=data_config['mean'], std=data_config['std'])
    task = create_task(args, model, accelerator.device)
    data, mixup_fn = create_run_data(args, datasets, data_config, accelerator, num_classes=model.num_classes)
    batch_size = getattr(data.train_loader.loader.batch_sampler, 'average_batch_size', args.batch_size)
    lr, lr_base_scale = resolve_lr(args, batch_size, accelerator.num_processes)
    # What the run makes of its flags is stored with them, under the same names.
    resolved = {
        'model': args.model if source is None else source.name,  # of the Hub with its commit
        'num_classes': model.num_classes,
        'lr': lr,
        'lr_base_scale': lr_base_scale,
        'dist_bn': '' if synchronizes_norms(args, accelerator) else args.dist_bn,
        'origin': None if origin is None else origin.to_dict(),
    }
    record = Namespace(**vars(args) | resolved)
    if resume is not None:
        _note_changes(record, resumed, resume, folder)
    config = _run_config(record, resume)
    trainer = _create_trainer(
        record, config, task, data, accelerator, regime=regime, batch_size=batch_size, mixup_fn=mixup_fn
    )
    run = TrainingRun(task, trainer, data=data, config=config, record=record, folder=folder)
    _check_epochs(args, run, resumed)
    return run


def choose_output_dir(args: Namespace) -> Path:
    """Return the folder of the run: a new one, or that of the checkpoint it is resumed from."""
    if args.resume and args.resume != 'auto' and not (args.output or args.experiment):
        return Path(args.resume).parent
    size = (args.input_size or (args.img_size,))[-1]
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    name = args.experiment or '-'.join(str(part) for part in (stamp, safe_model_name(args.model), size) if part)
    path = Path(args.output or 'output/train', name)
    _check_folder(path)
    is_resumed = args.resume == 'auto' or (args.resume and Path(args.resume).parent.resolve() == path.resolve())
    if not is_resumed and RunFolder(path).holds_run:
        raise InvalidValueError(f'{path} holds a run: name another --experiment, or resume it with --resume auto.')
    return path


def _check_folder(path: Path) -> None:
    """Raise if a path cannot be a folder."""
    try:
        # Each is looked for by itself: of a path below a file the system says only that it does not exist.
        found = next((part for part in (path, *path.parents) if part.exists()), None)
    except OSError as error:
        raise InvalidValueError(
            f'--output and --experiment must name a folder, got {path}: {one_line(error)}.'
        ) from error
    if found is not None and not found.is_dir():
        raise InvalidValueError(f'--output and --experiment must name a folder, got {path}: {found} is a file.')


def _find_resume(args: Namespace, folder: Path) -> Path | None:
    path = args.resume
    if path == 'auto':
        path = find_resume(folder)
        _logger.info(f'Resuming from {path}.' if path else f'Nothing to resume in {folder}: a new run.')
    return Path(path) if path else None


def _find_origin(args: Namespace, model: Any, resumed: Mapping[str, Any]) -> Origin | None:
    """Return what the weights started from, and note it on the model; of a resumed run what its first part did."""
    if not isinstance(model, MultiExitModel):
        return None
    if resumed:
        model.origin = read_origin(vars(_args_of(resumed)))
    elif args.initial_checkpoint:
        model.origin = Origin('a file')
    return model.origin


def _args_of(checkpoint: Mapping[str, Any]) -> Namespace:
    """Return the flags that a checkpoint was written with, none if it does not say."""
    found = checkpoint.get('args')
    return found if isinstance(found, Namespace) else Namespace()


def _note_changes(record: Namespace, resumed: Mapping[str, Any], resume: Path, folder: Path) -> None:
    """Say and record which flags are other ones than those of the checkpoint, in so far as they change what is learnt.

    Raises:
        InvalidValueError: They change what the run minimises.
    """
    before = _args_of(resumed)
    is_own = resume.parent.resolve() == folder.resolve()
    changes = check_changes(record, before, resume, is_own=is_own)
    history = getattr(before, 'resumed', None)
    record.resumed = list(history) if isinstance(history, list) else []
    if changes:
        epoch = read_position(resumed)[0]
        _logger.warning(f'Other flags than before from epoch {epoch + 1} on: {format_changes(changes)}.')
        record.resumed.append({'epoch': epoch, 'checkpoint': str(resume), 'changed': changes})
    if not record.resumed:
        del record.resumed


def _check_epochs(args: Namespace, run: TrainingRun, resumed: Mapping[str, Any]) -> None:
    """Raise if more epochs are done than the run is to have."""
    done, flag = args.start_epoch, f'--start-epoch {args.start_epoch}'
    if done is None:
        done, flag = read_position(resumed)[0], f'{run.config.resume} has done'
    if done > run.num_epochs:
        name = '--epochs' if args.stop_epoch is None else '--stop-epoch'
        raise InvalidValueError(f'{name} must be >= {done}, as {flag}, got {run.num_epochs} in all.')


def _check_metric(args: Namespace, model: Any) -> None:
    num_exits = len(model.exits) if isinstance(model, MultiExitModel) else 0
    columns = evaluation_columns(num_exits, multi_label=args.task == 'multilabel')
    if args.eval_metric not in columns:
        raise InvalidValueError(f"--eval-metric must be one of {', '.join(columns)}, got '{args.eval_metric}'.")


def _create_trainer(
    args: Namespace,
    run_config: RunConfig,
    task: TrainingTask,
    data: RunData,
    accelerator: Accelerator,
    *,
    regime: Regime,
    batch_size: float,
    mixup_fn: Any,
) -> Trainer:
    module: Any = task.get_trainable_module()
    if data.val_loader is None and args.sched == 'plateau' and args.eval_metric != 'loss':
        raise InvalidValueError(
            f'--sched plateau follows {args.eval_metric}, which no split measures: add --val-split.'
        )
    optimizer = create_train_optimizer(args, module, regime, lr=args.lr)
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=run_config.is_decreasing),
            updates_per_epoch=-(-len(data.train_loader) // args.grad_accum_steps),
        )
    except (AssertionError, ValueError) as error:
        raise InvalidValueError(f'Cannot create --sched {args.sched}: {str(error).rstrip(".")}.') from error
    # The copy before anything is wrapped, so that neither compiled nor prepared forwards are copied.
    if args.model_ema:
        device = torch.device('cpu') if args.model_ema_force_cpu else None
        # Sharded parameters cannot be averaged in one go with the buffers, which are whole.
        kwargs = {'foreach': False} if accelerator.is_fsdp2 else {}
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device, **kwargs)
    if args.torchcompile:
        torch._dynamo.config.recompile_limit = 64  # one forward serves several modes and batch sizes
        module.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        broadcast_buffers=not args.no_ddp_bb, find_unused_parameters=regime.changes
    )
    if accelerator.is_fsdp2:
        prepared = shard_task(task, optimizer, accelerator)
    else:
        task.trainable_module, prepared = accelerator.prepare(task.trainable_module, optimizer)
    config = _pick(
        TrainerConfig,
        args,
        epochs=num_epochs,
        multi_label=args.task == 'multilabel',
        loss_scale=args.variable_batch_loss_scale if args.train_img_sizes else 'none',
        batch_size=batch_size,
        synchronize=args.synchronize_step,
        shows_progress=args.progress and accelerator.is_main_process,
    )
    control = RegimeControl(regime, task, optimizer)
    return Trainer(
        task, prepared, accelerator=accelerator, config=config, scheduler=scheduler, mixup_fn=mixup_fn, regime=control
    )


def _run_config(args: Namespace, resume: Path | None) -> RunConfig:
    return _pick(
        RunConfig,
        args,
        evaluates_ema=args.model_ema and not args.model_ema_force_cpu,
        save_epochs=tuple(args.save_epochs or ()),
        resume=resume,
        resumes_optimizer=not args.no_resume_opt,
        trackers=TrackerConfig(
            tuple(args.log_with or ()), args.wandb_project, tags=args.wandb_tags, resume_id=args.wandb_resume_id
        ),
    )


def _pick(config: type[_Config], args: Namespace, **changed: Any) -> _Config:
    """Return a config whose fields are the flags of the same name, and what `changed` has in their place."""
    own = {field.name: getattr(args, field.name) for field in fields(config) if hasattr(args, field.name)}
    return config(**own | changed)


def _log_start(args: Namespace, run: TrainingRun) -> None:
    """Log what is about to be trained, in one line."""
    model, accelerator = unwrap_model(run.task.get_eval_model()), run.accelerator
    counts = f'{sum(param.numel() for param in model.parameters()) / 1e6:.2f}M parameters'
    if isinstance(model, MultiExitModel):
        counts += f', exits at {", ".join(spec.module for spec in model.exits.specs)} by {args.exit_loss}'
    if run.start_epoch >= run.num_epochs:
        found = 'only the table of its best network is measured again'
        if not RunFolder(run.folder).best.exists():
            found = 'and there is nothing to measure'
        _logger.info(
            f'All {run.num_epochs} epochs of {run.folder} are done, nothing is trained: {found}. Give more --epochs to'
            ' train on.'
        )
        return
    precision = accelerator.mixed_precision.replace('no', args.model_dtype or 'float32')
    _logger.info(
        f'{run.record.model} ({counts}) on {len(run.data.train_loader.loader.dataset)} images,'
        f' {args.opt} at {run.record.lr:.2e}, {args.sched}, epochs {run.start_epoch + 1} to {run.num_epochs}'
        f' of {run.updates_per_epoch} updates, {precision} on {accelerator.num_processes} x {accelerator.device.type},'
        f' into {run.folder}'
    )


def _warn_of_warmup(args: Namespace, control: RegimeControl | None) -> None:
    """Warn where the learning rate, or what trains, does not get to where it shall within the epochs."""
    regime = control.regime if control and args.exits is not None else Regime()
    if regime.changes and regime.joint_from >= args.epochs:
        _logger.warning(
            f'The heads train alone until epoch {regime.joint_from:g} of {args.epochs}: the backbone never trains with'
            ' them, and nothing is distilled. Add --epochs, or --head-warmup-epochs 0.'
        )
    is_warming_up = args.sched != 'none' and args.warmup_epochs > 0 and not args.warmup_prefix
    if is_warming_up and args.warmup_epochs >= args.epochs:
        _logger.warning(
            f'--warmup-epochs {args.warmup_epochs} is not shorter than the run of --epochs {args.epochs}: the learning'
            f' rate never gets to its value, and little is learnt. Add --warmup-epochs {args.epochs // 5}.'
        )


def check_publishing(args: Namespace, origin: Origin | None, *, has_table: bool, asks_hub: bool) -> None:
    """Raise before a run begins for what would keep it from being published at its end."""
    if not args.push_to_hub:
        for dest in ('hub_private', 'hub_license'):
            if getattr(args, dest):
                raise InvalidValueError(f'{option_name(dest)} requires --push-to-hub ORG/NAME.')
        return
    if origin is None:
        raise InvalidValueError('--push-to-hub publishes networks with exits: add --eed or --exits.')
    if not has_table:
        raise InvalidValueError('--push-to-hub needs results to publish: add --val-split or --test-split.')
    find_license(origin, PublicationInfo(args.hub_license))
    if asks_hub:
        check_push(args.push_to_hub, private=args.hub_private)


def publish(args: Namespace, folder: Path, prog: str) -> int:
    """Publish a finished run as its flags say, and return the exit code.

    It comes last of all, when no other process waits for this one.
    """
    try:
        result = publish_run(folder, args.push_to_hub, info=PublicationInfo(args.hub_license), private=args.hub_private)
        _logger.info(f'Published: {result.url}')
    except MultiExitError as error:
        again = ['timm-multiexit', 'publish', str(folder), args.push_to_hub, '--yes', *['--private'] * args.hub_private]
        again += ['--license', args.hub_license] if args.hub_license else []
        print(
            f'{prog}: error: The run in {folder} is complete, but was not published: {error} Try again with'
            f' {shlex.join(again)}',
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
