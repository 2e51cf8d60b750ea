#!/usr/bin/env python3
"""Train a timm model, plain or with exits: `accelerate launch train.py --eed --data-dir DIR`.

Flags and files are timm's (`train.py --help`); Accelerate owns device, precision and distribution.
"""

import logging
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import timm_multiexit as tme
from timm_multiexit.checkpoints.run_folder import read_origin
from timm_multiexit.cli.flags.parser import option_name
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.launch import create_accelerator, setup_logging
from timm_multiexit.hub_client.client import check_push
from timm_multiexit.publishing.licenses import PublicationInfo, find_license
from timm_multiexit.publishing.push import publish_run
from timm_multiexit.training.run import TrainingRun
from timm_multiexit.utils.errors import HubError, InvalidValueError
from timm_multiexit.utils.signals import Stopped

_logger = logging.getLogger(__name__)


def main(argv=None):
    """Run the command line and return the exit code: 0, 2 for an error of one line, 128 + N after signal N."""
    setup_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files every epoch
    run, code = None, 0
    try:
        args = parse_train_args(argv)
        accelerator = create_accelerator(args)
        logging.disable(logging.NOTSET if accelerator.is_main_process else logging.WARNING)
        run = TrainingRun(args, accelerator)
        run.open()
        run.fit()
        run.report()
    except tme.MultiExitError as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        code = 128 + stopped.signal
        if accelerator.is_main_process:
            where = f'--output {run.output_dir.parent} --experiment {run.output_dir.name}'
            print(f'train.py: stopped, go on with --resume auto {where}', file=sys.stderr)
    finally:
        if run is not None:
            run.close()
    # Together: a process that leaves while others still talk to it takes them along.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if code == 0:
        code = publish(run)
    return code


def publish(run):
    """Publish a finished run if its flags say so, and return the exit code.

    It comes last of all, when no other process waits for this one.
    """
    try:
        if run.args.push_to_hub and run.accelerator.is_main_process:
            _logger.info(f'Published: {publish_at_end(run.args, run.output_dir)}')
    except tme.MultiExitError as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    return 0


def check_publishing(args: Namespace, *, has_table: bool, asks_hub: bool) -> None:
    """Raise before a run begins for what would keep it from being published at its end.

    Args:
        args: Arguments of the run.
        has_table: Whether there are images to evaluate the network on.
        asks_hub: Ask the Hub whether it would accept the push.

    Raises:
        InvalidValueError: Flags that do not go together, or see `licenses.resolve_license`.
        HubError: See `hub_client.client.check_push`.
    """
    if not args.push_to_hub:
        for dest in ('hub_private', 'hub_license'):
            if getattr(args, dest):
                raise InvalidValueError(f'{option_name(dest)} requires --push-to-hub ORG/NAME.')
        return
    if args.exits is None:
        raise InvalidValueError('--push-to-hub publishes networks with exits: add --eed or --exits.')
    if not has_table:
        raise InvalidValueError('--push-to-hub needs results to publish: add --val-split or --test-split.')
    find_license(read_origin(vars(args)), PublicationInfo(args.hub_license))
    if asks_hub:
        check_push(args.push_to_hub, private=args.hub_private)


def publish_at_end(args: Namespace, folder: Path) -> str:
    """Publish a finished run as its flags say, and return where.

    Raises:
        HubError: It could not be published; the run itself is complete.
    """
    try:
        info = PublicationInfo(args.hub_license)
        return publish_run(folder, args.push_to_hub, info=info, private=args.hub_private).url
    except tme.MultiExitError as error:
        again = ['hub/publish.py', str(folder), args.push_to_hub, '--yes', *['--private'] * args.hub_private]
        again += ['--license', args.hub_license] if args.hub_license else []
        raise HubError(
            f'The run in {folder} is complete, but was not published: {error} Try again with {shlex.join(again)}'
        ) from error


if __name__ == '__main__':
    sys.exit(main())
