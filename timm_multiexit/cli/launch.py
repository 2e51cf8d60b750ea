"""What a command sets up first: its log, and Accelerate from command-line arguments."""

import importlib
import logging
import os
import warnings
from argparse import Namespace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import setup_default_logging

from timm_multiexit.cli.sharding import create_plugin, is_asked, turn_on
from timm_multiexit.utils.errors import InvalidValueError, StateError, one_line

_SUPPORTED = {
    kind
    for kind in DistributedType
    if kind.name == 'NO' or (kind.name.startswith('MULTI_') and not kind.name.endswith('TPU'))
}


_logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Set up timm's log of a script, without what says nothing to its user.

    Left out are the addresses that the Hub's client requests, which may be signed, timm's 'Loaded  from checkpoint',
    and torch's warning of too many workers, which each loader repeats: see `warn_of_workers`.
    """
    setup_default_logging()
    for name in ('httpx', 'httpx2', 'timm.models._helpers'):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings('ignore', message='This DataLoader will create')


def create_accelerator(args: Namespace) -> Accelerator:
    """Return the accelerator of a run; `torchrun`, `accelerate launch` and plain Python come to the same."""
    for module in getattr(args, 'device_modules', None) or ():  # validate.py has no such flag
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InvalidValueError(f"Cannot import '{module}' of --device-modules: {one_line(error)}.") from error
    _check_launcher()
    plugin = create_plugin()
    has_gpu = torch.accelerator.is_available() and args.device != 'cpu'
    precision = choose_precision(args, has_gpu)
    if precision is None:
        _check_launched_precision(has_gpu)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    launched = int(os.environ.get('WORLD_SIZE', 1))
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            fsdp_plugin=plugin,
            # Told to be on the CPU, Accelerate joins the processes that torchrun started; else it runs each for itself.
            cpu=args.device == 'cpu' or (launched > 1 and not torch.accelerator.is_available()),
        )
    except ValueError as error:  # not every accelerator takes float16
        raise InvalidValueError(f'Cannot set up Accelerate: {one_line(error)}') from error
    if plugin is not None:
        turn_on(accelerator, plugin)
        if not accelerator.is_fsdp2:
            raise StateError(
                f'FSDP2 needs processes that were started together, got {accelerator.distributed_type.value}. Start'
                ' them with accelerate launch --use_fsdp --fsdp_version 2.'
            )
    elif accelerator.distributed_type not in _SUPPORTED:
        raise StateError(
            f'Accelerate must be launched for one process, DistributedDataParallel or FSDP2, got'
            f' {accelerator.distributed_type.value}. Launch with --multi_gpu or torchrun.'
        )
    if launched != accelerator.num_processes:
        raise StateError(
            f'{launched} processes were launched, and Accelerate runs {accelerator.num_processes}. Start them with'
            f' torchrun --nproc-per-node {launched} -m timm_multiexit.cli.train ...'
        )
    _warn_of_bfloat16(accelerator)
    return accelerator


def warn_of_workers(num_workers: int) -> None:
    """Warn of more loading processes than there are cores."""
    # Cores that this process may use, where the system tells.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or num_workers
    if num_workers > num_cores:
        cores = 'core' if num_cores == 1 else 'cores'
        _logger.warning(
            f'--workers {num_workers} are more than the {num_cores} CPU {cores}: loading may be slow. Add --workers'
            f' {num_cores}.'
        )


def _warn_of_bfloat16(accelerator: Accelerator) -> None:
    """Warn of bfloat16 on a CPU where torch has no fast convolutions in it, such as one without AVX-512."""
    is_used = accelerator.mixed_precision == 'bf16' and accelerator.device.type == 'cpu'
    is_fast = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)
    if is_used and accelerator.is_main_process and not is_fast():
        _logger.warning(
            'bfloat16 is many times slower than float32 on this CPU, which has no units for it. Leave out --amp.'
        )


def choose_precision(args: Namespace, has_gpu: bool) -> str | None:
    """Return Accelerate's name of the precision of `--amp`; None without, where its launch or configuration decides."""
    if not args.amp:
        return None
    if args.amp_dtype == 'float16' and not has_gpu:
        raise InvalidValueError(
            '--amp in float16 needs a GPU (on a CPU it would be float32). Use --amp-dtype bfloat16.'
        )
    return {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype]


def _check_launched_precision(has_gpu: bool) -> None:
    precision = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no').lower()
    if precision not in ('no', 'fp16', 'bf16'):
        raise InvalidValueError(
            f"Accelerate's --mixed_precision must be no, fp16 or bf16, got {precision}. Change it in accelerate launch"
            ' or accelerate config.'
        )
    if precision == 'fp16' and not has_gpu:
        raise InvalidValueError(
            "Accelerate's --mixed_precision fp16 needs a GPU (on a CPU it would be float32). Use bf16 or no."
        )


def _check_launcher() -> None:
    if is_asked('ACCELERATE_USE_DEEPSPEED'):
        raise StateError(
            'DEEPSPEED is not supported, only DistributedDataParallel and FSDP2. Leave --use_deepspeed out of'
            ' accelerate launch, or choose multi-GPU in accelerate config.'
        )
    # On CPUs `accelerate launch --num_processes 2` starts one process, and tells it only where the others would meet.
    if is_asked('ACCELERATE_USE_CPU') and 'MASTER_ADDR' in os.environ and 'WORLD_SIZE' not in os.environ:
        raise StateError(
            'accelerate launch started one of several processes, as it does on CPUs. Start them with'
            ' torchrun --nproc-per-node 2 -m timm_multiexit.cli.train ... or'
            ' ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m'
            ' timm_multiexit.cli.train ...'
        )
