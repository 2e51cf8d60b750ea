"""What cannot be asked of a training run: flags that contradict each other, or what this script has not."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights
from timm.optim import list_optimizers

from timm_multiexit.cli.flags.parser import Flag, check_ranges, listed, option_name
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.utils.errors import MultiExitError

# Keywords that the flags fill already, and by which.
_MODEL_KEYS = {
    'pretrained': '--pretrained',
    'in_chans': '--in-chans',
    'num_classes': '--num-classes',
    'global_pool': '--gp',
    'drop_rate': '--drop',
    'drop_path_rate': '--drop-path',
    'drop_block_rate': '--drop-block',
    'bn_momentum': '--bn-momentum',
    'bn_eps': '--bn-eps',
    'checkpoint_path': '--initial-checkpoint',
    'exits': '--exits',
    'head': '--exit-head',
    'head_widths': '--exit-widths',
}

_OPT_KEYS = {'opt': '--opt', 'lr': '--lr', 'weight_decay': '--weight-decay', 'momentum': '--momentum'}


def is_mixing(args: Namespace) -> bool:
    """Return whether batches are mixed, so that targets are soft."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def _distils_softmax(args: Namespace) -> bool:
    if args.exits is None:
        return False
    row = LOSSES[args.exit_loss]
    distance = args.exit_output_loss or row.get('output_loss', 'kl')
    return bool(args.exit_teacher or row.get('teacher')) and distance == 'kl' and args.exit_output_weight != 0


def _lacks_sizes(args: Namespace) -> bool:
    return args.train_img_sizes is None and (
        args.train_batch_sizes is not None
        or args.train_size_probs is not None
        or args.train_batches_per_epoch is not None
        or args.train_size_schedule == 'progressive'
    )


# A claim about the arguments that must not hold, and the line to print where it does.
TRAIN_RULES: tuple[tuple[Callable[[Namespace], Any], str], ...] = (
    (lambda a: a.torchscript, '--torchscript is not in this script (torch.jit is deprecated): use --torchcompile.'),
    (lambda a: a.naflex_loader, "--naflex-loader is not in this script: use timm's own train.py."),
    (lambda a: a.fuser, "--fuser is '{fuser}', this script has none (fusers are TorchScript's): use --torchcompile."),
    (lambda a: a.tta > 1, '--tta is {tta}, allowed are 0 and 1, because no loader repeats images: leave it out.'),
    (
        lambda a: a.device not in ('cuda', 'cpu'),
        "--device is '{device}', allowed are cuda (what Accelerate finds) and cpu: choose GPUs with"
        ' CUDA_VISIBLE_DEVICES or accelerate launch.',
    ),
    (
        lambda a: a.amp and a.model_dtype not in (None, 'float32'),
        '--amp needs weights in float32, --model-dtype is {model_dtype}: leave one of them out.',
    ),
    (
        lambda a: a.kd_distill_type != 'logit' and a.exits is not None,
        '--kd-distill-type {kd_distill_type} does not go with exits, allowed is logit: change it or train without.',
    ),
    (
        lambda a: a.task == 'multilabel' and a.kd_model_name,
        '--kd-model-name distils by softmax, which --task multilabel has not: leave one of them out.',
    ),
    (
        lambda a: a.task == 'multilabel' and _distils_softmax(a),
        "--exit-loss {exit_loss} distils by softmax's KL, which --task multilabel has not: add --exit-output-loss mse"
        ' or bernoulli.',
    ),
    (
        lambda a: a.task == 'multilabel' and a.dataset in ('', 'digits'),
        '--task multilabel needs a --dataset with several labels per image, of hfds/, hfids/, tfds/ or wds/.',
    ),
    (
        lambda a: a.task != 'multilabel' and a.target_format == 'multihot',
        '--target-format multihot needs --task multilabel: add it, or leave the format out.',
    ),
    (lambda a: a.aug_splits == 1, '--aug-splits is 1, allowed are 0 and integers from 2.'),
    (
        lambda a: a.loss == 'jsd' and a.aug_splits < 2,
        '--loss jsd (--jsd-loss) compares augmentation splits, --aug-splits is {aug_splits}: add --aug-splits 3.',
    ),
    (lambda a: a.aug_splits and is_mixing(a), '--aug-splits does not go with --mixup or --cutmix: leave one out.'),
    (lambda a: a.aug_splits and a.no_aug, '--aug-splits needs augmentation: leave --no-aug out.'),
    (lambda a: a.aug_splits and a.no_prefetcher, '--aug-splits needs the prefetcher: leave --no-prefetcher out.'),
    (
        lambda a: a.crop_padding and (a.no_aug or a.aug_splits or a.train_crop_mode or a.train_img_sizes is not None),
        '--crop-padding is a crop of its own: leave out --no-aug, --aug-splits, --train-crop-mode, --train-img-sizes.',
    ),
    (
        lambda a: a.split_bn and not (a.aug_splits or a.resplit),
        '--split-bn needs augmentation splits, --aug-splits is 0: add --aug-splits 2 or more.',
    ),
    (lambda a: a.split_bn and a.sync_bn, '--split-bn and --sync-bn contradict each other: give one of them.'),
    (
        lambda a: is_mixing(a) and a.batch_size % 2,
        '--batch-size is {batch_size}, --mixup and --cutmix take pairs of images: give an even one.',
    ),
    (
        lambda a: is_mixing(a) and a.mixup_mode == 'half' and a.no_prefetcher,
        '--mixup-mode half needs the prefetcher: leave --no-prefetcher out, or use batch, pair or elem.',
    ),
    (
        lambda a: a.train_img_sizes is not None and (a.use_multi_epochs_loader or a.aug_splits),
        '--train-img-sizes does not go with --use-multi-epochs-loader or --aug-splits: leave one out.',
    ),
    (
        _lacks_sizes,
        '--train-batch-sizes, --train-size-probs, --train-batches-per-epoch and --train-size-schedule progressive'
        ' need sizes: add --train-img-sizes.',
    ),
    (
        lambda a: any(
            sizes is not None and len(sizes) != len(a.train_img_sizes)
            for sizes in (a.train_batch_sizes, a.train_size_probs)
        ),
        '--train-batch-sizes and --train-size-probs need one number for each of --train-img-sizes {train_img_sizes}.',
    ),
    (
        lambda a: a.train_size_probs is not None and not sum(a.train_size_probs),
        '--train-size-probs is {train_size_probs}, allowed are numbers from 0 with one above: change it.',
    ),
    (
        lambda a: a.train_size_schedule == 'progressive' and len(a.train_img_sizes) < 2,
        '--train-size-schedule progressive needs two sizes, --train-img-sizes is {train_img_sizes}: add one.',
    ),
    (
        lambda a: a.wandb_resume_id and not a.resume,
        '--wandb-resume-id goes on with a run of wandb, --resume is empty: name the checkpoint too.',
    ),
    (
        lambda a: a.resume == 'auto' and not a.experiment,
        '--resume auto looks for the run in the folder of --experiment, which is empty: name it.',
    ),
    (
        lambda a: a.regime != 'mixed' and a.backbone_epochs is not None,
        '--backbone-epochs needs --regime mixed: add it, or leave the epochs out.',
    ),
    (
        lambda a: a.backbone_epochs is not None and a.backbone_epochs >= a.epochs,
        '--backbone-epochs is {backbone_epochs}, allowed are integers below --epochs {epochs}: the heads join then.',
    ),
    (
        lambda a: a.regime == 'frozen' and a.head_warmup_epochs,
        '--regime frozen trains the heads alone all the time: leave --head-warmup-epochs out.',
    ),
    (
        lambda a: a.exit_weights is not None and not any(a.exit_weights),
        '--exit-weights are all 0: give at least one classifier a weight.',
    ),
)


def check_args(args: Namespace, exit_flags: Iterable[Flag]) -> None:
    """Raise where the arguments of a training run cannot be met.

    Args:
        args: All of them, with `timm_multiexit.arguments.resolve` done.
        exit_flags: Those that mean nothing without exits.

    Raises:
        MultiExitError: One line that names the flag, its value and what is allowed.
    """
    check_ranges(args)
    if args.exits is None:
        for flag in exit_flags:
            if getattr(args, flag.dest) != flag.default:
                raise MultiExitError(f'{flag.names} needs exits: add --exits or --exit-loss.')
    for is_refused, line in TRAIN_RULES:
        if is_refused(args):
            raise MultiExitError(line.format_map(vars(args)))
    _check_schedule(args)
    _check_names(args)
    _check_keywords(args)
    loss_kwargs(args)


def loss_kwargs(args: Namespace, num_classes: int | None = None) -> dict[str, Any]:
    """Return what `timm.loss.create_classification_loss` takes, as the flags ask for it.

    Args:
        args: Of a training run.
        num_classes: Of the model, where it is known: weights by class must be as many.

    Raises:
        MultiExitError: The loss does not take what the other flags say, or a file of weights is of no use.
    """
    kwargs = {
        'loss_type': args.loss,
        'multi_label': args.task == 'multilabel',
        'smoothing': args.smoothing,
        'soft_targets': is_mixing(args),
        'bce_target_thresh': args.bce_target_thresh,
        'bce_sum': args.bce_sum,
    }
    if args.loss == 'poly':
        kwargs |= {'poly_epsilon': args.poly_epsilon, 'poly_gamma': args.poly_gamma}
    elif args.loss == 'jsd':
        kwargs |= {'jsd_splits': args.aug_splits}
    kwargs |= _loss_weights(args)
    try:
        create_classification_loss(**kwargs)
    except ValueError as error:
        raise MultiExitError(f'--loss {args.loss or "by default"}: {error}') from error
    for name in ('class_weight', 'pos_weight', 'class_counts'):
        count = getattr(kwargs.get(name), 'numel', lambda: 1)()
        if num_classes and count not in (1, num_classes):
            raise MultiExitError(f'The {name} of the loss has {count} numbers, the model {num_classes} classes.')
    return kwargs


def _loss_weights(args: Namespace) -> dict[str, Any]:
    """Return the weights of classes, given or from the counts of a file."""
    flag, weights = 'class_stats', {}
    try:
        stats = load_class_stats(args.class_stats)
        for flag in ('loss_class_weight', 'loss_pos_weight'):
            kind = flag.removeprefix('loss_')
            weights[kind] = resolve_class_weights(getattr(args, flag), kind, stats, power=args.loss_weight_power)
    except (ValueError, TypeError, OSError) as error:
        line = ' '.join(str(error).split())
        raise MultiExitError(f"{option_name(flag)} is '{getattr(args, flag)}' and cannot be read: {line}") from error
    if args.loss == 'db' and stats:
        weights |= {'class_counts': stats[0], 'num_samples': stats[1]}
    return weights


def _check_keywords(args: Namespace) -> None:
    for dest, keys in (('model_kwargs', _MODEL_KEYS), ('opt_kwargs', _OPT_KEYS)):
        for key in keys.keys() & getattr(args, dest).keys():
            raise MultiExitError(f'{option_name(dest)} has {key}, which has a flag of its own: use {keys[key]}.')


def _check_schedule(args: Namespace) -> None:
    prefix = args.warmup_epochs if args.warmup_prefix else 0
    total = args.epochs + args.cooldown_epochs + prefix
    if args.stop_epoch is not None and args.lr_cycle_limit == 1 and args.stop_epoch > total:
        raise MultiExitError(f'--stop-epoch is {args.stop_epoch}, allowed are integers from 1 to {total}, the epochs.')
    if args.sched in ('wsd', 'rsqrt'):
        room = args.epochs if args.warmup_prefix else args.epochs - args.warmup_epochs
        decay = args.decay_epochs * room if args.decay_epochs < 1 else args.decay_epochs
        if not 0 < decay <= room or (round(decay) < 1 and not args.sched_on_updates):
            raise MultiExitError(
                f'--decay-epochs is {args.decay_epochs:g}, --sched {args.sched} decays for that many epochs (below 1:'
                f' that part) of the {room} after the warm-up: allowed are 1 to {room}, or add --sched-on-updates.'
            )


def _check_names(args: Namespace) -> None:
    optimizers = list_optimizers()
    name = args.opt.lower().split('_')[-1]
    if name not in optimizers:
        nearest = listed(get_close_matches(name, optimizers, n=3) or ('sgd', 'adamw'))
        raise MultiExitError(f"--opt is '{args.opt}', nearest are {nearest}: timm.optim.list_optimizers() has all.")
