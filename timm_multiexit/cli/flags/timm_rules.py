"""Flags of timm's scripts that this package does not support, each with what to do instead."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from timm_multiexit.utils.errors import InvalidValueError

# A condition that must not hold, and the message where it does.
FlagRule = tuple[Callable[[Namespace], Any], str]

# Of both scripts.
SHARED_RULES: tuple[FlagRule, ...] = (
    (lambda a: a.torchscript, '--torchscript is not supported (torch.jit is deprecated). Use --torchcompile.'),
    (lambda a: a.fuser, '--fuser {fuser} is not supported (fusers belong to TorchScript). Use --torchcompile.'),
    (
        lambda a: a.device not in ('cuda', 'cpu'),
        "--device must be cuda (any accelerator that Accelerate finds) or cpu, got '{device}'. Choose GPUs with"
        ' CUDA_VISIBLE_DEVICES or accelerate launch.',
    ),
    (
        lambda a: a.amp and a.model_dtype not in (None, 'float32'),
        '--amp needs float32 weights, got --model-dtype {model_dtype}. Leave one of them out.',
    ),
    (
        lambda a: a.torchcompile_mode and a.torchcompile is None,
        '--torchcompile-mode needs --torchcompile.',
    ),
)

VALIDATE_RULES: tuple[FlagRule, ...] = (
    *SHARED_RULES,
    (lambda a: a.naflex_loader, "--naflex-loader is not supported. Use timm's own validate.py."),
    (lambda a: a.aot_autograd, '--aot-autograd is not supported. Use --torchcompile aot_eager or --torchcompile.'),
    (
        lambda a: a.num_gpu != 1,
        '--num-gpu {num_gpu} is not supported (DataParallel). Start a process for each GPU with torchrun'
        ' --nproc-per-node N validate.py.',
    ),
    (
        lambda a: a.test_pool,
        "--test-pool is not supported: it would replace main's head and leave the exits as they are. Use --img-size N"
        " alone, or timm's own validate.py.",
    ),
    (
        lambda a: a.tf_preprocessing,
        "--tf-preprocessing is not supported (it needs TensorFlow). Use --interpolation, or timm's own validate.py.",
    ),
    (
        lambda a: a.task == 'multilabel' or a.target_format is not None,
        '--task multilabel is not supported here. train.py writes mAP and F1 of every exit into results.json; in Python'
        ' it is timm_multiexit.evaluate(model, loader, multi_label=True).',
    ),
    (
        lambda a: a.real_labels and a.valid_labels,
        '--real-labels and --valid-labels exclude each other: real labels number all classes. Give one of them.',
    ),
)


def check_rules(args: Namespace, rules: Iterable[FlagRule]) -> None:
    """Raise `InvalidValueError` for the first rule that the arguments break."""
    for is_broken, line in rules:
        if is_broken(args):
            raise InvalidValueError(line.format_map(vars(args)))
