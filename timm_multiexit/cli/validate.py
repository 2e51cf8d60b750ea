#!/usr/bin/env python3
"""Accuracy and cost of every exit: `validate.py --model local-dir:output/train/RUN/best --data-dir DIR`.

Takes a model folder, a training checkpoint or a timm name. Flags are timm's, and those of dynamic inference: with
--calib-split or --calib-from-train what can be reached with which budget (`validate.py --help`).
"""

import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

import timm_multiexit as tme
from timm_multiexit.checkpoints.source import create_backbone
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint, read_training_checkpoint, restore_exits
from timm_multiexit.cli.build_model import model_kwargs, pin_model
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.cli.launch import setup_logging
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.evaluation.validator import Validator
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.files import write_output

_logger = logging.getLogger(__name__)


# What a checkpoint remembers of the run that wrote it, for the flags that are not given here.
REMEMBERED = (
    'model',
    'num_classes',
    'img_size',
    'input_size',
    'in_chans',
    'gp',
    'mean',
    'std',
    'crop_pct',
    'interpolation',
    'model_kwargs',
)


def create_model(args):
    """Return the model that the flags name, with the exits it was saved with."""
    checkpoint = read_training_checkpoint(args.checkpoint) if args.checkpoint else {}
    trained = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), object) and 'args' in checkpoint else {}
    for name in REMEMBERED:
        if not getattr(args, name) and trained.get(name):
            setattr(args, name, trained[name])
    if args.model is None:
        raise tme.MultiExitError('No model: give --model NAME, --model local-dir:FOLDER, or --checkpoint PATH.')
    source = pin_model(args)
    kwargs, size = model_kwargs(args)
    if source is not None:
        kwargs['pretrained'] = True
    if args.exits is not None or (source is not None and source.config.exits):
        model = tme.create_model(
            args.model, exits=args.exits, head=args.exit_head, head_widths=args.head_widths, input_size=size, **kwargs
        )
    else:
        backbone = create_backbone(args.model, **kwargs)
        if (checkpoint.get('task_state') or {}).get('exits'):
            model = restore_exits(backbone, checkpoint)
        else:
            model = MultiExitModel(backbone, [])
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    return model


def validate(args, accelerator):
    """Return the validation of the model that the flags name."""
    args.data_dir = args.data_dir or args.data
    if not args.data_dir and not args.dataset:
        args.dataset, args.split = DIGITS, 'test'
        _logger.info('No data named (--data-dir, --dataset): the test split of the handwritten digits.')
    model = create_model(args).to(accelerator.device).eval()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    def show(text):
        if accelerator.is_main_process:
            print(f'\n{text}', flush=True)

    return Validator(args, model, accelerator, show=show).run()


def write_results(args, validation):
    """Write the table: csv is one line per classifier, json has the other sections and the environment beside it."""
    table = validation.table
    if args.results_format == 'json':
        results = dict(
            model=args.model,
            split=args.split,
            num_samples=table.num_samples,
            rows=table.rows,
            **validation.sections,
            **describe_environment(),
        )
        text = json.dumps(results, indent=2) + '\n'
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=['model', *table.rows[0]])
        writer.writeheader()
        writer.writerows({'model': args.model, **row} for row in table.rows)
        text = file.getvalue()
    write_output(Path(args.results_file), text.encode())


def main(argv: Sequence[str] | None = None, prog: str = 'validate.py') -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    setup_logging()
    args = create_validate_parser(prog).parse_args(argv)
    try:
        precision = {'float16': 'fp16', 'bfloat16': 'bf16'}.get(args.amp_dtype, args.amp_dtype) if args.amp else None
        if precision == 'fp16' and not torch.cuda.is_available():
            raise tme.MultiExitError('--amp in float16 needs a GPU: use --amp-dtype bfloat16.')
        accelerator = Accelerator(mixed_precision=precision)
        validation = validate(args, accelerator)
        if args.results_file and accelerator.is_main_process:
            write_results(args, validation)
    except tme.MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    if accelerator.is_main_process:
        # Nothing after this line: timm's bulk tools read the rest of the output as JSON.
        result = {'model': args.model, 'rows': validation.table.rows}
        if 'dynamic' in validation.sections:
            result['dynamic'] = validation.sections['dynamic']
        print(f'\n--result\n{json.dumps(result, indent=4)}', flush=True)
    accelerator.end_training()
    return 0


if __name__ == '__main__':
    sys.exit(main())
