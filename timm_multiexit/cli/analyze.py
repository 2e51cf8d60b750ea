"""`timm-multiexit analyze RUN [RUN...]`: the figures of arXiv 2104.00299 for runs of `train.py`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_multiexit.analysis.measuring import AnalysisData
from timm_multiexit.analysis.runs import Run, read_runs
from timm_multiexit.analysis.study import Study, summary_rows
from timm_multiexit.cli.flags.parser import ScriptParser, add_flags, switch, value
from timm_multiexit.cli.launch import setup_logging
from timm_multiexit.cli.validate_data import create_split
from timm_multiexit.data.loaders import create_eval_loader
from timm_multiexit.evaluation.stamp import name_dataset
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.text import format_table

_FLAGS = (
    value('--data-dir', str, None, 'DIR', "data folder, if not the first run's"),
    value('--dataset', str, None, 'NAME', "timm data set, if not the first run's"),
    value('--split', str, None, 'NAME', "split to measure on, if not that of the first run's table"),
    value('--out', str, 'output/analysis', 'DIR', 'where pictures and analysis.json are written'),
    value('--reference', str, None, 'NAME', "run, or method of a run, that gains are over, if not the first of 'ce'"),
    value('--samples', int, 500, 'N', 'images of the dissimilarity matrices, at most'),
    value('--seed', int, 0, 'N', 'of the choice of these'),
    value('-b --batch-size', int, 256, 'N', 'batch size'),
    value('-j --workers', int, 4, 'N', 'data loading processes'),
    switch('--pin-mem', 'pin host memory for transfers'),
    switch('--no-prefetcher', 'leave out the prefetcher'),
)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Return the arguments.

    Raises:
        MultiExitError: A number is out of range.
    """
    parser = ScriptParser(prog='analysis', description='Draw the figures of the EED paper for runs of train.py.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run of train.py')
    add_flags(parser, 'Analysis', _FLAGS)
    args = parser.parse_args(argv)
    for name, least in (('samples', 2), ('seed', 0), ('batch_size', 1), ('workers', 0)):
        number = getattr(args, name)
        if number < least:
            raise MultiExitError(f'--{name.replace("_", "-")} is {number}, allowed are integers from {least}.')
    return args


def complete_args(args: Namespace, run: Run) -> Namespace:
    """Return the arguments with what the run says of its data where they do not."""
    own = run.args
    given = {name: item for name, item in vars(args).items() if item is not None}
    data = {name: own.get(name) for name in ('data_dir', 'dataset', 'class_map', 'input_img_mode')}
    # A folder that is named is not to be passed over for the digits of a demo.
    if args.data_dir and not args.dataset and own.get('is_demo'):
        data['dataset'] = ''
    split = own.get('test_split') or own.get('val_split')
    defaults = {'reference': None, 'dataset_download': False, 'split': split, **data}
    completed = Namespace(**{**defaults, **given})
    if not completed.split:
        raise MultiExitError(f'{run.name} was measured on no split: name one with --split.')
    return completed


def create_analysis_data(args: Namespace, accelerator: Accelerator) -> AnalysisData:
    """Return the images that the completed arguments name."""

    def create_loader(dataset: Any, data_config: Any) -> Any:
        return create_eval_loader(args, dataset, data_config, accelerator)

    name = name_dataset(args.dataset, args.data_dir)
    return AnalysisData(name, args.split, partial(create_split, args, args.split), create_loader)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    setup_logging()
    try:
        args = parse_args(argv)
        runs = read_runs(args.runs)
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise MultiExitError('The analysis runs in one process: start it with timm-multiexit analyze.')
        args = complete_args(args, runs[0])
        study = Study(
            runs,
            create_analysis_data(args, accelerator),
            Path(args.out),
            device=accelerator.device,
            reference=args.reference,
            num_samples=args.samples,
            seed=args.seed,
        )
        content = study.run()
    except MultiExitError as error:
        print(f'analysis: error: {error}', file=sys.stderr)
        return 2
    print(f'\n{format_table(summary_rows(content["runs"]))}\n\n{args.out} has the figures and analysis.json.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
