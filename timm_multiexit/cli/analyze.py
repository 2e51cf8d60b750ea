"""`timm-multiexit analyze RUN [RUN...]`: the figures of arXiv 2104.00299 for runs of `train.py`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from timm_multiexit.analysis.measuring import AnalysisData
from timm_multiexit.analysis.runs import Run, read_runs
from timm_multiexit.analysis.study import Study, summary_rows
from timm_multiexit.cli.build_training import loader_creator
from timm_multiexit.cli.flags.parser import (
    Number,
    ScriptParser,
    add_flags,
    non_negative_int,
    positive_int,
    switch,
    value,
)
from timm_multiexit.cli.launch import setup_logging, warn_of_workers
from timm_multiexit.cli.validate_data import create_split
from timm_multiexit.evaluation.stamp import name_dataset
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError, StateError
from timm_multiexit.utils.text import format_table

_PROG = 'timm-multiexit analyze'
_SAMPLES = Number(int, '>= 2', lambda number: number >= 2)

# Arguments of a run that say how its data are read.
_RUN_DATA = ('data_dir', 'dataset', 'class_map', 'input_img_mode', 'input_key', 'target_key')

_FLAGS = (
    value('--data-dir', str, None, 'DIR', "data folder, if not the first run's"),
    value('--dataset', str, None, 'NAME', "timm data set, if not the first run's"),
    value('--split', str, None, 'NAME', "split to measure on, if not that of the first run's table"),
    value('--out', str, 'output/analysis', 'DIR', 'where pictures and analysis.json are written'),
    value(
        '--reference',
        str,
        None,
        'NAME',
        'run that gains are over, by its name or its method, if not the first of method ce',
    ),
    value('--samples', _SAMPLES, 500, 'N', 'images of the dissimilarity matrices, at most so many'),
    value('--seed', non_negative_int, 0, 'N', 'seed of the choice of --samples'),
    value('-b --batch-size', positive_int, 256, 'N', 'images per batch'),
    value('-j --workers', non_negative_int, 4, 'N', 'data loading processes'),
    switch('--pin-mem', 'pin host memory for transfers'),
    switch('--no-prefetcher', 'leave out the prefetcher, which normalizes images on the device'),
)


def create_analyze_parser(prog: str = _PROG) -> ScriptParser:
    """Return the parser of the analysis."""
    parser = ScriptParser(prog=prog, description='Draw the figures of the EED paper for runs of train.py.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    add_flags(parser, 'Analysis', _FLAGS)
    return parser


def complete_args(args: Namespace, run: Run) -> Namespace:
    """Return the arguments, completed from the run's own where they do not name the data."""
    own = run.args
    given = {name: item for name, item in vars(args).items() if item is not None}
    data = {name: own.get(name) for name in _RUN_DATA}
    # A given folder wins over the digits of a run without data.
    if args.data_dir and not args.dataset and own.get('is_demo'):
        data['dataset'] = ''
    split = own.get('test_split') or own.get('val_split')
    defaults = {'reference': None, 'dataset_download': False, 'split': split, **data}
    completed = Namespace(**{**defaults, **given})
    if not completed.split:
        raise InvalidValueError(f'{run.name} has no split that it was measured on. Give one with --split.')
    return completed


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    setup_logging()
    args = create_analyze_parser(prog).parse_args(argv)
    try:
        runs = read_runs(args.runs)
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise StateError(f'The analysis runs in one process. Start it with {prog}, without accelerate launch.')
        warn_of_workers(args.workers)
        args = complete_args(args, runs[0])
        name, create_dataset = name_dataset(args.dataset, args.data_dir), partial(create_split, args, args.split)
        data = AnalysisData(name, args.split, create_dataset, loader_creator(args, accelerator))
        options = {'reference': args.reference, 'num_samples': args.samples, 'seed': args.seed}
        content = Study(runs, data, Path(args.out), device=accelerator.device, **options).run()
    except MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    print(
        f'\n{format_table(summary_rows(content["runs"]))}\n\nWrote {args.out}/analysis.json and the figures beside it.'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
