"""What training needs where Accelerate was launched with --use_fsdp --fsdp_version 2: torch's FSDP2."""

import os
import warnings
from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast, fsdp2_prepare_model
from timm.task import TrainingTask

from timm_multiexit.utils.errors import LIBRARY_ERRORS, InvalidValueError, StateError, one_line

# Those of timm's optimizers with which three steps on sharded parameters, and their state, came to the same as on whole
# ones, to 1e-9. Others look at whole parameters, mix sharded tensors with whole ones, or wait for each other for ever.
SHARDED_OPTIMIZERS = (
    *('sgd', 'momentum', 'adam', 'adamw', 'adamax', 'adamc', 'adadelta', 'adagrad', 'adabelief', 'nadam', 'nadamw'),
    *('radam', 'radamw', 'rmsprop', 'rmsproptf', 'adopt', 'adoptw', 'lamb', 'lars'),
)


def is_asked(name: str) -> bool:
    """Return whether a variable that Accelerate's launcher sets says yes."""
    return os.environ.get(name, '').lower() in ('1', 'true', 'yes')


def create_plugin() -> FullyShardedDataParallelPlugin | None:
    """Return Accelerate's settings of FSDP2, as its launcher handed them on; None if it was launched without.

    Raises:
        StateError: It was launched with something that is not supported.
    """
    if not is_asked('ACCELERATE_USE_FSDP'):
        return None
    version = os.environ.get('FSDP_VERSION', '1')
    if version != '2':
        raise StateError(
            f'--fsdp_version must be 2, got {version}. Launch with --use_fsdp --fsdp_version 2, or with --multi_gpu.'
        )
    for name, flag, instead in (
        ('FSDP_OFFLOAD_PARAMS', '--fsdp_offload_params', 'leave it out'),
        ('FSDP_ACTIVATION_CHECKPOINTING', '--fsdp_activation_checkpointing', 'use --grad-checkpointing of train.py'),
        ('FSDP_IGNORED_MODULES', '--fsdp_ignored_modules', 'leave it out'),
        ('ACCELERATE_USE_PARALLELISM_CONFIG', '--use_parallelism_config', 'leave it out'),
    ):
        value = os.environ.get(name, '')
        if value.lower() not in ('', '0', 'false', 'no', 'none'):
            raise StateError(f'{flag} is not supported in training with FSDP2, got {value}: {instead}.')
    state_dict_type = os.environ.get('FSDP_STATE_DICT_TYPE', 'FULL_STATE_DICT').upper()
    if state_dict_type != 'FULL_STATE_DICT':
        raise StateError(
            f'--fsdp_state_dict_type must be FULL_STATE_DICT, got {state_dict_type}: checkpoints are whole files, which'
            ' any number of processes can resume. Give it to accelerate launch, or choose it in accelerate config.'
        )
    backend = os.environ.get('ACCELERATE_DYNAMO_BACKEND', 'no')
    if backend.lower() != 'no':
        raise StateError(f'--dynamo_backend is not supported in training with FSDP2, got {backend}: leave it out.')
    try:
        # Every process makes the whole model anyway, and Accelerate's way of loading fails on buffers.
        return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    except LIBRARY_ERRORS as error:
        raise StateError(f'Cannot set up FSDP2: {one_line(error)}') from error


def turn_on(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let Accelerate shard on CPUs, too, where it would take DistributedDataParallel without a word."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        if accelerator.mixed_precision != 'no':
            plugin.set_mixed_precision(accelerator.mixed_precision)
        state.fsdp_plugin = plugin


def check_flags(args: Namespace) -> None:
    """Raise for flags of training that do not go with FSDP2.

    Raises:
        InvalidValueError: There are some.
    """
    for dest, instead in (
        ('torchcompile', 'leave it out'),
        ('channels_last', 'leave it out, torch shards contiguous weights alone'),
        ('model_ema_force_cpu', 'leave it out, the average is sharded as the model is'),
    ):
        if getattr(args, dest):
            flag = '--' + dest.replace('_', '-')
            raise InvalidValueError(f'{flag} is not supported with FSDP2: {instead}.')
    if args.opt.lower() not in SHARDED_OPTIMIZERS:
        raise InvalidValueError(
            f'--opt must be one of {", ".join(SHARDED_OPTIMIZERS)} with FSDP2, got {args.opt}. Others need whole'
            ' parameters.'
        )
    if args.clip_grad is not None and args.clip_mode == 'agc':
        raise InvalidValueError('--clip-mode must be norm or value with FSDP2, got agc, which needs whole parameters.')
    if args.kd_model_name and args.kd_distill_type == 'feature':
        raise InvalidValueError('--kd-distill-type feature is not supported with FSDP2: use logit.')
    if not args.dist_bn and not args.sync_bn:
        raise InvalidValueError(
            "--dist-bn must be reduce or broadcast with FSDP2, got ''. Each process has batch norm statistics of its"
            ' own.'
        )


def share_weights(module: Any) -> None:
    """Give all processes the weights of the first, which DistributedDataParallel does and `fully_shard` does not."""
    with torch.no_grad():
        broadcast(dict(module.state_dict()))


def shard_task(task: TrainingTask, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Any:
    """Share out what a task trains, and its moving average, and return the prepared optimizer.

    Raises:
        InvalidValueError: Accelerate's wrapping policy does not fit the model.
    """
    # The heads' features are views, which torch warns of at every step, and nothing here changes them in place.
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view')
    holder: Any = task
    try:
        holder.trainable_module, prepared = accelerator.prepare(holder.trainable_module, optimizer)
        if task.has_ema():
            average: Any = task.get_trainable_module(ema=True)
            fsdp2_prepare_model(accelerator, average.module)
    except LIBRARY_ERRORS as error:
        raise InvalidValueError(f'Cannot shard the model: {one_line(error)}') from error
    return prepared
