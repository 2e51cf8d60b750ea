import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from timm.utils import ParseKwargs

from timm_multiexit.cli.flags.config_file import read_config
from timm_multiexit.cli.flags.exit_flags import EXIT_FLAGS, EXIT_TRAIN_FLAGS
from timm_multiexit.cli.flags.parser import NAMES, RANGES
from timm_multiexit.cli.flags.train_args import DIGITS_DEFAULTS, create_train_parser, parse_train_args
from timm_multiexit.cli.flags.train_rules import TRAIN_RULES, loss_kwargs
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.utils.errors import MultiExitError

FROZEN = json.loads((Path(__file__).parent / 'timm_flags.json').read_text())

# Where a flag of timm's is not as in timm: dest -> (what differs, why). None is needed.
DIFFERENCES: dict[str, tuple[str, str]] = {}

OURS = (
    'eed exit_feature_weight exit_head exit_loss exit_lr_scale exit_output_loss exit_output_weight exit_projectors'
    ' exit_teacher exit_temperature exit_warmup_epochs exit_weights exits head_widths freeze_backbone regime'
    ' backbone_epochs head_warmup_epochs test_split val_from_train bad_images cache_images'
    ' crop_padding log_with progress push_to_hub hub_private'
    ' hub_license'
).split()

DATA = ('--data-dir', 'images')


def actions_of(parser):
    return {action.dest: action for action in parser._actions if action.dest != 'help'}


def describe(action):
    kind = 'store'
    if isinstance(action, argparse._StoreTrueAction):
        kind = 'store_true'
    elif isinstance(action, ParseKwargs):
        kind = 'kwargs'
    return {
        'options': list(action.option_strings),
        'default': action.default,
        'type': (action.type or str).__name__ if kind == 'store' else None,
        'nargs': action.nargs,
        'choices': list(action.choices) if action.choices else None,
        'const': action.const,
        'action': kind,
    }


def write_config(tmp_path, content):
    path = tmp_path / 'recipe.yaml'
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def parse_config(tmp_path, content, *argv):
    return parse_train_args([*DATA, '--config', write_config(tmp_path, content), *argv])


# The flags


def test_frozen_table_has_upstreams_172_flags_the_config_and_those_since():
    assert FROZEN['num_upstream'] == 172 + 1
    assert len(FROZEN['flags']) == FROZEN['num_upstream'] + len(FROZEN['since_1_0_31']) == 187


def test_every_flag_of_timm_is_as_in_timm():
    ours = actions_of(create_train_parser())
    differing = {dest for dest, row in FROZEN['flags'].items() if describe(ours[dest]) != row}
    assert differing == set(DIFFERENCES)


def test_defaults_have_the_types_of_timms():
    ours = actions_of(create_train_parser())
    assert {dest: type(row['default']) for dest, row in FROZEN['flags'].items()} == {
        dest: type(ours[dest].default) for dest in FROZEN['flags']
    }


def test_all_other_flags_are_the_listed_ones():
    assert actions_of(create_train_parser()).keys() - FROZEN['flags'].keys() == set(OURS)


def test_exit_flags_belong_to_exits():
    assert {flag.dest for flag in (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS)} == set(OURS[:18])


def test_flag_of_several_values_may_be_given_again():
    args = create_validate_parser().parse_args('--budget 50% 60% --budget 80% --compare a --compare b'.split())
    assert (args.budget, args.compare) == (['50%', '60%', '80%'], ['a', 'b'])
    assert create_validate_parser().parse_args(['--budget', '5ms']).budget == ['5ms']
    assert create_validate_parser().parse_args([]).budget == []


def test_validate_parser_keeps_its_flags():
    assert set(actions_of(create_validate_parser())) == set(
        'data data_dir dataset split dataset_download class_map input_img_mode model pretrained num_classes gp img_size'
        ' in_chans input_size crop_pct mean std interpolation channels_last model_kwargs exits exit_head head_widths amp'
        ' amp_dtype checkpoint use_ema batch_size workers pin_mem no_prefetcher results_file results_format calib_split'
        ' calib_from_train threshold criterion combine budget max_drop delta time_rounds compare plot train_split seed'
        ' save_policy'.split()
    )
    args = create_validate_parser().parse_args([])
    assert (args.model, args.batch_size, args.workers, args.split) == (None, 256, 4, 'validation')


def test_every_flag_has_a_help_text_that_argparse_can_print():
    parser = create_train_parser()
    assert all(action.help for action in parser._actions)
    assert 'images per process and batch (default: 128)' in ' '.join(parser.format_help().split())


# What is parsed


def test_with_data_the_defaults_are_timms():
    args = vars(parse_train_args(DATA))
    wrong = {dest for dest, row in FROZEN['flags'].items() if args[dest] != row['default']}
    assert wrong == {'data_dir'}
    assert args['data_dir'] == 'images'
    assert not args['is_demo']


def test_without_data_the_defaults_are_the_digits():
    args = parse_train_args([])
    assert args.is_demo
    assert {name: getattr(args, name) for name in DIGITS_DEFAULTS} == DIGITS_DEFAULTS
    args.scale.append('mine')  # every call has lists of its own
    args.wandb_tags.append('mine')
    again = parse_train_args([])
    assert (again.scale, again.wandb_tags) == ([0.7, 1.0], [])


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        ('images', {'data_dir': 'images', 'is_demo': False}),
        ('--epochs 3', {'epochs': 3, 'is_demo': True}),
        ('--eed', {'exit_loss': 'eed', 'exits': 'auto'}),
        ('--exits 2', {'exit_loss': 'ce', 'exits': 2}),
        ('--exit-loss beed', {'exit_loss': 'beed', 'exits': 'auto'}),
        ('--eed --exit-weights 1,1,0.5,2', {'exit_weights': [1.0, 1.0, 0.5, 2.0]}),
        ('--eed --exit-teacher main', {'exit_teacher': 'main'}),
        ('--eed --exit-teacher -1', {'exit_teacher': [-1]}),
        ('--eed --exit-teacher 0,-1', {'exit_teacher': [0, -1]}),
        ('--eed --exit-widths 64-128,128', {'head_widths': [[64, 128], [128]]}),
        ('--eed --freeze-backbone', {'regime': 'frozen'}),
        ('--eed --regime mixed --backbone-epochs 4', {'regime': 'mixed', 'backbone_epochs': 4}),
        ('--jsd-loss --aug-splits 3', {'loss': 'jsd', 'aug_splits': 3}),
        ('--bce-loss --bce-pos-weight 2', {'loss': 'bce', 'loss_pos_weight': '2.0'}),
        ('--drop-connect 0.2', {'drop_path': 0.2}),
        ('--drop-connect 0.2 --drop-path 0.2', {'drop_path': 0.2}),
        ('--log-wandb', {'log_with': ['wandb']}),
        ('--log-wandb --log-with tensorboard', {'log_with': ['tensorboard', 'wandb']}),
        ('--log-with wandb --log-wandb', {'log_with': ['wandb']}),
        ('--grad-accum-steps 0', {'grad_accum_steps': 1}),
        ('--torchcompile', {'torchcompile': 'inductor'}),
        ('--model-kwargs a=1 b=x', {'model_kwargs': {'a': 1, 'b': 'x'}}),
        ('--train-steps-per-epoch 5 --train-img-sizes 32', {'train_batches_per_epoch': 5}),
        ('--device cpu', {'device': 'cpu'}),
        ('--resume auto --experiment a', {'resume': 'auto'}),
        ('images --sched wsd', {'decay_epochs': 0.2}),
        ('images --sched wsd --decay-epochs 90', {'decay_epochs': 90.0}),
        ('images --sched step', {'decay_epochs': 90}),
        ('--dataset hfds/a --task multilabel', {'smoothing': 0.0, 'eval_metric': 'map'}),
        (
            '--dataset hfds/a --task multilabel --smoothing 0.2 --eval-metric loss',
            {'smoothing': 0.2, 'eval_metric': 'loss'},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_flags_mean(argv, expected):
    args = parse_train_args(argv.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ('argv', 'line'),
    [
        ('--epohcs 3', "there is no flag '--epohcs', nearest is --epochs."),
        ('--exit-weihgts=1,2', "there is no flag '--exit-weihgts=1,2', nearest is --exit-weights."),
        ('--zzz', "there is no flag '--zzz', --help lists the flags."),
        ('images more', "no flag takes 'more': put values with spaces in quotes."),
        ('--epochs x', "argument --epochs: invalid int value: 'x'"),
        ('--exit-loss x', "argument --exit-loss: invalid choice: 'x' (choose from"),
        ('--exits ,', "argument --exits: ',' names no exit"),
        ('--exit-weights a', "argument --exit-weights: 'a' is no list of weights such as 1,0.5,2"),
        ('--exit-teacher exit0', "argument --exit-teacher: 'exit0' is no teacher, allowed are main, all"),
        ('--exit-widths 1-x', "argument --exit-widths: '1-x' is no list of widths"),
        ('--opt-kwargs a', "argument --opt-kwargs: 'a' is no KEY=VALUE"),
        ('--log-with comet', "argument --log-with: invalid choice: 'comet'"),
        ('--torchscript --torchcompile', 'argument --torchcompile: not allowed with argument --torchscript'),
    ],
    ids=lambda value: value.split()[0],
)
def test_errors_of_one_flag_are_one_line(argv, line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_args(argv.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f'train.py: error: {line}')
    assert error.count('\n') == 1


# Ranges


def test_every_number_has_exactly_one_range():
    ranged = [dest for _, _, dests in RANGES for dest in dests.split()]
    numbers = {dest for dest, action in actions_of(create_train_parser()).items() if action.type in (int, float)}
    free = {'local_rank', 'grad_accum_steps'}  # unused; less than 1 is 1, as in timm
    assert len(ranged) == len(set(ranged))
    assert set(ranged) == numbers - free | {'exit_weights'}


@pytest.mark.parametrize('allowed', [row[0] for row in RANGES], ids=str)
def test_numbers_out_of_range_are_refused(allowed):
    dests = next(row[2] for row in RANGES if row[0] == allowed).split()
    wrong = {
        'integers from 1': '0',
        'integers from 0': '-1',
        'integers from 0 to 4294967295': '4294967296',
        'numbers from 0 to 1': '1.5',
        'numbers from 0, below 1': '1',
        'numbers from 0': 'inf',
        'numbers above 0': '0',
        'finite numbers': 'nan',
    }[allowed]
    actions = actions_of(create_train_parser())
    for dest in dests:
        option = actions[dest].option_strings[-1]
        count = actions[dest].nargs if isinstance(actions[dest].nargs, int) else 1
        with pytest.raises(MultiExitError, match=f'is {float(wrong):g}|is {wrong}') as caught:
            parse_train_args(
                [*DATA, '--eed', f'{option}={wrong}' if count == 1 else option, *[wrong] * (count > 1) * count]
            )
        assert f'allowed are {allowed}.' in str(caught.value)


@pytest.mark.parametrize('dest', NAMES)
def test_names_that_are_none_are_refused_and_all_allowed_are_listed(dest):
    with pytest.raises(MultiExitError, match=f"^--{dest.replace('_', '-')} is 'nonsense', allowed are ") as caught:
        parse_train_args([*DATA, f'--{dest.replace("_", "-")}=nonsense'])
    assert all((name or "''") in str(caught.value) for name in NAMES[dest])


@pytest.mark.parametrize('number', ['nan', '-1', '-inf'])
def test_learning_rate_is_a_number_from_0(number):
    with pytest.raises(MultiExitError, match='^--lr is .*, allowed are numbers from 0.$'):
        parse_train_args([*DATA, f'--lr={number}'])
    assert parse_train_args([*DATA, '--lr', '0']).lr == 0


# Contradictions

MULTILABEL = '--dataset hfds/a --task multilabel'
REFUSED = {
    '--torchscript': '--torchscript is not in this script (torch.jit is deprecated): use --torchcompile.',
    '--naflex-loader': "use timm's own train.py",
    '--fuser te': "--fuser is 'te'",
    '--tta 2': '--tta is 2, allowed are 0 and 1',
    '--device cuda:1': "--device is 'cuda:1', allowed are cuda (what Accelerate finds) and cpu",
    '--amp --model-dtype bfloat16': '--amp needs weights in float32, --model-dtype is bfloat16',
    '--eed --kd-model-name resnet18 --kd-distill-type feature': '--kd-distill-type feature does not go with exits',
    '--exits 1 --kd-distill-type token': '--kd-distill-type token does not go with exits',
    f'{MULTILABEL} --kd-model-name resnet18': '--kd-model-name distils by softmax',
    f'{MULTILABEL} --eed': 'add --exit-output-loss mse or bernoulli.',
    f'{MULTILABEL} --exits 1 --exit-teacher main': '--exit-loss ce distils',
    f'{MULTILABEL} --loss jsd --aug-splits 2': "'jsd' does not support multi-label",
    '--task multilabel': '--task multilabel needs a --dataset with several labels',
    '--task multilabel --data-dir images': '--task multilabel needs a --dataset with several labels',
    '--target-format multihot': '--target-format multihot needs --task multilabel',
    '--aug-splits 1': '--aug-splits is 1, allowed are 0 and integers from 2.',
    '--jsd-loss': '--aug-splits is 0: add --aug-splits 3.',
    '--loss jsd': '--aug-splits is 0: add --aug-splits 3.',
    '--aug-splits 2 --mixup 0.2': '--aug-splits does not go with --mixup or --cutmix',
    '--aug-splits 2 --cutmix-minmax 0.2 0.8': '--aug-splits does not go with --mixup or --cutmix',
    '--aug-splits 2 --no-aug': 'leave --no-aug out',
    '--aug-splits 2 --no-prefetcher': 'leave --no-prefetcher out',
    '--split-bn': '--split-bn needs augmentation splits, --aug-splits is 0',
    '--split-bn --sync-bn --aug-splits 2': '--split-bn and --sync-bn contradict',
    '--mixup 0.2 --batch-size 7': '--batch-size is 7, --mixup and --cutmix take pairs',
    '--mixup 0.2 --mixup-mode half --no-prefetcher': '--mixup-mode half needs the prefetcher',
    '--train-img-sizes 32 --use-multi-epochs-loader': '--train-img-sizes does not go with',
    '--train-img-sizes 32 --aug-splits 2': '--train-img-sizes does not go with',
    '--train-batch-sizes 8': 'need sizes: add --train-img-sizes',
    '--train-size-schedule progressive': 'need sizes: add --train-img-sizes',
    '--train-img-sizes 32 64 --train-batch-sizes 8': 'need one number for each of --train-img-sizes [32, 64]',
    '--train-img-sizes 32 64 --train-size-probs 0 0': '--train-size-probs is [0.0, 0.0]',
    '--train-img-sizes 32 --train-size-schedule progressive': 'needs two sizes, --train-img-sizes is [32]',
    '--wandb-resume-id a': '--resume is empty: name the checkpoint too',
    '--resume auto': '--resume auto looks for the run in the folder of --experiment, which is empty',
    '--eed --backbone-epochs 3': '--backbone-epochs needs --regime mixed',
    '--eed --regime mixed --epochs 9 --backbone-epochs 9': 'allowed are integers below --epochs 9',
    '--eed --freeze-backbone --head-warmup-epochs 1': 'leave --head-warmup-epochs out',
    '--eed --exit-weights 0,0': '--exit-weights are all 0',
    '--eed --exit-loss ce': '--eed and --exit-loss ce contradict each other: give one of them.',
    '--eed --freeze-backbone --regime mixed': '--freeze-backbone and --regime mixed contradict',
    '--bce-loss --loss asl': '--bce-loss and --loss asl contradict',
    '--bce-loss --jsd-loss --aug-splits 2': '--bce-loss and --loss jsd contradict',
    '--bce-loss --bce-pos-weight 2 --loss-pos-weight 3': '--bce-pos-weight and --loss-pos-weight 3 contradict',
    '--drop-connect 0.1 --drop-path 0.2': '--drop-connect and --drop-path 0.2 contradict',
    '--regime frozen': '--regime needs exits: add --exits or --exit-loss.',
    '--freeze-backbone': '--freeze-backbone needs exits: add --exits or --exit-loss.',
    '--exit-widths 1,2': '--exit-widths needs exits: add --exits or --exit-loss.',
    '--exit-projectors': '--exit-projectors needs exits',
    '--scale 0.5': '--scale is 0.5, allowed are two numbers, the smaller first.',
    '--ratio 2 1': '--ratio is 2.0 1.0, allowed are two numbers, the smaller first.',
    '--decay-milestones 5 5': '--decay-milestones is 5 5, allowed are rising epochs',
    '--mean 0.5 0.5': '--mean has 2 numbers, allowed are 1 or 3, the channels.',
    '--model-kwargs num_classes=3': '--model-kwargs has num_classes, which has a flag of its own: use --num-classes.',
    '--opt-kwargs lr=3': '--opt-kwargs has lr, which has a flag of its own: use --lr.',
    '--opt adamv': "--opt is 'adamv', nearest are ",
    '--epochs 2 --stop-epoch 3': '--stop-epoch is 3, allowed are integers from 1 to 2',
    '--epochs 3 --sched wsd --data-dir images': 'of the -2 after the warm-up',
    '--loss zlpr': "'zlpr' requires multi-label targets",
    '--bce-sum': 'only apply to the bce loss',
    f'{MULTILABEL} --loss twoway --mixup 0.5': 'does not support Mixup/CutMix',
    f'{MULTILABEL} --loss zlpr --loss-pos-weight 2': 'only supported by bce',
    f'{MULTILABEL} --loss db': 'requires class_counts',
    f'{MULTILABEL} --loss-class-weight missing.json': "--loss-class-weight is 'missing.json' and cannot be read",
    f'{MULTILABEL} --loss-pos-weight neg_pos': "--loss-pos-weight is 'neg_pos' and cannot be read: Class weight method",
    f'{MULTILABEL} --class-stats missing.json': "--class-stats is 'missing.json' and cannot be read",
    '--crop-padding 0': '--crop-padding is 0, allowed are integers from 1.',
    '--crop-padding 4 --train-crop-mode rrc': '--crop-padding is a crop of its own: leave out --no-aug',
    '--val-from-train 0': '--val-from-train is 0, allowed are integers from 1.',
}


@pytest.mark.parametrize(('argv', 'message'), REFUSED.items(), ids=REFUSED)
def test_refused_in_one_line(argv, message):
    with pytest.raises(MultiExitError) as caught:
        parse_train_args(argv.split())
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
    assert '{' not in str(caught.value)


def test_every_row_of_refusals_is_tried():
    lines = []
    for argv in REFUSED:
        with pytest.raises(MultiExitError) as caught:
            parse_train_args(argv.split())
        lines.append(str(caught.value))
    tails = [line.replace('{', '}').split('}') for _, line in TRAIN_RULES]
    untried = [parts for parts in tails if not any(all(part in line for part in parts[::2]) for line in lines)]
    assert untried == []


@pytest.mark.parametrize(
    'argv',
    [
        '--mixup 0.2 --no-prefetcher',
        '--mixup 0.2 --mixup-mode half',
        '--aug-splits 3 --split-bn --resplit',
        '--resplit --split-bn',
        '--kd-model-name resnet18 --kd-distill-type token',
        '--eed --kd-model-name resnet18',
        f'{MULTILABEL} --eed --exit-output-loss mse',
        f'{MULTILABEL} --eed --exit-output-loss bernoulli',
        f'{MULTILABEL} --eed --exit-output-weight 0',
        f'{MULTILABEL} --exits auto',
        f'{MULTILABEL} --loss poly --poly-gamma 2 --poly-epsilon -1',
        '--tta 1 --device cuda',
        '--wandb-resume-id a --resume last.pth.tar',
        '--train-img-sizes 32 64 --train-batch-sizes 8 4 --train-size-probs 1 0 --train-size-schedule progressive',
        '--eed --regime joint --head-warmup-epochs 1.5 --exit-warmup-epochs 2 --exit-lr-scale 0.5',
        '--opt lookahead_adamw',
        '--epochs 2 --cooldown-epochs 1 --stop-epoch 3',
        '--epochs 2 --lr-cycle-limit 2 --stop-epoch 4',
        '--val-from-train 100 --val-split test',
        '--crop-padding 4 --cache-images',
        '--epoch-repeats 2 --dataset-trust-remote-code --device-modules os --drop-connect 0.1',
        '--decay-rate 1e30 --in-chans 1 --mean 0.5',
    ],
)
def test_taken(argv):
    parse_train_args(argv.split())


def test_weights_by_class_frequency_reach_the_loss(tmp_path):
    (tmp_path / 'stats.json').write_text('{"pos_counts": [2, 1, 4], "num_samples": 8}')
    flags = f'{MULTILABEL} --class-stats {tmp_path}/stats.json'.split()
    args = parse_train_args([*flags, '--loss', 'bce', '--loss-pos-weight', 'neg_pos'])
    assert loss_kwargs(args)['pos_weight'].tolist() == [6 / 2, 7 / 1, 4 / 4]
    args = parse_train_args([*flags, '--loss', 'bce', '--loss-pos-weight', 'neg_pos', '--loss-weight-power', '0.5'])
    torch.testing.assert_close(loss_kwargs(args)['pos_weight'], torch.tensor([3.0, 7.0, 1.0]).sqrt())
    with pytest.raises(MultiExitError, match='^The pos_weight of the loss has 3 numbers, the model 4 classes.$'):
        loss_kwargs(args, num_classes=4)
    kwargs = loss_kwargs(parse_train_args([*flags, '--loss', 'db']), num_classes=3)
    assert (kwargs['class_counts'].tolist(), kwargs['num_samples']) == ([2, 1, 4], 8)


def test_loss_kwargs_of_a_plain_run():
    kwargs = loss_kwargs(parse_train_args([*DATA, '--mixup', '0.2']))
    assert (kwargs['loss_type'], kwargs['multi_label'], kwargs['smoothing'], kwargs['soft_targets']) == (
        None,
        False,
        0.1,
        True,
    )


# --config

TAKEN = {
    'number': ('lr: 0.5', 'lr', 0.5),
    'integer-for-number': ('lr: 1', 'lr', 1.0),
    'string-for-number': ('lr: 1e-3', 'lr', 0.001),
    'string-for-integer': ("epochs: '10'", 'epochs', 10),
    'null': ('lr:', 'lr', None),
    'dashes': ('batch-size: 8', 'batch_size', 8),
    'other-name': ('exits: auto\nexit-widths: 1-2,3', 'head_widths', [[1, 2], [3]]),
    'short-name': ('dr: 0.2', 'decay_rate', 0.2),
    'switch': ('amp: true', 'amp', True),
    'list': ("mean: ['0.5', 0.4, 1]", 'mean', [0.5, 0.4, 1.0]),
    'three': ('input_size: [3, 32, 32]', 'input_size', [3, 32, 32]),
    'empty-list-as-default': ('wandb_tags: []', 'wandb_tags', []),
    'mapping': ('model_kwargs: {a: [1, b]}', 'model_kwargs', {'a': [1, 'b']}),
    'bare-flag': ('torchcompile: true', 'torchcompile', 'inductor'),
    'backend': ('torchcompile: eager', 'torchcompile', 'eager'),
    'exits-text': ('exits: 1,2', 'exits', [1, 2]),
    'exits-count': ('exits: 3', 'exits', 3),
    'exits-index': ('exits: [3]', 'exits', [3]),
    'exits-names': ('exits: [layer1, layer2]', 'exits', ['layer1', 'layer2']),
    'weights': ('exits: 1\nexit-weights: [1, 0.5]', 'exit_weights', [1.0, 0.5]),
    'teacher': ('eed: true\nexit-teacher: [0, -1]', 'exit_teacher', [0, -1]),
    'teacher-one': ('eed: true\nexit-teacher: -1', 'exit_teacher', [-1]),
    'choices': ('log_with: [wandb, tensorboard]', 'log_with', ['wandb', 'tensorboard']),
    'is-demo': ('is_demo: true', 'is_demo', False),
    'empty-file': ('', 'epochs', 300),
}


@pytest.mark.parametrize(('content', 'dest', 'expected'), TAKEN.values(), ids=TAKEN.keys())
def test_config_values_become_what_the_flag_makes(content, dest, expected, tmp_path):
    value = getattr(parse_config(tmp_path, content), dest)
    assert value == expected
    assert type(value) is type(expected)


BAD_CONFIG = {
    'string': ('lr: fast', "lr is 'fast', allowed is a number or null."),
    'scalar': ('input_size: 224', 'input_size is 224, allowed is a list of 3 integers or null.'),
    'too-short': ('input-size: [3, 32]', 'input_size is [3, 32], allowed is a list of 3 integers or null.'),
    'item': ('decay_milestones: [1, x]', "decay_milestones is [1, 'x'], allowed is a list of integers."),
    'empty-list': ('mean: []', 'mean is [], allowed is a list of numbers or null.'),
    'text-for-list': ('mean: 0.5 0.4', "mean is '0.5 0.4', allowed is a list of numbers or null."),
    'choice': ('task: nope', "task is 'nope', allowed is a string out of classification, multilabel."),
    'item-choice': (
        'log_with: [comet]',
        "log_with is ['comet'], allowed is a list of strings out of tensorboard, wandb.",
    ),
    'fraction': ('epochs: 1.5', 'epochs is 1.5, allowed is an integer.'),
    'truth-for-number': ('epochs: true', 'epochs is True, allowed is an integer.'),
    'number-for-switch': ('amp: 1', 'amp is 1, allowed is true or false.'),
    'text-for-switch': ("amp: 'yes'", "amp is 'yes', allowed is true or false."),
    'number-for-text': ('experiment: 7', 'experiment is 7, allowed is a string (numbers and dates in quotes).'),
    'truth-for-text': ('model: no', 'model is False, allowed is a string (numbers and dates in quotes).'),
    'null': ('epochs:', 'epochs is None, allowed is an integer.'),
    'mapping': ('model_kwargs: a=1', "model_kwargs is 'a=1', allowed is a mapping of names to values."),
    'mapping-keys': ('opt_kwargs: {1: 2}', 'opt_kwargs is {1: 2}, allowed is a mapping of names to values.'),
    'exits': ("exits: ','", "exits is ',', allowed is what the flag takes (auto; 3: that many"),
    'exits-mapping': ('exits: {a: 1}', "exits is {'a': 1}, allowed is what the flag takes"),
    'exits-truth': ('exits: true', 'exits is True, allowed is what the flag takes'),
    'weights': ('exit-weights: [a]', "exit_weights is ['a'], allowed is what the flag takes"),
    'list-for-number': ('lr: [1]', 'lr is [1], allowed is a number or null.'),
    'unknown': (
        'batchsize: 8\nlr: 1',
        'has unknown keys: batchsize (nearest is batch_size). See --help for the flags.',
    ),
    'unknown-two': ('zzz: 8\nepoch: 1', 'has unknown keys: epoch (nearest is epochs), zzz. See'),
    'help': ('help: true', 'has unknown keys: help'),
    'twice': ('batch-size: 8\nbatch_size: 4', "has two keys for one flag, one of them 'batch_size'"),
    'twice-names': ('exit_widths: 1,2\nhead_widths: 1,2', "has two keys for one flag, one of them 'head_widths'"),
    'not-a-mapping': ('[1, 2]', 'must be a mapping of flag names to values.'),
    'not-yaml': ('a: [1', 'cannot be read: '),
    'script': ('torchscript: true', '--torchscript is not in this script'),
    'both-compilers': ('torchscript: true\ntorchcompile: eager', '--torchscript is not in this script'),
    'range': ('hflip: 2', '--hflip is 2.0, allowed are numbers from 0 to 1.'),
    'nan': ('lr: .nan', '--lr is nan'),
    'contradiction': ('eed: true\nexit_loss: ce', '--eed and --exit-loss ce contradict'),
}


@pytest.mark.parametrize(('content', 'message'), BAD_CONFIG.values(), ids=BAD_CONFIG.keys())
def test_config_values_that_a_flag_would_not_take_are_refused(content, message, tmp_path):
    with pytest.raises(MultiExitError) as caught:
        parse_config(tmp_path, content)
    line = str(caught.value)
    assert message in line
    assert '\n' not in line
    assert line.startswith(('--config ', message[:5]))


def test_missing_config_is_named():
    with pytest.raises(MultiExitError, match='^--config nowhere.yaml cannot be read: .*No such file'):
        parse_train_args(['--config', 'nowhere.yaml'])


def test_order_is_command_line_config_digits_timm(tmp_path):
    path = write_config(tmp_path, {'epochs': 7, 'smoothing': 0.2})
    args = parse_train_args(['--config', path, '--smoothing', '0'])
    assert args.is_demo
    assert (args.epochs, args.smoothing, args.model, args.momentum) == (7, 0.0, 'cs3darknet_s', 0.9)


@pytest.mark.parametrize(
    ('content', 'argv', 'expected'),
    [
        ({'eed': True}, '--exit-loss ce', {'exit_loss': 'ce', 'eed': False}),
        ({'exit_loss': 'ce'}, '--eed', {'exit_loss': 'eed'}),
        ({'freeze_backbone': True, 'eed': True}, '--regime joint', {'regime': 'joint', 'eed': True}),
        ({'bce_loss': True}, '--loss ce', {'loss': 'ce'}),
    ],
    ids=['loss', 'eed', 'regime', 'bce'],
)
def test_command_line_wins_over_the_other_name_in_a_config(content, argv, expected, tmp_path):
    args = parse_config(tmp_path, content, *argv.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    'argv',
    [
        '--data-dir images',
        '',
        '--eed --exits layer1,layer2 --exit-widths 64-128,128 --exit-weights 1,0.5,2 --exit-teacher 0,-1 --bce-loss'
        ' --bce-pos-weight 2 --drop-connect 0.1 --log-wandb --wandb-tags a b --model-kwargs a=1 b=[2] --torchcompile'
        ' --freeze-backbone --input-size 3 32 32 --lr 1e-3 --sched wsd --save-epochs 1 2 --grad-accum-steps 0',
        '--dataset hfds/a --task multilabel --exits [3]',
    ],
    ids=['plain', 'digits', 'much', 'multilabel'],
)
def test_args_yaml_of_a_run_is_a_config_that_gives_the_same_run(argv, tmp_path):
    args = parse_train_args(argv.split())
    path = write_config(tmp_path, vars(args))
    again = parse_train_args(['--config', path])
    assert vars(again) == vars(args) | {'config': path, 'is_demo': False}


def test_reading_a_config_leaves_the_parser_as_it_was(tmp_path):
    parser = create_train_parser()
    before = {dest: describe(action) for dest, action in actions_of(parser).items()}
    assert read_config(write_config(tmp_path, {'lr': 1, 'exits': 'auto'}), parser) == {'lr': 1.0, 'exits': 'auto'}
    assert {dest: describe(action) for dest, action in actions_of(parser).items()} == before
