#!/usr/bin/env python3
"""Publish a run of train.py: `hub/publish.py output/train/RUN ORG/NAME`.

Writes the folder that would be published and says what would go where; with --yes it goes there, as one commit. Run
again, it sends what has changed, and nothing if nothing has.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm_multiexit as tme
from timm_multiexit.hub_client.client import PushPlan, check_push, full_name, plan_push, push_folder
from timm_multiexit.publishing.card import headline
from timm_multiexit.publishing.licenses import Labels
from timm_multiexit.publishing.publication import PUBLICATION_NAME, write_publication
from timm_multiexit.publishing.push import list_model


def create_parser(prog: str = 'publish.py') -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run', type=Path, metavar='RUN', help='folder of the run')
    parser.add_argument('repo_id', nargs='?', metavar='ORG/NAME', help='repository on the Hub; none: write the folder')
    parser.add_argument('--yes', action='store_true', help='push; without it nothing is sent')
    parser.add_argument('--folder', type=Path, help='where to write what is published, RUN/publication if not given')
    parser.add_argument(
        '--validation', type=Path, help="validate.py's JSON results with budgets, RUN/validation.json if it is there"
    )
    parser.add_argument('--private', action='store_true', help='make a private repository')
    parser.add_argument('--tag', help='name that the commit gets as well, v1')
    parser.add_argument('--message', default='Publish with timm_multiexit', help='title of the commit')
    parser.add_argument('--license', help='of the weights, if not that of those that training started from')
    parser.add_argument('--base-model', metavar='ORG/NAME', help='what training started from, if the run does not say')
    parser.add_argument('--dataset-id', metavar='ORG/NAME', help='the data set on the Hub, uoft-cs/cifar10')
    parser.add_argument('--models-file', type=Path, metavar='FILE', help='enter it into this list, as hub/models.yaml')
    return parser


def describe(plan: PushPlan, folder: Path) -> str:
    """Return what a push would do, a line per file."""
    state = f'after commit {plan.parent[:12]}' if plan.parent else 'which is made'
    lines = [f'{folder} to {plan.endpoint}/{plan.repo_id}, {state}:']
    lines += [f'  {change.action:6} {change.path} ({change.size:,} bytes)' for change in plan.changes]
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None, prog: str = 'publish.py') -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    args = create_parser(prog).parse_args(argv)
    try:
        if args.yes and not args.repo_id:
            raise tme.MultiExitError('--yes needs a repository to push to: name ORG/NAME.')
        repo_id = None
        if args.repo_id:
            repo_id = check_push(args.repo_id, private=args.private) if args.yes else full_name(args.repo_id)
        folder = args.folder or args.run / PUBLICATION_NAME
        labels = Labels(args.license, args.base_model, args.dataset_id)
        metrics = write_publication(args.run, folder, repo_id, labels=labels, validation=args.validation)
        print(f'{headline(metrics)}\nLicense: {metrics["license"]["note"]}')
        if repo_id is None:
            print(f'{folder} is written.')
            return 0
        try:
            plan = plan_push(folder, repo_id, private=args.private)
        except tme.MultiExitError as error:
            raise tme.MultiExitError(f'{folder} is written, what would go where is not known: {error}') from error
        print(describe(plan, folder))
        if not args.yes:
            print('Nothing was sent: add --yes to push.')
            return 0
        result = push_folder(folder, repo_id, private=args.private, tag=args.tag, message=args.message)
        if args.models_file:
            list_model(args.models_file, metrics, result, tag=args.tag)
        print(f'{"Pushed" if result.has_changed else "Nothing has changed"}: {result.url}')
    except tme.MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
