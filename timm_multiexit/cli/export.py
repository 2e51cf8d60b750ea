"""Programs that stop early without Python: `timm-multiexit export output/train/RUN --output FOLDER`.

Takes a run, a model folder, or hf-hub:ORG/NAME, and writes ONNX (and torch.export) programs with a manifest and a
runner that needs onnxruntime and numpy alone.
"""

import json
import os
import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from timm_multiexit.calibration.stage_costs import StageCosts, adapt_budgets
from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.checkpoints.run_folder import RunFolder
from timm_multiexit.checkpoints.source import find_source
from timm_multiexit.cli.flags.exit_flags import parse_thresholds
from timm_multiexit.cli.flags.int8_flags import INT8_FLAGS, add_int8, check_int8_flags, describe_int8, draw_images
from timm_multiexit.cli.flags.parser import Choice, ScriptParser, add_flags, option_name, positive_int, value
from timm_multiexit.cli.flags.validate_args import given_policy
from timm_multiexit.deploy.export import FORMATS, FORMS, check_programs, export
from timm_multiexit.deploy.manifest import EXPORT_FILES, EXPORT_MARKS, MANIFEST_NAME, RUNNER_NAME
from timm_multiexit.deploy.programs import check_exported_size, check_extra
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.budgets import parse_budget
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA, ExitPolicy
from timm_multiexit.utils.errors import DataError, InvalidValueError, MultiExitError, one_line
from timm_multiexit.utils.files import check_new_folder
from timm_multiexit.utils.text import format_table

_FLAGS = (
    value('model', str, None, 'MODEL', 'folder of a run or of a model, or hf-hub:ORG/NAME'),
    value('--output', Path, None, 'FOLDER', 'folder to write; an earlier export is replaced', required=True),
    value('--forms', Choice(*FORMS), list(FORMS), None, 'programs to write', nargs='+'),
    value('--formats', Choice(*FORMATS), ['onnx'], None, 'onnx, and pt2 for torch.export.load', nargs='+'),
    value('--img-size', positive_int, None, 'N', "height and width of an image, if not the model's"),
    value('--class-names', Path, None, 'FILE', 'names of the classes, one a line, if the model has none'),
)

_POLICY_FLAGS = (
    value('--budget', str, None, 'B', "mean cost of an image, of the model's table: 60%, 1.2GMACs or 5ms"),
    value('--threshold', parse_thresholds, None, 'T', 'thresholds: 0.9 for all exits, or 0.9,none,0.8 for each'),
    value('--criterion', Choice(*CRITERIA), None, None, 'what --threshold is compared with, if not confidence'),
    value('--combine', Choice(*COMBINATIONS), None, None, 'what answers with --threshold, if not the exit alone'),
)


def create_exported_model(name: str) -> MultiExitModel:
    """Return the model that a run, a folder or a repository holds.

    Raises:
        InvalidValueError: It is neither.
    """
    if not name.startswith(('hf-hub:', 'local-dir:')):
        folder = Path(name)
        folder = folder if os.path.isfile(folder / CONFIG_NAME) else RunFolder(folder).best
        if not os.path.isfile(folder / CONFIG_NAME):  # pathlib raises for names that are too long
            raise InvalidValueError(
                f'MODEL must be the folder of a run or of a model, or hf-hub:ORG/NAME, got {name!r}.'
            )
        name = f'local-dir:{folder}'
    source = find_source(name)
    if source is None or not source.has_exits:
        raise InvalidValueError(f'MODEL must have exits to be exported, got {name!r} without any.')
    return create_model(source, pretrained=True).eval()


def check_export_flags(args: Namespace) -> None:
    """Raise for what can be told of the flags without the model.

    Raises:
        InvalidValueError: A value is out of range, flags do not go together, or --output holds other files.
        StateError: The extra `onnx` is not installed.
    """
    check_programs(args.forms, args.formats)
    check_int8_flags(args)
    if args.int8 and not ('onnx' in args.formats and 'stages' in args.forms):
        raise InvalidValueError('--int8 is made of the stages in ONNX: ask for both by --formats and --forms.')
    if args.budget is not None and args.threshold is not None:
        raise InvalidValueError('--budget and --threshold are mutually exclusive: give one of them.')
    if args.budget is not None:
        parse_budget(args.budget)
    for dest in ('criterion', 'combine'):
        if getattr(args, dest) is not None and args.threshold is None:
            raise InvalidValueError(f'{option_name(dest)} is for --threshold: give both, or neither.')
    if args.threshold is not None:
        given_policy(args, len(args.threshold))
    check_new_folder(args.output, EXPORT_MARKS, EXPORT_FILES)
    if 'onnx' in args.formats:
        check_extra()


def choose_policy(
    args: Namespace, model: MultiExitModel, input_size: tuple[int, int, int] | None = None
) -> ExitPolicy | None:
    """Return the policy that the flags name for images of a size, None for the model's own."""
    if args.threshold is not None:
        return given_policy(args, len(model.exits))
    if args.budget is None:
        return None
    if model.budgets is None:
        raise InvalidValueError(
            '--budget needs a model with a table of budgets: choose thresholds with validate --save-policy first.'
        )
    if input_size is None:
        return model.budgets.select(args.budget).policy
    check_exported_size(model, input_size)
    costs = StageCosts.from_exit_costs(model.cost(input_size))
    return adapt_budgets(model.budgets, costs).select(args.budget).policy


def read_class_names(path: Path | None) -> list[str] | None:
    """Return the lines of a file of names; None for no file."""
    if path is None:
        return None
    try:
        return [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f'Cannot read --class-names {path}: {one_line(error)}.') from error


def describe_folder(folder: Path) -> str:
    """Return what an exported folder has, as a table."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding='utf-8'))
    programs, total = manifest['programs']['fp32'], manifest['plain_macs']
    rows = []
    for idx, entry in enumerate(manifest['exits']):
        row = {'exit': entry['name'].removeprefix('exit ')}
        row['MACs, % of main'] = 100 * entry['macs']['sequential'] / total
        for form in ('fixed', 'stages'):
            if programs[form]:
                row[f'{form}, KB'] = manifest['files'][programs[form][idx]]['size'] / 1e3
        rows.append(row)
    return format_table(rows)


def describe_use(folder: Path) -> str:
    """Return how an exported folder is used: a command, or without what it needs a line of Python."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding='utf-8'))
    programs = manifest['programs']['fp32']
    if programs['stages'] or programs['conditional']:
        command = ['python', str(folder / RUNNER_NAME), str(folder), 'PICTURE']
        return shlex.join(command if manifest['policy'] else [*command, '--threshold', '0.9'])
    if programs['fixed']:
        return f'Runner({str(folder)!r})(images, exit_idx=0) with {folder / RUNNER_NAME}'
    path = (manifest['pt2']['fixed'] or manifest['pt2']['stages'])[0]
    return f'torch.export.load({str(folder / path)!r}).module()(images)'


def main(argv: Sequence[str] | None = None, prog: str = 'timm-multiexit export') -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    parser = ScriptParser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_flags(parser, 'Export', _FLAGS)
    add_flags(parser, 'Policy of the conditional program and the manifest', _POLICY_FLAGS)
    add_flags(parser, 'int8', INT8_FLAGS)
    args = parser.parse_args(argv)
    try:
        check_export_flags(args)
        class_names = read_class_names(args.class_names)
        model = create_exported_model(args.model)
        images = draw_images(args, model) if args.int8 else None
        size = None if args.img_size is None else (model.in_chans, args.img_size, args.img_size)
        export(
            model,
            args.output,
            forms=args.forms,
            formats=args.formats,
            input_size=size,
            class_names=class_names,
            policy=choose_policy(args, model, size),
        )
        print(describe_folder(args.output))
        if images is not None:
            print(describe_int8(add_int8(args.output, images, limit=args.int8_limit)))
        print(f'Wrote {args.output}: {describe_use(args.output)} answers.')
    except MultiExitError as error:
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
