"""The command line of evaluation, and whether its flags fit the model, the processes and each other."""

import logging
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import parse_model_name

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.cli.flags.exit_flags import EXIT_FLAGS, parse_thresholds
from timm_multiexit.cli.flags.parser import (
    Choice,
    Items,
    ScriptParser,
    add_flags,
    non_negative_int,
    option_name,
    positive_int,
    share_between,
    switch,
    value,
)
from timm_multiexit.cli.flags.timm_flags import TIMM_FLAGS
from timm_multiexit.cli.flags.timm_rules import VALIDATE_RULES, check_rules
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.budgets import parse_budget
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA, ExitPolicy
from timm_multiexit.utils.errors import DiskError, InvalidValueError, StateError, one_line


def _name(text: str) -> str:
    """Return the name of a model without spaces around it; raise `ValueError` if nothing is left."""
    if not text.strip():
        raise ValueError('a name is empty')
    return text.strip()


_logger = logging.getLogger(__name__)

# timm's flags of `validate.py` that its `train.py` does not have.
_DATA_FLAGS = (
    value('--split', str, None, 'NAME', 'split to evaluate, if not validation (without data: test)'),
    value('--num-samples', positive_int, None, 'N', 'images in the split, for streams that do not say'),
    value('--real-labels', str, '', 'FILE', "JSON of ImageNet's reassessed labels (ReaL): accuracy by these too"),
    value('--valid-labels', str, '', 'FILE', 'text file of class indices, one a line: the only classes of the answers'),
)

_IMAGE_FLAGS = (
    switch('--use-train-size', "images as in training, as without it; timm's script takes the test size of its models"),
    value(
        '--crop-mode',
        Choice('center', 'squash', 'border'),
        None,
        None,
        "how images are brought to their size, if not the model's way",
    ),
    value('--crop-border-pixels', positive_int, None, 'N', 'cut this many pixels off every side of the original image'),
)

_MODEL_FLAGS = (
    switch('--reparam', 'fuse branches and norms that the backbone can do without (RepVGG, MobileOne, ...)'),
    switch('--test-pool', "not supported, for timm's own scripts"),
    switch('--tf-preprocessing', "not supported, for timm's own scripts"),
    switch('--aot-autograd', "not supported, for timm's own scripts"),
)

_VALIDATE_FLAGS = (
    value('--checkpoint', str, '', 'PATH', 'training checkpoint (*.pth.tar) to evaluate'),
    switch('--use-ema', "take the checkpoint's averaged weights"),
    value('-b --batch-size', positive_int, 256, 'N', 'images per batch'),
    value('-j --workers', non_negative_int, 4, 'N', 'data loading processes'),
    switch('--pin-mem', 'pin host memory for transfers'),
    switch('--no-prefetcher', 'leave out the prefetcher, which normalizes images on the device'),
    switch('--retry', 'where memory runs out, begin again with a smaller batch'),
    value('--log-freq', positive_int, 10, 'N', 'batches between log lines'),
    value(
        '--metrics-avg', Choice('micro', 'macro', 'weighted'), None, None, 'precision, recall and F1 too, averaged so'
    ),
    value('--results-file', str, '', 'FILE', 'write the results to this file'),
    value('--results-format', Choice('csv', 'json'), 'csv', None, 'csv has the table, json all results'),
    value('--num-gpu', positive_int, 1, 'N', 'taken if 1; torchrun starts several processes'),
)

# What `validate.py` reports of dynamic inference.
_DYNAMIC_FLAGS = (
    value('--calib-split', str, None, 'NAME', 'choose thresholds on this split, which must not be the reported one'),
    value(
        '--calib-from-train',
        positive_int,
        None,
        'N',
        'choose thresholds on the images that train.py --val-from-train N held out',
    ),
    value(
        '--threshold',
        parse_thresholds,
        None,
        'T',
        'thresholds to measure: 0.9 for all exits, or 0.9,none,0.8 for each, none for one not used',
    ),
    value('--criterion', Choice(*CRITERIA), 'confidence', None, 'what the thresholds are compared with'),
    value('--combine', Choice(*COMBINATIONS), None, None, 'let an exit answer with the mean of the exits up to it'),
    value(
        '--budget',
        str,
        [],
        'B',
        'choose thresholds for these mean costs of an image: 60%, 1.2GMACs or 5ms',
        nargs='+',
        action='extend',
    ),
    value(
        '--max-drop',
        share_between,
        None,
        'F',
        "choose thresholds that lose at most this share of main's accuracy: 0.01 is a point",
    ),
    value('--delta', share_between, None, 'P', 'chance that --max-drop is exceeded, 0.1 if not given'),
    value(
        '--time-rounds',
        non_negative_int,
        5,
        'N',
        'rounds in which policies and main are timed in turns, 0: no times',
    ),
    switch(
        '--save-policy',
        "write the first --budget's policy, else --max-drop's, and all budgets into the model folder's config.json",
    ),
    value(
        '--compare',
        str,
        [],
        'NAME',
        'measure models without exits too: timm name, NAME:CHECKPOINT or local-dir:FOLDER',
        nargs='+',
        action='extend',
    ),
    value(
        '--compare-cascade',
        Items(_name, 'two different models, SMALL,LARGE'),
        [],
        'SMALL,LARGE',
        'measure a cascade of two models without exits too, named as for --compare: the second for what the first is'
        ' unsure of',
    ),
    value(
        '--time-batch-sizes',
        positive_int,
        None,
        'N',
        'with --compare-cascade: batch sizes to measure images/s at, 1 and 64 if not given',
        nargs='+',
    ),
    value(
        '--plot',
        str,
        '',
        'PNG',
        'draw accuracy over MACs into this file; with --results-file it is always drawn, beside it',
    ),
)


def create_validate_parser(prog: str = 'validate.py') -> ScriptParser:
    """Return the parser of evaluation."""
    parser = ScriptParser(
        prog=prog,
        description='Accuracy and cost of every exit of a model name, a model folder or a training checkpoint.',
    )
    timm = {flag.dest: flag for flags in TIMM_FLAGS.values() for flag in flags}
    data = 'data data_dir dataset dataset_download class_map input_key input_img_mode target_key target_format'
    data += ' dataset_trust_remote_code'
    model = 'pretrained num_classes gp img_size in_chans input_size crop_pct mean std interpolation channels_last'
    compiled = 'fuser fast_norm torchcompile_mode torchscript torchcompile'
    name, train_split, seed = (replace(timm[dest], default=None) for dest in ('model', 'train_split', 'seed'))
    train_split = replace(train_split, help="training split that --calib-from-train takes images of, if not the run's")
    seed = replace(seed, help="seed of the choice of --calib-from-train, if not the run's")
    name = replace(name, names='--model -m', help='timm name, local-dir:FOLDER or hf-hub:ORG/NAME')
    pretrained = replace(timm['pretrained'], help="take timm's trained weights; a folder's are always taken")
    num_classes = replace(timm['num_classes'], help="classes, if not the model's")
    timm |= {'pretrained': pretrained, 'num_classes': num_classes}
    own = {flag.dest: flag for flag in _MODEL_FLAGS}
    scripting = (*(timm[dest] for dest in compiled.split()), own.pop('aot_autograd'))
    add_flags(parser, 'Data', (*(timm[dest] for dest in data.split()), *_DATA_FLAGS))
    images = (*(timm[dest] for dest in model.split()), *_IMAGE_FLAGS)
    add_flags(parser, 'Model', (name, *images, *own.values(), timm['model_kwargs'], *scripting))
    add_flags(parser, 'Exits', EXIT_FLAGS)
    add_flags(parser, 'Device', [timm[dest] for dest in ('device', 'amp', 'amp_dtype', 'model_dtype')])
    add_flags(parser, 'Evaluation', (*_VALIDATE_FLAGS, timm['task'], timm['multilabel_threshold']))
    add_flags(parser, 'Dynamic inference', (*_DYNAMIC_FLAGS, train_split, seed))
    naflex = replace(timm['naflex_max_seq_len'], help='tokens in evaluation')
    add_flags(parser, "NaFlex, for timm's own validate.py", (timm['naflex_loader'], naflex))
    return parser


def resolve_data(args: Namespace) -> None:
    """Let `args` name the data: where no flag does, a split of the handwritten digits."""
    args.data_dir = args.data_dir or args.data
    is_demo = not args.data_dir and not args.dataset
    args.dataset = DIGITS if is_demo else args.dataset
    args.split = args.split or ('test' if is_demo else 'validation')


_PICTURE_NAME = 'accuracy_vs_macs.png'
_ASKING = (
    *(
        'threshold',
        'budget',
        'max_drop',
        'calib_split',
        'calib_from_train',
        'save_policy',
        'compare',
        'compare_cascade',
    ),
    *('time_batch_sizes', 'plot'),
)
_DATA = 'give --calib-split NAME or --calib-from-train N'


def asked_flags(args: Namespace) -> list[str]:
    """Return the flags of dynamic inference that were given."""
    given = {dest: getattr(args, dest) for dest in _ASKING}
    return [option_name(dest) for dest, value in given.items() if value not in (None, [], '') and value is not False]


def chooses_thresholds(args: Namespace) -> bool:
    """Return whether there are data to choose thresholds on."""
    return args.calib_split is not None or args.calib_from_train is not None


def find_own_folder(args: Namespace, model: MultiExitModel) -> Path | None:
    """Return the folder of which the model has all weights and exits; None if others are in their place."""
    source, name = parse_model_name(args.model)
    if source != 'local-dir' or args.checkpoint or args.exits is not None or args.gp:
        return None
    num_classes = read_model_config(Path(name), overridden=args.model_kwargs).pretrained_cfg.get('num_classes')
    return Path(name) if num_classes in (None, model.num_classes) else None


def given_policy(args: Namespace, num_exits: int) -> ExitPolicy:
    """Return the policy of `--threshold`, for so many exits."""
    thresholds = args.threshold * num_exits if len(args.threshold) == 1 else args.threshold
    policy = ExitPolicy(args.criterion or 'confidence', tuple(thresholds), combine=args.combine)
    policy.check_exits(num_exits)
    return policy


def check_alone(args: Namespace) -> None:
    """Raise for what can be told without model and data: flags that are not supported, and malformed budgets."""
    check_rules(args, VALIDATE_RULES)
    for budget in args.budget:
        parse_budget(budget)
    _check_cascade(args)


def _check_cascade(args: Namespace) -> None:
    names, sizes = args.compare_cascade, args.time_batch_sizes
    if names and not len(names) == len(set(names)) == 2:
        raise InvalidValueError(f'--compare-cascade must be two different models, SMALL,LARGE, got {",".join(names)}.')
    if names and not chooses_thresholds(args):
        raise InvalidValueError(f'--compare-cascade {",".join(names)} needs data to choose thresholds on: {_DATA}.')
    if sizes and not names:
        raise InvalidValueError('--time-batch-sizes needs --compare-cascade SMALL,LARGE.')
    if sizes and max(sizes) > args.batch_size:
        raise InvalidValueError(
            f'--time-batch-sizes must be <= --batch-size {args.batch_size}, got {max(sizes)}. Give a larger batch.'
        )


def timed_sizes(args: Namespace) -> list[int]:
    """Return the batch sizes that images per second are measured at."""
    return args.time_batch_sizes or sorted({1, min(64, args.batch_size)})


def check_validate_args(args: Namespace, model: MultiExitModel, num_processes: int) -> None:
    """Raise where flags of dynamic inference do not fit the model, the processes or each other."""
    check_alone(args)
    if args.save_policy:
        _check_saving(args, model)
    asked = asked_flags(args)
    whole = asked + [option_name(dest) for dest in ('real_labels', 'metrics_avg') if getattr(args, dest)]
    if whole and num_processes > 1:
        raise StateError(f'{whole[0]} needs all logits in one process. Start it without accelerate launch.')
    if asked and not len(model.exits):
        raise InvalidValueError(f'{asked[0]} needs a model with exits, {args.model} has none. See --exits.')
    if model.num_classes < 2 and len(model.exits):
        raise InvalidValueError(
            f'{args.model} has one class, so that every answer is right. Give a model of two or more.'
        )
    if args.threshold is not None:
        given_policy(args, len(model.exits))
    has_data = chooses_thresholds(args)
    if args.calib_split is not None and args.calib_from_train is not None:
        raise InvalidValueError('--calib-split and --calib-from-train exclude each other. Give one of them.')
    if args.budget and not has_data and model.budgets is None:
        raise InvalidValueError(f'--budget {args.budget[0]} needs data to choose thresholds on: {_DATA}.')
    if args.max_drop is not None and not has_data:
        raise InvalidValueError(f'--max-drop {args.max_drop} needs data to choose thresholds on: {_DATA}.')
    _check_effect(args, has_data)
    _check_installed(args)


def _check_installed(args: Namespace) -> None:
    if args.metrics_avg and find_spec('sklearn') is None:
        raise StateError('--metrics-avg needs scikit-learn. Install it with pip install "timm-multiexit[digits]".')
    if args.plot and find_spec('matplotlib') is None:
        raise StateError('--plot needs matplotlib. Install it with pip install "timm-multiexit[plots]".')


def _check_saving(args: Namespace, model: MultiExitModel) -> None:
    """Raise where `--save-policy` has no policy, or no folder whose model it is of."""
    if parse_model_name(args.model)[0] != 'local-dir':
        raise InvalidValueError(f'--save-policy needs --model local-dir:FOLDER, got {args.model}.')
    for dest in ('checkpoint', 'exits', 'gp', 'valid_labels', 'crop_border_pixels', 'model_dtype'):
        if getattr(args, dest):
            raise InvalidValueError(
                f"--save-policy and {option_name(dest)} exclude each other: the policy would be another model's."
                ' Give one of them.'
            )
    if not len(model.exits):
        raise InvalidValueError(f'--save-policy needs a folder with exits, {args.model} holds a plain timm model.')
    if find_own_folder(args, model) is None:
        raise InvalidValueError(
            f"--save-policy needs the folder's own classes, got {model.num_classes} others. Leave out --num-classes."
        )
    if not chooses_thresholds(args):
        raise InvalidValueError(f'--save-policy needs data to choose thresholds on: {_DATA}.')
    if not args.budget and args.max_drop is None:
        raise InvalidValueError('--save-policy needs a policy to save. Give --budget B or --max-drop F.')


def check_preparation(args: Namespace, model: MultiExitModel, data_config: dict[str, Any]) -> None:
    """Raise for a policy that is to be saved for images preprocessed in another way than its folder says.

    Warn where thresholds that the model has are used on such images.
    """
    uses_own = not chooses_thresholds(args) and (args.budget or (model.policy is not None and args.threshold is None))
    if not args.save_policy and not uses_own:
        return
    for name, own in resolve_data_config(model=model).items():
        texts = [str(list(value) if isinstance(value, (list, tuple)) else value) for value in (own, data_config[name])]
        if texts[0] == texts[1]:
            continue
        if args.save_policy:
            raise InvalidValueError(
                f"--save-policy needs the folder's own {name} {texts[0]}, got {texts[1]}. Leave out the flag for it."
            )
        _logger.warning(
            f"The model's thresholds were chosen on images of {name} {texts[0]}, got {texts[1]}: to choose them on"
            f' such images, {_DATA}.'
        )


def _check_effect(args: Namespace, has_data: bool) -> None:
    """Raise for a flag that would change nothing."""
    if (args.criterion != 'confidence' or args.combine) and not has_data and args.threshold is None:
        name = '--combine' if args.combine else '--criterion'
        raise InvalidValueError(f'{name} needs thresholds: give --threshold, or {_DATA} to choose them on.')
    if args.delta is not None and args.max_drop is None:
        raise InvalidValueError('--delta needs --max-drop F.')
    for dest in ('seed', 'train_split'):
        if getattr(args, dest) is not None and args.calib_from_train is None:
            raise InvalidValueError(f'{option_name(dest)} needs --calib-from-train N.')


def check_budgets(args: Namespace, model: MultiExitModel, costs: StageCosts) -> None:
    """Raise for a budget that no policy can meet; where thresholds are chosen anew, more may turn out to be too low.

    Without data to choose thresholds on, the model's own table of budgets decides. Budgets in ms need times, which the
    validator measures first.
    """
    for budget in args.budget:
        if not chooses_thresholds(args):
            if model.budgets is not None:
                model.budgets.select(budget)
        elif parse_budget(budget).unit != 'ms':
            costs.check_budget(budget)


def picture_path(args: Namespace) -> Path | None:
    """Return where the picture goes; None if there are no files."""
    if args.plot:
        return Path(args.plot)
    return Path(args.results_file).with_name(_PICTURE_NAME) if args.results_file else None


def policy_path(args: Namespace) -> Path | None:
    """Return the file that the policy is written into; None if no flag names one."""
    return Path(parse_model_name(args.model)[1], CONFIG_NAME) if args.save_policy else None


def check_outputs(args: Namespace) -> None:
    """Raise where a result could not be written, so that this is known before the evaluation; creates the folders."""
    named = {
        'the results': Path(args.results_file) if args.results_file else None,
        'the picture': picture_path(args),
        'the configuration of the model': policy_path(args),
    }
    owners: dict[Path, str] = {}
    for what, path in named.items():
        other = owners.setdefault(path.absolute(), what) if path else what
        if other != what:
            raise InvalidValueError(f'{path} is the path of {what} too. Give {other} another one.')
    for path in filter(None, named.values()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_folder = path.is_dir()
            if not is_folder:
                draft = path.with_name(f'.{path.name}.tmp')
                draft.touch()
                draft.unlink()
        except OSError as error:
            raise DiskError(f'Cannot write {path}: {one_line(error)}. Give another path.') from error
        if is_folder:
            raise InvalidValueError(f'{path} must be the path of a file, got a folder.')
