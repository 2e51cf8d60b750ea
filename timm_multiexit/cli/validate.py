"""Accuracy and cost of every exit: `validate.py --model local-dir:output/train/RUN/best --data-dir DIR`.

Takes a model folder, a training checkpoint or a timm name. Flags are timm's, and those of dynamic inference: with
--calib-split or --calib-from-train also the accuracy for each budget (`validate.py --help`).
"""

import csv
import gc
import io
import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from timm.data.config import resolve_data_config
from timm.layers import set_fast_norm
from timm.models import reparameterize_model
from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step

from timm_multiexit.checkpoints.save import hash_weights, save_policy
from timm_multiexit.checkpoints.source import create_backbone, find_source
from timm_multiexit.checkpoints.timm_checkpoint import build_exits, load_checkpoint, read_training_checkpoint
from timm_multiexit.cli.build_model import create_cascade, create_static, keep_classes, model_kwargs
from timm_multiexit.cli.flags.exit_flags import join_shares
from timm_multiexit.cli.flags.validate_args import (
    asked_flags,
    check_alone,
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
    resolve_data,
    timed_sizes,
)
from timm_multiexit.cli.launch import create_accelerator, setup_logging, warn_of_workers
from timm_multiexit.cli.validate_data import create_validation_data
from timm_multiexit.evaluation.cascade import Cascade
from timm_multiexit.evaluation.labels import LabelMetrics, read_valid_labels
from timm_multiexit.evaluation.pictures import draw_validation
from timm_multiexit.evaluation.speed import compile_network
from timm_multiexit.evaluation.stamp import describe_inputs, name_dataset
from timm_multiexit.evaluation.validator import Questions, Validation, Validator
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError, StateError, one_line
from timm_multiexit.utils.files import sha256, write_output
from timm_multiexit.utils.text import format_table

_logger = logging.getLogger(__name__)

_Model = TypeVar('_Model', MultiExitModel, Cascade)

# Arguments of the run that wrote a checkpoint, used for flags that are not given here.
_REMEMBERED = 'model num_classes img_size input_size in_chans gp mean std crop_pct interpolation model_kwargs'.split()


def create_evaluated_model(args: Namespace) -> MultiExitModel:
    """Return the model that the flags name, with the exits it was saved with."""
    checkpoint = read_training_checkpoint(args.checkpoint) if args.checkpoint else {}
    args_then = checkpoint.get('args')  # None or a dict where another trainer wrote the file
    trained = vars(args_then) if isinstance(args_then, Namespace) else {}
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
        model = build_exits(backbone, args.checkpoint) if args.checkpoint else MultiExitModel(backbone, [])
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    if args.valid_labels:
        keep_classes(model, read_valid_labels(args.valid_labels, model.num_classes))
    if args.reparam:
        reparameterize_model(model, inplace=True)
    return model


def place_evaluated_model(args: Namespace, model: _Model, device: torch.device) -> _Model:
    """Return the model on a device, in eval mode, as the flags want it to run."""
    if args.fast_norm:
        set_fast_norm()
    model.to(device=device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None).eval()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.torchcompile:
        torch._dynamo.config.recompile_limit = 64  # one forward serves several modes and batch sizes
        for network in model.children() if isinstance(model, Cascade) else (model,):
            compile_network(network, backend=args.torchcompile, mode=args.torchcompile_mode)
    return model


def resolve_images(args: Namespace, model: MultiExitModel) -> dict[str, Any]:
    """Return timm's data configuration: the flags', else the model's, of the size that it was trained with."""
    config = resolve_data_config(vars(args), model=model)
    own = resolve_data_config(vars(args), model=model, use_test_size=True)
    if own['input_size'] != config['input_size'] and not args.use_train_size:
        _logger.info(
            f'Images of {config["input_size"][-1]} px, as in training. For the size that timm tests this model with,'
            f' give --img-size {own["input_size"][-1]} --crop-pct {own["crop_pct"]:g}.'
        )
    if args.crop_border_pixels:
        config['crop_border_pixels'] = args.crop_border_pixels
    return config


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
    if not (args.data or args.data_dir or args.dataset):
        _logger.info('No data named (--data-dir, --dataset): a split of the handwritten digits.')
    resolve_data(args)
    given = dict(vars(args))
    model = place_evaluated_model(args, create_evaluated_model(args), accelerator.device)
    data_config = resolve_images(args, model)
    # Hashed before the evaluation: a run that is still training may write new weights into its folder.
    weights = hash_own_weights(args, model) if accelerator.is_main_process else None

    def show(text: str) -> None:
        if accelerator.is_main_process:
            print(f'\n{text}', flush=True)

    validator = build_validator(args, model, data_config, accelerator, show=show)
    labels = create_label_metrics(args, validator)
    in_chans = data_config['input_size'][0]
    statics = {
        name: place_evaluated_model(
            args, create_static(name, num_classes=model.num_classes, in_chans=in_chans), torch.device('cpu')
        )
        for name in args.compare
    }
    cascade = create_cascade(args, given, model, data_config) if args.compare_cascade else None
    validation = validator.run()
    if labels is not None:
        show(add_label_metrics(labels, validator, validation))
    has_dynamic = 'failure_auroc' in validation.sections
    if has_dynamic and not chooses_thresholds(args) and not args.budget:
        show('No budgets: give --calib-split NAME or --calib-from-train N to choose thresholds on.')
    if args.save_policy:
        show(save_chosen_policy(args, validation, weights))
    if has_dynamic and statics:
        validator.compare(validation, statics)
    if has_dynamic and cascade is not None:
        place_evaluated_model(args, cascade, accelerator.device)
        small, large = args.compare_cascade
        validator.compare_cascade(validation, cascade, (small, large), statics=statics, batch_sizes=timed_sizes(args))
    picture = draw_picture(args, validation) if has_dynamic else {}
    inputs = describe_inputs(
        model,
        data_config,
        dataset=name_dataset(args.dataset, args.data_dir),
        precision=accelerator.mixed_precision,
        weights=weights,
    )
    return validation, {**inputs, **validation.sections, **picture}


def create_label_metrics(args: Namespace, validator: Validator) -> LabelMetrics | None:
    """Return what measures by the flags' other labels and averages; None if they name none."""
    if not args.real_labels and not args.metrics_avg:
        return None
    if args.real_labels and validator.model.num_classes < 5:
        raise InvalidValueError('--real-labels needs a model of the 1000 classes of ImageNet.')
    dataset, num_exits = validator.data.dataset, len(validator.model.exits)
    return LabelMetrics(num_exits, dataset, real_labels=args.real_labels, average=args.metrics_avg)


def add_label_metrics(labels: LabelMetrics, validator: Validator, validation: Validation) -> str:
    """Add these metrics to the rows of the table and return them as a table of their own."""
    data = validator.data
    found = labels.run(
        validator.model,
        data.create_loader(data.dataset, data.config),
        accelerator=validator.accelerator,
        channels_last=data.channels_last,
    )
    for row, values in zip(validation.table.rows, found.values()):
        row |= values
    return format_table([{'exit': name.removeprefix('exit'), **values} for name, values in found.items()])


def validate_again(args: Namespace, accelerator: Accelerator) -> tuple[Validation, dict[str, Any]]:
    """Return what `validate` does; with `--retry` in smaller and smaller batches where memory runs out, as in timm."""
    while True:
        try:
            return validate(args, accelerator)
        except RuntimeError as error:
            smaller = decay_batch_step(args.batch_size)
            if not args.retry or not smaller or isinstance(error, MultiExitError) or not _lacks_memory(error):
                raise
            _logger.warning(f'{one_line(error)}. Again with --batch-size {smaller}.')
        args.batch_size = smaller
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _lacks_memory(error: RuntimeError) -> bool:
    return 'memory' in str(error).lower() and check_batch_size_retry(str(error))


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
        raise StateError(f'{path.parent} got other weights in the meantime, so the policy was not saved. Run it again.')
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
    args = create_validate_parser(prog).parse_args(join_shares(argv))
    try:
        check_alone(args)
        accelerator = create_accelerator(args)
        if accelerator.is_fsdp2:
            raise StateError('validate.py does not shard the model, got --use_fsdp: leave it out of accelerate launch.')
        if accelerator.is_main_process:
            warn_of_workers(args.workers)
        validation, sections = validate_again(args, accelerator)
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
