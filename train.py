#!/usr/bin/env python3
"""Train a timm model, plain or with exits: `accelerate launch train.py --eed --data-dir DIR`.

Flags and files are timm's (`train.py --help`); Accelerate owns device, precision and distribution.
"""
import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import timm
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from timm.data import FastCollateMixup, Mixup, create_loader, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    distribute_bn,
    random_seed,
    setup_default_logging,
    trim_summary,
    unwrap_model,
    update_summary,
)

import timm_multiexit as tme
from timm_multiexit.arguments import parse_train_args
from timm_multiexit.checkpoint import load_checkpoint, save_pretrained
from timm_multiexit.data import check_classes, create_checked_dataset, create_eval_loader, loader_kwargs
from timm_multiexit.engine import EpochConfig, evaluate_loader, train_one_epoch
from timm_multiexit.factory import check_model_name, make_table
from timm_multiexit.losses import create_loss
from timm_multiexit.metrics import describe_environment, evaluation_columns, flatten_metrics
from timm_multiexit.model import MultiExitModel
from timm_multiexit.task import MultiExitTask

_logger = logging.getLogger('train')


@dataclass
class Run:
    """What a training run works with, once everything that can be wrong has been checked."""

    args: argparse.Namespace
    accelerator: Accelerator
    datasets: tuple
    data_config: dict
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    prepared_optimizer: AcceleratedOptimizer
    scheduler: Scheduler | None
    num_epochs: int
    loader: Iterable
    mixup_fn: Mixup | None
    loader_eval: Iterable | None
    output_dir: Path | None = None
    saver: CheckpointSaver | None = None
    start_epoch: int = 0


class ScalerState:
    """Accelerate's gradient scaler under the name that timm's checkpoints give it."""

    state_dict_key = 'amp_scaler'

    def __init__(self, scaler):
        self.state_dict = scaler.state_dict
        self.load_state_dict = scaler.load_state_dict


def create_accelerator(args):
    if args.amp and args.amp_dtype == 'float16' and not torch.cuda.is_available():
        raise tme.MultiExitError('--amp in float16 needs a GPU (on a CPU it would be float32): use --amp-dtype bfloat16.')
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None
    ddp = DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[ddp])
    launched = int(os.environ.get('WORLD_SIZE', 1))
    if launched != accelerator.num_processes:
        raise tme.MultiExitError(
            f'{launched} processes were launched and Accelerate runs {accelerator.num_processes}. On CPUs start with'
            f' ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {launched} train.py ...'
        )
    return accelerator


def create_datasets(args):
    """Return the data sets for training, for choosing the epoch and for the final table; the last two may be None."""
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    common = dict(
        root=args.data_dir,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
    )
    train = create_checked_dataset(args.dataset, split=args.train_split, is_training=True, seed=args.seed, **common)
    val = create_checked_dataset(args.dataset, split=args.val_split, **common) if args.val_split else None
    test = create_checked_dataset(args.dataset, split=args.test_split, **common) if args.test_split else val
    for other in (val, test):
        num_classes = check_classes(train, other)
    if num_classes and args.num_classes is None and not args.pretrained:
        args.num_classes = num_classes
    return (train, val, test), num_classes


def create_train_model(args, num_classes):
    """Return the model that the flags name, with exits if they ask for some."""
    check_model_name(args.model)
    kwargs = dict(
        pretrained=args.pretrained,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
        **args.model_kwargs,
    )
    # Models made for one image size (transformers) must be told another.
    img_size = resolve_model_input_args(args.model, vars(args), **args.model_kwargs).get('img_size')
    if img_size is not None:
        kwargs['img_size'] = img_size
    if args.exits is None:
        model = timm.create_model(args.model, **kwargs)
    else:
        size = args.input_size or (args.img_size and (args.in_chans or 3, args.img_size, args.img_size))
        model = tme.create_model(
            args.model, exits=args.exits, head=args.exit_head, head_widths=args.head_widths, input_size=size, **kwargs)
        if args.exit_projectors:
            model.add_projectors()
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if args.resume:
        load_checkpoint(model, args.resume, use_ema=False)
    args.num_classes = model.num_classes
    if num_classes and num_classes > args.num_classes:
        raise tme.MultiExitError(f'The data has {num_classes} classes, the model {args.num_classes}: set --num-classes.')
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def create_task(args, model, device):
    uses_mixup = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    criterion = create_classification_loss(smoothing=args.smoothing, soft_targets=uses_mixup)
    if not isinstance(model, MultiExitModel):
        return ClassificationTask(model, criterion, device=device, verbose=False)
    loss = create_loss(
        args.exit_loss,
        output_loss=args.exit_output_loss,
        output_weight=args.exit_output_weight,
        feature_weight=args.exit_feature_weight,
        temperature=args.exit_temperature,
        criterion=criterion,
    )
    return MultiExitTask(model, loss, device=device, verbose=False)


def create_train_loader(args, dataset, data_config, accelerator, *, mixing):
    """Return the loader for training, and the function that mixes its batches if the loader does not."""
    collate_fn = mixup_fn = None
    if args.mixup or args.cutmix or args.cutmix_minmax:
        mixer = Mixup if args.no_prefetcher else FastCollateMixup
        mixer = mixer(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        mixer.mixup_enabled = mixing
        collate_fn, mixup_fn = (None, mixer) if args.no_prefetcher else (mixer, None)
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=interpolation or data_config['interpolation'],
        worker_seeding=args.worker_seeding,
        collate_fn=collate_fn,
        **loader_kwargs(args, data_config, accelerator),
    )
    if len(loader) == 0:
        raise tme.MultiExitError(f'{len(dataset)} training images do not fill one batch of {args.batch_size}.')
    return loader, mixup_fn


def create_train_optimizer(args, model, accelerator):
    if args.lr is None:
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        ratio = args.batch_size * accelerator.num_processes * args.grad_accum_steps / args.lr_base_size
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def create_output_dir(args, data_config):
    """Return the folder of the run: a new one, or that of the checkpoint it goes on from."""
    if args.resume and not (args.output or args.experiment):
        return Path(args.resume).parent
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    path = Path(args.output or 'output/train', name)
    if not args.resume and (path / 'summary.csv').exists():
        raise tme.MultiExitError(f'{path} holds a run: name another --experiment, or go on with --resume {path}/last.pth.tar.')
    path.mkdir(parents=True, exist_ok=True)
    return path


def set_up(args, accelerator):
    """Return the run, with nothing written yet."""
    datasets, num_classes = create_datasets(args)
    if args.is_demo:
        _logger.info(
            'No data named (--data-dir, --dataset): training on the handwritten digits that come with scikit-learn,'
            f' {len(datasets[0])} images, with {args.model} and settings made for them.')
    model = create_train_model(args, num_classes)
    columns = evaluation_columns(len(model.exits) if isinstance(model, MultiExitModel) else 0)
    if args.eval_metric not in columns:
        raise tme.MultiExitError(f"--eval-metric is '{args.eval_metric}', allowed are {', '.join(columns)}.")
    data_config = resolve_data_config(vars(args), model=model)
    if args.sync_bn and accelerator.num_processes > 1:
        args.dist_bn = ''
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    task = create_task(args, model, accelerator.device)
    optimizer = create_train_optimizer(args, model, accelerator)
    loader, mixup_fn = create_train_loader(args, datasets[0], data_config, accelerator, mixing=True)
    loader_eval = create_eval_loader(args, datasets[1], data_config, accelerator) if datasets[1] else None
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=is_decreasing(args.eval_metric)),
        updates_per_epoch=num_updates(args, loader),
    )
    # The copy before anything is wrapped, so that neither compiled nor prepared forwards are copied.
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        torch._dynamo.config.recompile_limit = 64  # one forward serves several modes and batch sizes
        model.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    task.trainable_module, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Run(
        args, accelerator, datasets, data_config, task, optimizer, prepared_optimizer, scheduler, num_epochs,
        loader, mixup_fn, loader_eval)


def open_output(run):
    """Make the folder of the run, or go on in that of a checkpoint."""
    args, accelerator = run.args, run.accelerator
    scaler = ScalerState(accelerator.scaler) if accelerator.scaler else None
    if accelerator.is_main_process:
        run.output_dir = create_output_dir(args, run.data_config)
        run.saver = CheckpointSaver(
            model=unwrap_model(run.task.trainable_module),
            optimizer=run.optimizer,
            args=args,
            task=run.task,
            amp_scaler=scaler,
            checkpoint_dir=str(run.output_dir),
            decreasing=is_decreasing(args.eval_metric),
            max_history=args.checkpoint_hist,
        )
    if args.resume:
        optimizer = None if args.no_resume_opt else run.optimizer
        run.start_epoch = resume_task_checkpoint(
            run.task, args.resume, optimizer=optimizer, loss_scaler=scaler, log_info=False) or 0
        if args.model_ema:
            load_task_ema_checkpoint(run.task, args.resume)
        if run.saver and Path(args.resume).parent == run.output_dir:
            run.saver.load_state_dict_from_checkpoint(args.resume)
    if args.start_epoch is not None:
        run.start_epoch = args.start_epoch
    if run.scheduler is not None and run.start_epoch > 0:
        run.scheduler.step(run.start_epoch)
        run.scheduler.step_update(run.start_epoch * num_updates(args, run.loader))
    if run.output_dir:
        (run.output_dir / 'args.yaml').write_text(yaml.safe_dump(vars(args), default_flow_style=False))
        trim_summary(run.output_dir / 'summary.csv', run.start_epoch)


def fit(run):
    """Train and evaluate epoch by epoch, and keep what timm keeps, and the best network as a folder."""
    args = run.args
    config = EpochConfig(
        epochs=run.num_epochs,
        grad_accum_steps=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        log_interval=args.log_interval,
        channels_last=args.channels_last,
    )
    for epoch in range(run.start_epoch, run.num_epochs):
        if args.mixup_off_epoch and epoch == max(args.mixup_off_epoch, run.start_epoch):
            # Made anew: persistent workers hold a copy of the mixing collate that no flag reaches.
            run.loader, run.mixup_fn = create_train_loader(
                args, run.datasets[0], run.data_config, run.accelerator, mixing=False)
        if hasattr(run.loader.sampler, 'set_epoch'):
            run.loader.sampler.set_epoch(epoch)
        lr = run.optimizer.param_groups[0]['lr']
        train_metrics = train_one_epoch(
            epoch, run.task, run.loader, run.prepared_optimizer,
            accelerator=run.accelerator, config=config, scheduler=run.scheduler, mixup_fn=run.mixup_fn)
        model, metrics = evaluate_epoch(run)
        metric = metrics.get(args.eval_metric)
        if metrics:
            _logger.info(f'Eval  {epoch + 1:>3}/{run.num_epochs}  {format_top1(metrics)}')
        if run.saver:
            update_summary(epoch, train_metrics, metrics, run.output_dir / 'summary.csv', lr=lr)
            _, best_epoch = run.saver.save_checkpoint(epoch, metric=metric)
            if best_epoch in (epoch, None):
                save_pretrained(model, run.output_dir / 'best', data_config=run.data_config)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)


def evaluate_epoch(run):
    """Return the model that counts, the moving average if there is one, and its metrics as columns."""
    args, accelerator = run.args, run.accelerator
    model = unwrap_model(run.task.get_trainable_module(ema=True) if args.model_ema else run.task.trainable_module)
    if accelerator.num_processes > 1 and args.dist_bn in ('broadcast', 'reduce'):
        distribute_bn(model, accelerator.num_processes, args.dist_bn == 'reduce')
    if run.loader_eval is None:
        return model, {}
    result = evaluate_loader(model, run.loader_eval, accelerator=accelerator, channels_last=args.channels_last)
    return model, flatten_metrics(result.metrics)


def report(run):
    """Load the best network from its folder, print its table and write it beside the run."""
    args, accelerator = run.args, run.accelerator
    accelerator.wait_for_everyone()
    folder = broadcast_object_list([str(run.output_dir)])[0]
    best = load_best(args, f'{folder}/best').to(accelerator.device)
    if run.datasets[2] is None:
        return
    loader = create_eval_loader(args, run.datasets[2], run.data_config, accelerator)
    result = evaluate_loader(best, loader, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    is_chosen_here = args.test_split in (None, args.val_split)
    split = args.test_split or args.val_split
    table = make_table(
        best, result.metrics, input_size=run.data_config['input_size'], num_samples=result.num_samples)
    chosen = '' if run.saver.best_epoch is None else f', epoch {run.saver.best_epoch + 1} of {run.num_epochs}'
    chosen += f' chosen by {args.eval_metric} on this split' if is_chosen_here else (
        f' chosen by {args.eval_metric} on the {args.val_split} split')
    print(f'\n{args.model} on the {split} split, {table.num_samples} images{chosen}:\n\n{table}\n\n'
          f'{folder}/best is the network: create_model("local-dir:{folder}/best", pretrained=True)', flush=True)
    results = dict(
        split=split, num_samples=table.num_samples, epoch_chosen_on=args.val_split, best_epoch=run.saver.best_epoch,
        rows=table.rows, seed=args.seed, command=sys.argv, **describe_environment())
    (run.output_dir / 'results.json').write_text(json.dumps(results, indent=2) + '\n')


def load_best(args, folder):
    if args.exits is not None:
        return tme.create_model(f'local-dir:{folder}', pretrained=True)
    return MultiExitModel(timm.create_model(f'local-dir:{folder}', pretrained=True), [])


def format_top1(metrics):
    names = {key: key.removesuffix('top1').strip('_') or 'main' for key in metrics if key.endswith('top1')}
    return ' | '.join(f'{name} {metrics[key]:.2f}%' for key, name in names.items())


def num_updates(args, loader):
    return -(-len(loader) // args.grad_accum_steps)


def is_decreasing(metric):
    return metric.endswith(('loss', 'ece'))


def main(argv=None):
    setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files every epoch
    try:
        args = parse_train_args(argv)
        accelerator = create_accelerator(args)
        if not accelerator.is_main_process:
            logging.disable(logging.WARNING)
        random_seed(args.seed, accelerator.process_index)
        run = set_up(args, accelerator)
        open_output(run)
        fit(run)
        report(run)
    except tme.MultiExitError as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    accelerator.end_training()
    return 0


if __name__ == '__main__':
    sys.exit(main())
