#!/usr/bin/env python3
"""Train a timm model, plain or with exits: `accelerate launch train.py --eed --data-dir DIR`.

Flags and files are timm's (`train.py --help`); Accelerate owns device, precision and distribution.
"""

import logging
import sys
from collections.abc import Sequence

import timm_multiexit as tme
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.launch import create_accelerator, setup_logging
from timm_multiexit.training.run import TrainingRun
from timm_multiexit.utils.signals import Stopped


def main(argv: Sequence[str] | None = None, prog: str = 'train.py') -> int:
    """Run the command line and return the exit code: 0, 2 for an error of one line, 128 + N after signal N."""
    setup_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files every epoch
    run, code = None, 0
    try:
        args = parse_train_args(argv, prog)
        accelerator = create_accelerator(args)
        logging.disable(logging.NOTSET if accelerator.is_main_process else logging.WARNING)
        run = TrainingRun(args, accelerator)
        run.open()
        run.fit()
        run.report()
    except tme.MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        code = 128 + stopped.signal
        if accelerator.is_main_process:
            where = f'--output {run.output_dir.parent} --experiment {run.output_dir.name}'
            print(f'{prog}: stopped, continue with --resume auto {where}', file=sys.stderr)
    finally:
        if run is not None:
            run.close()
    # Together: a process that leaves while others still talk to it takes them along.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if code == 0:
        code = publish(run, prog)
    return code


def publish(run: TrainingRun, prog: str) -> int:
    """Publish a finished run if its flags say so, and return the exit code."""
    try:
        run.publish()
    except tme.MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
