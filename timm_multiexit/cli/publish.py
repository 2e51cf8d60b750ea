"""Publish a training run: `timm-multiexit publish output/train/RUN ORG/NAME`.

Writes the folder to publish and shows what a push would change; with --yes it is pushed, as one commit. Run again, it
sends only what has changed.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.cli.flags.int8_flags import INT8_FLAGS, add_int8, check_int8_flags, describe_int8, draw_images
from timm_multiexit.cli.flags.parser import ScriptParser, add_flags, switch, value
from timm_multiexit.deploy.export import export
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.programs import check_extra
from timm_multiexit.hub_client.client import PushPlan, check_push, full_name, plan_push, push_folder
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.publishing.card_tables import headline
from timm_multiexit.publishing.licenses import PublicationInfo
from timm_multiexit.publishing.publication import PUBLICATION_NAME, AddPrograms, write_publication
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError

_FLAGS = (
    value('run', Path, None, 'RUN', 'folder of the run'),
    value('repo_id', str, None, 'ORG/NAME', 'repository on the Hub; without it only the folder is written', nargs='?'),
    switch('--yes', 'push; without it nothing is sent'),
    value('--folder', Path, None, 'FOLDER', 'folder to write, if not RUN/publication'),
    value('--validation', Path, None, 'FILE', "validate.py's JSON results with budgets, if not RUN/validation.json"),
    switch('--private', 'create a private repository'),
    value('--tag', str, None, 'TAG', 'tag of the commit, such as v1'),
    value('--message', str, 'Publish with timm_multiexit', 'MESSAGE', 'title of the commit'),
    value('--license', str, None, 'ID', 'license of the weights, if not that of the weights training started from'),
    value('--base-model', str, None, 'ORG/NAME', 'what training started from, if the run does not say'),
    value('--dataset-id', str, None, 'ORG/NAME', 'data set on the Hub, such as uoft-cs/cifar10'),
    value('--dataset-note', str, None, 'TEXT', 'how the images differ from those of the data set: size, compression'),
    switch('--onnx', 'add ONNX programs that stop early, and a runner for them that needs no PyTorch'),
)


def programs_adder(args: Namespace) -> AddPrograms | None:
    """Return what writes the ONNX programs that the flags ask for; None if they ask for none."""
    if args.int8 and not args.onnx:
        raise InvalidValueError('--int8 is for the programs of --onnx: give both.')
    check_int8_flags(args, has_default=True)
    if not args.onnx:
        return None
    check_extra()

    def add(model: MultiExitModel, folder: Path) -> dict[str, Any]:
        of_run = RunFolder(args.run).read_args() if args.int8 else {}
        images = (
            draw_images(args, model, dataset=of_run.get('dataset'), root=of_run.get('data_dir')) if args.int8 else None
        )
        export(model, folder)
        if images is not None:
            print(describe_int8(add_int8(folder, images, limit=args.int8_limit)))
        return describe_programs(folder, args.calib_split)

    return add


def describe_programs(folder: Path, split: str) -> dict[str, Any]:
    """Return what the card says of an exported folder, whose int8 programs were calibrated on a split."""
    manifest = read_manifest(folder)
    sizes = {}
    for precision, programs in manifest['programs'].items():
        sizes[precision] = {
            form: [manifest['files'][path]['size'] for path in programs[form]] for form in ('fixed', 'stages')
        }
    int8 = manifest['int8'] and {**manifest['int8'], 'split': split}
    return {'opset': manifest['opset'], 'bytes': sizes, 'int8': int8}


def describe_plan(plan: PushPlan, folder: Path) -> str:
    """Return what a push would do, a line per file."""
    state = f'after commit {plan.parent[:12]}' if plan.parent else 'a new repository'
    lines = [f'{folder} to {plan.url}, {state}:']
    for path, action in plan.actions.items():
        size = '' if action == 'delete' else f' ({(folder / path).stat().st_size:,} bytes)'
        lines.append(f'  {action:6} {path}{size}')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None, prog: str = 'publish.py') -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    parser = ScriptParser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_flags(parser, 'Publication', _FLAGS)
    add_flags(parser, 'int8, of --onnx', INT8_FLAGS)
    args = parser.parse_args(argv)
    try:
        if args.yes and not args.repo_id:
            raise InvalidValueError('--yes requires a repository to push to: give ORG/NAME.')
        add_programs = programs_adder(args)
        repo_id = None
        if args.repo_id:
            repo_id = check_push(args.repo_id, private=args.private) if args.yes else full_name(args.repo_id)
        folder = args.folder or args.run / PUBLICATION_NAME
        info = PublicationInfo(args.license, args.base_model, args.dataset_id, args.dataset_note)
        metrics = write_publication(
            args.run, folder, repo_id, info=info, validation=args.validation, add_programs=add_programs
        )
        print(f'{headline(metrics)}\nLicense: {metrics["license"]["note"]}\nWrote {folder}.', flush=True)
        if repo_id is None:
            return 0
        print(describe_plan(plan_push(folder, repo_id, private=args.private), folder))
        if not args.yes:
            print('Nothing was sent: add --yes to push.')
            return 0
        result = push_folder(folder, repo_id, private=args.private, tag=args.tag, message=args.message)
        print(f'{"Pushed" if result.has_changed else "Nothing has changed"}: {result.url}')
    except MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
