"""Rules for combinations of training flags, and flags of timm's that this package does not support."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights
from timm.optim import list_optimizers

from timm_multiexit.cli.flags.parser import Flag, option_name
from timm_multiexit.cli.flags.timm_rules import SHARED_RULES
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.utils.errors import InvalidValueError, one_line

# Keywords that have flags of their own.
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


def _find_teacher(args: Namespace) -> Any:
    """Return who teaches, None for nobody."""
    return None if args.exits is None else args.exit_teacher or LOSSES[args.exit_loss]['teacher']


def _distils_features(args: Namespace) -> bool:
    weight = args.exit_feature_weight
    if weight is None and args.exits is not None:
        weight = LOSSES[args.exit_loss].get('feature_weight')
    return bool(weight)


def _has_teachers(args: Namespace) -> bool:
    """Return whether more than one classifier teaches."""
    teacher = _find_teacher(args)
    return teacher == 'all' or (isinstance(teacher, list) and len(teacher) > 1)


def _leaves_output(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or not path.parts or '..' in path.parts or not name.isprintable()


def _lacks_sizes(args: Namespace) -> bool:
    options = (args.train_batch_sizes, args.train_size_probs, args.train_batches_per_epoch)
    is_any = any(option is not None for option in options) or args.train_size_schedule == 'progressive'
    return is_any and args.train_img_sizes is None


def _has_odd_batch(args: Namespace) -> bool:
    return any(size % 2 for size in args.train_batch_sizes or ())


# A condition that must not hold, and the message where it does.
TRAIN_RULES: tuple[tuple[Callable[[Namespace], Any], str], ...] = (
    *SHARED_RULES,
    (lambda a: a.naflex_loader, "--naflex-loader is not supported. Use timm's own train.py."),
    (lambda a: a.tta > 1, '--tta must be 0 or 1, got {tta}. Test-time augmentation is not supported.'),
    (
        lambda a: a.kd_distill_type != 'logit' and a.exits is not None,
        '--kd-distill-type must be logit for a model with exits, got {kd_distill_type}.',
    ),
    (
        lambda a: a.task == 'multilabel' and a.kd_model_name,
        '--kd-model-name distils softmax outputs, which --task multilabel does not have. Leave one of them out.',
    ),
    (
        lambda a: a.task == 'multilabel' and _distils_softmax(a),
        '--exit-loss {exit_loss} distils softmax outputs, which --task multilabel does not have. Add --exit-output-loss'
        ' mse or bernoulli.',
    ),
    (
        lambda a: a.task == 'multilabel' and a.dataset in ('', 'digits'),
        '--task multilabel needs a --dataset with several labels per image: hfds/, hfids/, tfds/ or wds/.',
    ),
    (
        lambda a: a.task != 'multilabel' and a.target_format == 'multihot',
        '--target-format multihot needs --task multilabel.',
    ),
    (
        lambda a: a.start_epoch is not None and a.start_epoch >= a.epochs,
        '--start-epoch must be below --epochs {epochs}, got {start_epoch}.',
    ),
    (lambda a: a.aug_splits == 1, '--aug-splits must be 0 or >= 2, got 1.'),
    (
        lambda a: a.loss == 'jsd' and a.aug_splits < 2,
        '--loss jsd (--jsd-loss) compares augmentation splits, got --aug-splits {aug_splits}. Add --aug-splits 3.',
    ),
    (lambda a: a.aug_splits and is_mixing(a), '--aug-splits cannot be combined with --mixup or --cutmix.'),
    (lambda a: a.aug_splits and a.no_aug, '--aug-splits needs augmentation. Leave out --no-aug.'),
    (lambda a: a.aug_splits and a.no_prefetcher, '--aug-splits needs the prefetcher. Leave out --no-prefetcher.'),
    (
        lambda a: a.crop_padding and (a.no_aug or a.aug_splits or a.train_crop_mode or a.train_img_sizes is not None),
        '--crop-padding cannot be combined with --no-aug, --aug-splits, --train-crop-mode or --train-img-sizes.',
    ),
    (
        lambda a: a.split_bn and not (a.aug_splits or a.resplit),
        '--split-bn needs augmentation splits, got --aug-splits 0. Add --aug-splits 2 or more.',
    ),
    (lambda a: a.split_bn and a.sync_bn, '--split-bn and --sync-bn contradict each other. Give one of them.'),
    (
        lambda a: a.freeze_bn_stats and (a.split_bn or a.sync_bn),
        '--freeze-bn-stats takes no statistics of batches, which --split-bn and --sync-bn are about. Leave one out.',
    ),
    (
        lambda a: a.pretrained_path and not a.pretrained,
        '--pretrained-path is where --pretrained takes weights from, which is not given. Add --pretrained.',
    ),
    (
        lambda a: a.freeze_bn_stats and not (a.pretrained or a.initial_checkpoint or a.resume),
        '--freeze-bn-stats keeps the statistics of trained weights: add --pretrained or --initial-checkpoint.',
    ),
    (
        lambda a: is_mixing(a) and a.batch_size % 2,
        '--batch-size must be even for --mixup and --cutmix, got {batch_size}.',
    ),
    (
        lambda a: is_mixing(a) and _has_odd_batch(a),
        '--train-batch-sizes must be even for --mixup and --cutmix, got {train_batch_sizes}.',
    ),
    (
        lambda a: a.split_bn and a.resplit and not a.aug_splits and a.batch_size % 2,
        '--batch-size must be even for --split-bn, got {batch_size}.',
    ),
    (
        lambda a: a.split_bn and a.resplit and not a.aug_splits and _has_odd_batch(a),
        '--train-batch-sizes must be even for --split-bn, got {train_batch_sizes}.',
    ),
    (
        lambda a: is_mixing(a) and a.mixup_mode == 'half' and a.no_prefetcher,
        '--mixup-mode half needs the prefetcher. Leave out --no-prefetcher, or use batch, pair or elem.',
    ),
    (
        lambda a: a.train_img_sizes is not None and (a.use_multi_epochs_loader or a.aug_splits),
        '--train-img-sizes cannot be combined with --use-multi-epochs-loader or --aug-splits.',
    ),
    (
        _lacks_sizes,
        '--train-batch-sizes, --train-size-probs, --train-batches-per-epoch and --train-size-schedule progressive'
        ' need --train-img-sizes.',
    ),
    (
        lambda a: any(
            sizes is not None and len(sizes) != len(a.train_img_sizes)
            for sizes in (a.train_batch_sizes, a.train_size_probs)
        ),
        '--train-batch-sizes and --train-size-probs must have one number per size of --train-img-sizes,'
        ' which is {train_img_sizes}.',
    ),
    (
        lambda a: a.train_size_probs is not None and not sum(a.train_size_probs),
        '--train-size-probs must have a number > 0, got {train_size_probs}.',
    ),
    (
        lambda a: a.train_size_schedule == 'progressive' and len(a.train_img_sizes) < 2,
        '--train-size-schedule progressive needs two sizes, got --train-img-sizes {train_img_sizes}.',
    ),
    (
        lambda a: a.experiment and _leaves_output(a.experiment),
        '--experiment must name a folder inside of --output, got {experiment!r}. Name other places by --output.',
    ),
    (lambda a: a.wandb_resume_id and not a.resume, '--wandb-resume-id needs --resume. Give the checkpoint too.'),
    (lambda a: a.resume == 'auto' and not a.experiment, '--resume auto needs --experiment, the name of the run.'),
    (lambda a: a.regime != 'mixed' and a.backbone_epochs is not None, '--backbone-epochs needs --regime mixed.'),
    (
        lambda a: a.backbone_epochs is not None and a.backbone_epochs >= a.epochs,
        '--backbone-epochs must be < --epochs {epochs}, got {backbone_epochs}.',
    ),
    (
        lambda a: a.regime == 'frozen' and a.head_warmup_epochs,
        '--regime frozen always trains the heads alone. Leave out --head-warmup-epochs.',
    ),
    (
        lambda a: not _find_teacher(a) and (a.exit_output_loss or a.exit_temperature or a.exit_warmup_epochs),
        '--exit-output-loss, --exit-temperature and --exit-warmup-epochs need a teacher. Add --eed.',
    ),
    (
        lambda a: a.exit_temperature and a.exit_output_loss == 'mse',
        '--exit-temperature is that of --exit-output-loss kl or bernoulli, got mse. Leave it out.',
    ),
    (
        lambda a: a.exit_projectors and not _distils_features(a),
        '--exit-projectors needs features that are distilled. Add --exit-feature-weight 1.',
    ),
    (
        lambda a: a.exit_teacher_weights == 'skill' and not _has_teachers(a),
        '--exit-teacher-weights skill needs several classifiers that teach. Add --eed, or --exit-teacher all.',
    ),
    (
        lambda a: a.exit_teacher_weights == 'skill' and 'depth_weights' in LOSSES[a.exit_loss],
        '--exit-teacher-weights must be equal with --exit-loss {exit_loss}, which weighs by depth, got skill.',
    ),
    (
        lambda a: a.exit_survivors and a.regime != 'frozen',
        '--exit-survivors needs a frozen backbone: it would learn from the rest alone. Add --freeze-backbone.',
    ),
    (
        lambda a: a.exit_survivors and a.task == 'multilabel',
        '--exit-survivors needs classes that exclude each other, as --task multilabel does not have.',
    ),
    (
        lambda a: a.exit_weights is not None and not any(a.exit_weights),
        '--exit-weights must have a number > 0, got zeros only.',
    ),
)


def check_args(args: Namespace, exit_flags: Iterable[Flag]) -> None:
    """Raise where the arguments of a training run contradict each other; `exit_flags` are those that need exits."""
    _check_lists(args)
    if args.exits is None:
        for flag in exit_flags:
            if getattr(args, flag.dest) != flag.default:
                raise InvalidValueError(f'{flag.names} needs exits. Add --exits or --exit-loss.')
    for is_broken, line in TRAIN_RULES:
        if is_broken(args):
            raise InvalidValueError(line.format_map(vars(args)))
    _check_schedule(args)
    _check_names(args)
    _check_keywords(args)
    loss_kwargs(args)


def loss_kwargs(args: Namespace, num_classes: int | None = None) -> dict[str, Any]:
    """Return the keywords of `timm.loss.create_classification_loss`, with weights for `num_classes`, if known."""
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
        raise InvalidValueError(f'--loss {args.loss or "by default"}: {error}') from error
    for name in ('class_weight', 'pos_weight', 'class_counts'):
        count = getattr(kwargs.get(name), 'numel', lambda: 1)()
        if num_classes and count not in (1, num_classes):
            raise InvalidValueError(f'{name} of the loss must have {num_classes} numbers, one per class, got {count}.')
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
        raise InvalidValueError(
            f"Cannot read {option_name(flag)} '{getattr(args, flag)}': {one_line(error, None)}."
        ) from error
    if args.loss == 'db' and stats:
        weights |= {'class_counts': stats[0], 'num_samples': stats[1]}
    return weights


def _check_keywords(args: Namespace) -> None:
    for dest, keys in (('model_kwargs', _MODEL_KEYS), ('opt_kwargs', _OPT_KEYS)):
        for key in keys.keys() & getattr(args, dest).keys():
            raise InvalidValueError(f'{option_name(dest)} must not have {key}. Use {keys[key]}.')


def _check_lists(args: Namespace) -> None:
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        given = getattr(args, dest)
        if given is not None and not (len(given) == 2 and given[0] <= given[1]):
            raise InvalidValueError(f'{option_name(dest)} must be two numbers, the smaller first, got {given}.')
    if any(later <= earlier for earlier, later in zip(args.decay_milestones, args.decay_milestones[1:])):
        raise InvalidValueError(f'--decay-milestones must be increasing, got {args.decay_milestones}.')
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    for dest in ('mean', 'std'):
        given = getattr(args, dest)
        if given is not None and len(given) not in (1, channels):
            raise InvalidValueError(
                f'{option_name(dest)} must have 1 or {channels} numbers, one per channel, got {len(given)}.'
            )


def _check_schedule(args: Namespace) -> None:
    total = args.epochs + args.cooldown_epochs + (args.warmup_epochs if args.warmup_prefix else 0)
    if args.stop_epoch is not None and args.lr_cycle_limit == 1 and args.stop_epoch > total:
        raise InvalidValueError(
            f'--stop-epoch must be in [1, {total}], the epochs of the schedule, got {args.stop_epoch}.'
        )
    if args.sched in ('wsd', 'rsqrt'):
        room = args.epochs if args.warmup_prefix else args.epochs - args.warmup_epochs
        decay = args.decay_epochs * room if args.decay_epochs < 1 else args.decay_epochs
        if not 0 < decay <= room or (round(decay) < 1 and not args.sched_on_updates):
            raise InvalidValueError(
                f'--decay-epochs must be >= 1, or a share < 1, of the {room} epochs after the warm-up for --sched'
                f' {args.sched}, got {args.decay_epochs:g}. See --sched-on-updates.'
            )


def _check_names(args: Namespace) -> None:
    optimizers = [str(name) for name in list_optimizers()]
    name = args.opt.lower().split('_')[-1]
    if name not in optimizers:
        nearest = ', '.join(get_close_matches(name, optimizers, n=3) or ('sgd', 'adamw'))
        raise InvalidValueError(
            f"--opt must be one of timm.optim.list_optimizers(), got '{args.opt}'. Nearest are {nearest}."
        )
