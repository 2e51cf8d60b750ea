#!/usr/bin/env python3
"""Print the tables of results/ as Markdown: `hub/experiments/table.py [hub/experiments/plans/small.yaml ...]`.

Without a plan, of all plans. --readme writes them between two comments of docs/results.md, and their summary between
two of README.md.
"""

import argparse
import sys
from pathlib import Path

from evidence.plan import METHODS_FILE, read_plan, read_yaml
from evidence.results import check_same_flags, read_results, result_path
from evidence.table import format_summary, format_tables, place_in

from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_text

HERE = Path(__file__).resolve().parent


def make_tables(plan_files: list[Path], results_dir: Path) -> tuple[str, str]:
    """Return the tables and their summary; without plans, those of all.

    Raises:
        MultiExitError: A plan or a result cannot be read, or they contradict each other.
    """
    results = read_results(results_dir)
    by_name = {result['name']: result for result in results}
    plans = [read_plan(path) for path in plan_files or sorted((HERE / 'plans').glob('*.yaml'))]
    # What has been measured comes first.
    plans.sort(key=lambda plan: not any(run.name in by_name for run in plan.runs))
    for run in (run for plan in plans for run in plan.runs):
        if run.name in by_name:
            check_same_flags(run, by_name[run.name]['flags'], result_path(results_dir, run))
    return format_tables(plans, results, list(read_yaml(HERE / METHODS_FILE))), format_summary(plans, results)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plans', type=Path, nargs='*', metavar='PLAN', help='hub/experiments/plans/NAME.yaml')
    parser.add_argument('--results', type=Path, default=HERE / 'results', metavar='DIR', help='folder of results')
    parser.add_argument(
        '--readme',
        type=Path,
        nargs='?',
        const=HERE.parents[1],
        metavar='DIR',
        help='write into README.md and docs/results.md of this folder (default: of the repository)',
    )
    args = parser.parse_args(argv)
    try:
        tables, summary = make_tables(args.plans, args.results)
        if args.readme:
            texts = {args.readme / 'README.md': summary, args.readme / 'docs/results.md': tables}
            placed = {path: place_in(path.read_text(encoding='utf-8'), text) for path, text in texts.items()}
            for path, text in placed.items():
                write_text(path, text)
        else:
            print(tables, end='')
    except (MultiExitError, OSError) as error:
        print(f'table.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
