#!/usr/bin/env python3
"""Work through a plan: `hub/experiments/run.py hub/experiments/plans/small.yaml --data-dir DIR --jobs 2`.

Trains every run that has no file in hub/experiments/results/ yet and writes one for each that ends. It can be stopped
at any moment, and started again. Flags after -- go to train.py: `-- --amp --workers 4`.
"""

import argparse
import sys
from pathlib import Path

from evidence.plan import read_plan
from evidence.runner import Runner, RunnerConfig, describe_state

from timm_multiexit.utils.errors import InvalidValueError, MultiExitError

HERE = Path(__file__).resolve().parent


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plan', type=Path, metavar='PLAN', help='hub/experiments/plans/NAME.yaml')
    parser.add_argument('--data-dir', type=Path, default='.', metavar='DIR', help='holds a folder for each data set')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time, on one GPU too (default: 1)')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='CPU threads of each (default: 1)')
    parser.add_argument('--output', type=Path, default=Path('output/evidence'), metavar='DIR', help='folder of runs')
    parser.add_argument('--results', type=Path, default=HERE / 'results', metavar='DIR', help='folder of results')
    parser.add_argument('--only', default='', metavar='TEXT', help='runs with this in their name')
    parser.add_argument('--list', action='store_true', help='say what is done and what is not, and start nothing')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    It is 0 when all runs are done, 1 if one failed, 2 for an error of one line, 128 + N after signal N.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index('--') if '--' in words else len(words)
    args = create_parser().parse_args(words[:cut])
    try:
        runs = [run for run in read_plan(args.plan).runs if args.only in run.name]
        if not runs:
            raise InvalidValueError(
                f"--only must be part of the name of a run of {args.plan}, see --list, got '{args.only}'."
            )
        config = RunnerConfig(
            args.data_dir,
            args.output.absolute(),
            args.results.absolute(),
            HERE.parents[1] / 'train.py',
            args.jobs,
            args.threads,
            tuple(words[cut + 1 :]),
        )
        if args.list:
            for run in runs:
                print(f'{describe_state(run, config):8} {run.name}')
            return 0
        runner = Runner(runs, config, lambda line: print(line, flush=True))
        if not runner.pending:
            print(f'Nothing to do: {len(runs)} of {len(runs)} runs have results in {args.results}.')
        code = runner.work()
    except MultiExitError as error:
        print(f'run.py: error: {error}', file=sys.stderr)
        return 2
    if runner.failed:
        print(f'run.py: {len(runner.failed)} failed: {", ".join(runner.failed)}', file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.exit(main())
