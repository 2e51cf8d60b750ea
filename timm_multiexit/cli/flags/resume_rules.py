"""Flags of a resumed run that are other ones than before: refused, or said and recorded."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_multiexit.cli.flags.parser import option_name
from timm_multiexit.cli.flags.train_args import create_train_parser
from timm_multiexit.utils.errors import InvalidValueError, brief

# What a run minimises. Its table, its name in comparisons and its card say that of all its epochs.
_LOSS = (
    *(
        'task',
        'exit_loss',
        'exit_teacher',
        'exit_teacher_weights',
        'exit_survivors',
        'exit_output_loss',
        'exit_output_weight',
        'exit_feature_weight',
    ),
    *('exit_temperature', 'exit_weights', 'exit_warmup_epochs', 'loss', 'smoothing', 'bce_sum', 'bce_target_thresh'),
    *('loss_class_weight', 'loss_pos_weight', 'class_stats', 'loss_weight_power', 'poly_gamma', 'poly_epsilon'),
    *('kd_model_name', 'kd_distill_type', 'kd_loss_type', 'distill_loss_weight', 'task_loss_weight'),
    *('kd_temperature', 'kd_token_distill_type'),
)

# What changes neither what is learnt nor which epoch is the best: flags that are other names of others, where things
# are, what is read from the checkpoint instead, how fast it goes, and what is said, kept and published.
_NOT_LEARNT = frozenset(
    (
        *('config eed freeze_backbone jsd_loss bce_loss bce_pos_weight drop_connect is_demo origin resumed').split(),
        *('data data_dir dataset_download dataset_trust_remote_code test_split').split(),
        *('bad_images cache_images pretrained pretrained_path initial_checkpoint resume no_resume_opt').split(),
        *('head_init_scale head_init_bias validation_batch_size channels_last grad_checkpointing').split(),
        *('torchcompile torchcompile_mode device no_ddp_bb synchronize_step local_rank device_modules').split(),
        *('stop_epoch start_epoch multilabel_threshold log_interval val_interval recovery_interval').split(),
        *('checkpoint_hist save_epochs save_images workers pin_mem no_prefetcher output experiment').split(),
        *('log_wandb wandb_project wandb_tags wandb_resume_id log_with progress push_to_hub').split(),
        *('hub_private hub_license use_multi_epochs_loader crop_pct lr_base lr_base_size lr_base_scale').split(),
    )
)


def find_changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return flag -> [before, now], of those that differ and change what is learnt; each is known to both.

    >>> find_changes({'lr': 0.1, 'workers': 4, 'opt': 'sgd'}, {'lr': 0.2, 'workers': 2})
    {'lr': [0.2, 0.1]}
    """
    names = sorted(now.keys() & before.keys() - _NOT_LEARNT)
    pairs = {name: [_listed(before[name]), _listed(now[name])] for name in names}
    return {name: [was, new] for name, (was, new) in pairs.items() if was != new and not _are_unset(was, new)}


def _are_unset(*values: Any) -> bool:
    return all(
        value is None or value is False or (isinstance(value, (str, list, dict)) and not value) for value in values
    )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_changes(record: Namespace, before: Namespace, checkpoint: Path, *, is_own: bool) -> dict[str, list[Any]]:
    """Return what has changed since a checkpoint, see `find_changes`, unless that is refused.

    Args:
        record: The flags of this run, resolved.
        before: Those of the checkpoint.
        checkpoint: Its file.
        is_own: It is in the folder of this run.

    Raises:
        InvalidValueError: A run would continue with another loss than it has begun with.
    """
    flags = vars(before)
    if 'exit_loss' in flags:  # not of timm's own script: what the run began without had its default
        flags = {action.dest: action.default for action in create_train_parser()._actions} | flags
    changes = find_changes(vars(record), flags)
    for name in _LOSS:
        if is_own and name in changes:
            was, now = changes[name]
            raise InvalidValueError(
                f'{option_name(name)} must be {brief(was)}, as in {checkpoint}, got {brief(now)}. Give the loss that'
                f' the run was begun with, or continue in a run of its own: --resume {checkpoint} --experiment NEW.'
            )
    return changes


def format_changes(changes: Mapping[str, list[Any]]) -> str:
    """Return changes in one line.

    >>> format_changes({'lr': [0.2, 0.1], 'exit_loss': ['ce', 'eed']})
    "--lr 0.1 (was 0.2), --exit-loss 'eed' (was 'ce')"
    """
    return ', '.join(f'{option_name(name)} {brief(now)} (was {brief(was)})' for name, (was, now) in changes.items())
