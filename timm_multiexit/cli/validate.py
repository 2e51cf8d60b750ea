"""Accuracy and cost of every exit: `validate.py --model local-dir:output/train/RUN/best --data-dir DIR`.

Takes a model folder, a training checkpoint or a timm name. Flags are timm's, and those of dynamic inference: with
--calib-split or --calib-from-train also the accuracy for each budget (`validate.py --help`).
"""

import csv
import io
import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data.config import resolve_data_config

from timm_multiexit.checkpoints.save import hash_weights, save_policy
from timm_multiexit.checkpoints.source import create_backbone, find_source
from timm_multiexit.checkpoints.timm_checkpoint import load_checkpoint, read_training_checkpoint, restore_exits
from timm_multiexit.cli.build_model import create_static, model_kwargs
from timm_multiexit.cli.flags.validate_args import (
    asked_flags,
    check_budgets,
    check_outputs,
    check_preparation,
    check_validate_args,
    chooses_thresholds,
    create_validate_parser,
    find_own_folder,
    given_policy,
    picture_path,
    policy_path,
)
from timm_multiexit.cli.launch import choose_precision, setup_logging
from timm_multiexit.cli.validate_data import create_validation_data
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.evaluation.pictures import draw_validation
from timm_multiexit.evaluation.stamp import describe_inputs, name_dataset
from timm_multiexit.evaluation.validator import Questions, Validation, Validator
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError, StateError
from timm_multiexit.utils.files import sha256, write_output

_logger = logging.getLogger(__name__)

# Arguments of the run that wrote a checkpoint, used for flags that are not given here.
_REMEMBERED = 'model num_classes img_size input_size in_chans gp mean std crop_pct interpolation model_kwargs'.split()


def create_evaluated_model(args: Namespace) -> MultiExitModel:
    """Return the model that the flags name, with the exits it was saved with."""
    checkpoint = read_training_checkpoint(args.checkpoint) if args.checkpoint else {}
    trained = vars(checkpoint['args']) if 'args' in checkpoint else {}
    for name in _REMEMBERED:
        if not getattr(args, name) and trained.get(name):
            setattr(args, name, trained[name])
    if args.model is None:
        raise InvalidValueError('No model: give --model NAME, --model local-dir:FOLDER, or --checkpoint PATH.')
    source = find_source(args.model, **args.model_kwargs)
    kwargs, size = model_kwargs(args, source)
    if source is not None:
        args.model = source.name
        kwargs['pretrained'] = True
    if args.exits is not None or (source is not None and source.config.exits):
        heads = {'head': args.exit_head, 'head_widths': args.head_widths}
        model = create_model(source or args.model, exits=args.exits, input_size=size, **heads, **kwargs)
    else:
        backbone = create_backbone(source or args.model, **kwargs)
        has_exits = (checkpoint.get('task_state') or {}).get('exits')
        model = restore_exits(backbone, checkpoint) if has_exits else MultiExitModel(backbone, [])
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    return model


def build_validator(
    args: Namespace,
    model: MultiExitModel,
    data_config: dict[str, Any],
    accelerator: Accelerator,
    *,
    show: Callable[[str], None] = lambda text: None,
) -> Validator:
    """Return the validator of the model; everything that can be checked before the evaluation is checked.

    The model is on its device and in eval mode, `data_dir`, `dataset` and `split` of the flags are resolved. `show` is
    called with each section of the report as text as soon as it is measured.
    """
    check_validate_args(args, model, accelerator.num_processes)
    check_preparation(args, model, data_config)
    data = create_validation_data(args, model, data_config, accelerator)
    validator = Validator(
        model,
        data,
        read_questions(args, len(model.exits)),
        accelerator=accelerator,
        name=args.model,
        show=show,
    )
    check_budgets(args, model, validator.costs)
    check_outputs(args)
    return validator


def read_questions(args: Namespace, num_exits: int) -> Questions:
    """Return what the flags ask of a model with that many exits."""
    policies = {}
    if args.threshold is not None:
        text = ','.join('none' if value is None else f'{value:g}' for value in args.threshold)
        policies[f'threshold {text}'] = given_policy(args, num_exits)
    return Questions(
        policies=policies,
        budgets=tuple(args.budget),
        max_drop=args.max_drop,
        criterion=args.criterion,
        combine=args.combine,
        time_rounds=args.time_rounds,
        needs_logits=bool(asked_flags(args)),
        **({} if args.delta is None else {'delta': args.delta}),
    )


def validate(args: Namespace, accelerator: Accelerator) -> tuple[Validation, dict[str, Any]]:
    """Return the validation of the model that the flags name, and the sections about its inputs and its picture."""
    args.data_dir = args.data_dir or args.data
    if not args.data_dir and not args.dataset:
        args.dataset, args.split = DIGITS, 'test'
        _logger.info('No data named (--data-dir, --dataset): the test split of the handwritten digits.')
    model = create_evaluated_model(args).to(accelerator.device).eval()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    data_config = resolve_data_config(vars(args), model=model)
    # Hashed before the evaluation: a run that is still training may write new weights into its folder.
    weights = hash_own_weights(args, model) if accelerator.is_main_process else None

    def show(text: str) -> None:
        if accelerator.is_main_process:
            print(f'\n{text}', flush=True)

    validator = build_validator(args, model, data_config, accelerator, show=show)
    in_chans = data_config['input_size'][0]
    statics = {name: create_static(name, num_classes=model.num_classes, in_chans=in_chans) for name in args.compare}
    validation = validator.run()
    has_dynamic = 'failure_auroc' in validation.sections
    if has_dynamic and not chooses_thresholds(args) and not args.budget:
        show('No budgets: give --calib-split NAME or --calib-from-train N to choose thresholds on.')
    if args.save_policy:
        show(save_chosen_policy(args, validation, weights))
    if has_dynamic and statics:
        validator.compare(validation, statics)
    picture = draw_picture(args, validation) if has_dynamic else {}
    inputs = describe_inputs(
        model,
        data_config,
        dataset=name_dataset(args.dataset, args.data_dir),
        precision=accelerator.mixed_precision,
        weights=weights,
    )
    return validation, {**inputs, **validation.sections, **picture}


def hash_own_weights(args: Namespace, model: MultiExitModel) -> dict[str, str] | None:
    """Return the hashes of the folder of which the model has all weights; None for none, or if nothing is written."""
    is_written = args.save_policy or (args.results_file and args.results_format == 'json')
    folder = find_own_folder(args, model) if is_written else None
    return None if folder is None else hash_weights(folder)


def save_chosen_policy(args: Namespace, validation: Validation, weights: Mapping[str, str] | None) -> str:
    """Write the policy and the table of budgets beside the weights, and return a line about them."""
    path = policy_path(args)
    if path is None or validation.budgets is None:
        raise StateError('--save-policy needs a model folder and images to choose thresholds on.')
    if hash_weights(path.parent) != weights:
        raise StateError(
            f'{path.parent} got other weights in the meantime, so the policy was not saved. Run validate.py again.'
        )
    save_policy(path.parent, validation.policy, validation.budgets)
    name = f'budget {args.budget[0]}' if args.budget else f'max drop {args.max_drop:g}'
    return (
        f'{path} has the policy of {name} and a table of {len(validation.budgets.points)} budgets, chosen on'
        f" {validation.sections['calibrated_on']}: create_model('{args.model}', pretrained=True).policy"
    )


def draw_picture(args: Namespace, validation: Validation) -> dict[str, Any]:
    """Draw accuracy over MACs if the flags name a file, and return its section; empty without matplotlib."""
    path, table = picture_path(args), validation.table
    if path is None:
        return {}
    title = f'{short_name(args.model)}, {args.split} split, {table.num_samples} images'
    picture = draw_validation(table.rows, validation.sections, title)
    if picture is None:
        return {}
    write_output(path, picture)
    _logger.info(f'{path} shows accuracy over MACs.')
    place = os.path.relpath(path, Path(args.results_file or path).parent)
    return {'picture': {'path': place, 'sha256': sha256(path)}}


def short_name(model: str) -> str:
    """Return a model's name for a heading; of a long path its last two parts.

    >>> short_name('local-dir:/data/output/train/run/best'), short_name('resnet18.a1_in1k')
    ('run/best', 'resnet18.a1_in1k')
    """
    return '/'.join(Path(model.removeprefix('local-dir:')).parts[-2:])


def write_results(args: Namespace, validation: Validation, sections: Mapping[str, Any]) -> None:
    """Write the table: csv has one line per classifier, json also the other sections and the environment."""
    table = validation.table
    if args.results_format == 'json':
        results = {'model': args.model, 'split': args.split, 'num_samples': table.num_samples, 'rows': table.rows}
        text = json.dumps({**results, **sections, **describe_environment()}, indent=2) + '\n'
    else:
        file = io.StringIO()
        columns = ['model', *(key for key in table.rows[0] if key != 'exit_idx')]
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows({'model': args.model, **row} for row in table.rows)
        text = file.getvalue()
    write_output(Path(args.results_file), text.encode())


def main(argv: Sequence[str] | None = None, prog: str = 'validate.py') -> int:
    """Run the command line and return the exit code: 0, or 2 for an error of one line."""
    setup_logging()
    args = create_validate_parser(prog).parse_args(argv)
    try:
        accelerator = Accelerator(mixed_precision=choose_precision(args, torch.accelerator.is_available()))
        validation, sections = validate(args, accelerator)
        if args.results_file and accelerator.is_main_process:
            write_results(args, validation, sections)
    except MultiExitError as error:
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
