import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from evidence.plan import to_command_line
from timm.utils import ParseKwargs

from timm_multiexit.cli.flags.config_file import read_config
from timm_multiexit.cli.flags.exit_flags import EXIT_FLAGS, EXIT_TRAIN_FLAGS
from timm_multiexit.cli.flags.parser import Choice, Number
from timm_multiexit.cli.flags.train_args import DIGITS_DEFAULTS, create_train_parser, parse_train_args
from timm_multiexit.cli.flags.train_rules import TRAIN_RULES, loss_kwargs
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.utils.errors import MultiExitError

FROZEN = json.loads((Path(__file__).parent / 'timm_flags.json').read_text())
FROZEN_VALIDATE = json.loads((Path(__file__).parent / 'timm_validate_flags.json').read_text())

# Where a flag of timm's is not as in timm: dest -> (what differs, why). None is needed.
DIFFERENCES: dict[str, tuple[str, str]] = {}

# Flags whose names are checked here, and in timm are not.
NAMED_HERE = set(
    'amp_dtype clip_mode dist_bn interpolation kd_loss_type lr_base_scale lr_decay_fn mixup_mode model_dtype remode sched'
    ' train_crop_mode train_interpolation worker_seeding'.split()
)

OURS = (
    'eed exit_feature_weight exit_head exit_loss exit_lr_scale exit_output_loss exit_output_weight exit_projectors'
    ' exit_survivors exit_teacher exit_teacher_weights exit_temperature exit_warmup_epochs exit_weights exits head_widths freeze_backbone regime'
    ' backbone_epochs head_warmup_epochs test_split val_from_train bad_images cache_images'
    ' crop_padding freeze_bn_stats log_with progress push_to_hub hub_private'
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
        'choices': list(action.type.names) if isinstance(action.type, Choice) else None,
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
    assert differing == set(DIFFERENCES) | NAMED_HERE
    # timm finds a wrong name later, or takes it for another.
    assert {dest for dest in NAMED_HERE if {**describe(ours[dest]), 'choices': None} != FROZEN['flags'][dest]} == set()


def test_defaults_have_the_types_of_timms():
    ours = actions_of(create_train_parser())
    assert {dest: type(row['default']) for dest, row in FROZEN['flags'].items()} == {
        dest: type(ours[dest].default) for dest in FROZEN['flags']
    }


def test_all_other_flags_are_the_listed_ones():
    assert actions_of(create_train_parser()).keys() - FROZEN['flags'].keys() == set(OURS)


def test_exit_flags_belong_to_exits():
    assert {flag.dest for flag in (*EXIT_FLAGS, *EXIT_TRAIN_FLAGS)} == set(OURS[:20])


def test_flag_of_several_values_may_be_given_again():
    args = create_validate_parser().parse_args('--budget 50% 60% --budget 80% --compare a --compare b'.split())
    assert (args.budget, args.compare) == (['50%', '60%', '80%'], ['a', 'b'])
    assert create_validate_parser().parse_args(['--budget', '5ms']).budget == ['5ms']
    assert create_validate_parser().parse_args([]).budget == []


# validate.py's

OWN_OF_VALIDATE = (
    'exits exit_head head_widths calib_split calib_from_train threshold criterion combine budget max_drop delta'
    ' time_rounds compare compare_cascade time_batch_sizes plot train_split save_policy'
).split()

DIFFERENCES_OF_VALIDATE = {
    'model': ('default', 'a model must be named'),
    'split': ('default', 'it depends on whether data is named; validation where it is'),
    'seed': ('default', "that of the run that trained the model, which --calib-from-train's choice must repeat"),
}

NAMED_HERE_BY_VALIDATE = {'amp_dtype', 'model_dtype', 'interpolation', 'crop_mode', 'results_format', 'metrics_avg'}


def test_frozen_table_of_validate_has_upstreams_57_flags_and_those_since():
    assert FROZEN_VALIDATE['num_upstream'] == 57
    assert len(FROZEN_VALIDATE['flags']) == 57 + len(FROZEN_VALIDATE['since_1_0_31']) == 60


def test_every_flag_of_timms_validate_is_as_in_timm():
    ours, theirs = actions_of(create_validate_parser()), FROZEN_VALIDATE['flags']
    assert ours.keys() - theirs.keys() == set(OWN_OF_VALIDATE)
    for dest, row in theirs.items():
        found = describe(ours[dest])
        if dest in NAMED_HERE_BY_VALIDATE:
            assert {*(row['choices'] or ())} <= {*found['choices']}
            found = {**found, 'choices': row['choices']}
        key, _ = DIFFERENCES_OF_VALIDATE.get(dest, (None, None))
        assert {name for name in row if found[name] != row[name]} == ({key} if key else set()), dest


def test_values_of_validate_by_default():
    args = create_validate_parser().parse_args([])
    assert (args.model, args.batch_size, args.workers, args.split) == (None, 256, 4, None)
    args = create_validate_parser().parse_args(['-m', 'resnet18', '--torchcompile', '--crop-mode', 'squash'])
    assert (args.model, args.torchcompile, args.crop_mode) == ('resnet18', 'inductor', 'squash')


@pytest.mark.parametrize('text', ['-3ms', '-5%', '-0.5GMACs', '-.5%'])
def test_value_that_begins_like_a_number_is_no_flag(text):
    assert create_validate_parser().parse_args(['--budget', text]).budget == [text]


def test_negative_values_of_lists_are_no_flags(capsys):
    assert parse_train_args('--eed --exit-teacher -1,0'.split()).exit_teacher == [-1, 0]
    with pytest.raises(SystemExit):
        parse_train_args([*DATA, '--lr', '-1e-3'])
    assert capsys.readouterr().err == 'train.py: error: --lr must be >= 0, got -1e-3.\n'
    with pytest.raises(SystemExit):
        parse_train_args([*DATA, '-x'])
    assert "unknown flag '-x'" in capsys.readouterr().err


def test_every_flag_has_a_help_text_that_argparse_can_print():
    assert all(action.help for action in create_validate_parser()._actions)
    assert '--budget B' in create_validate_parser().format_help()
    # Each is read alone, without the flag before it.
    for action in (*create_train_parser()._actions, *create_validate_parser()._actions):
        assert not action.help.startswith(('its ', 'and ', 'of ', 'that ', 'these', 'not in')), action.dest
        assert len(action.help.split()) > 1, action.dest
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
    assert again.checkpoint_hist == 2
    assert parse_train_args(['--experiment', 'sweep/a$b c']).experiment == 'sweep/a$b c'


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
        ('--data-dir a --eed --freeze-backbone', {'eval_metric': 'mean_top1'}),
        ('--data-dir a --eed --regime frozen', {'eval_metric': 'mean_top1'}),
        ('--data-dir a --eed --freeze-backbone --eval-metric top1', {'eval_metric': 'top1'}),
        (
            '--dataset hfds/a --task multilabel --exit-loss ce --freeze-backbone',
            {'eval_metric': 'mean_map'},
        ),
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
        ('--epohcs 3', "unknown flag '--epohcs'. Did you mean --epochs?"),
        ('--exit-weihgts=1,2', "unknown flag '--exit-weihgts=1,2'. Did you mean --exit-weights?"),
        ('--zzz', "unknown flag '--zzz'. --help lists the flags."),
        ('images more', "unexpected argument 'more'. Put values with spaces in quotes."),
        ('--epochs x', "--epochs must be an integer >= 1, got 'x'."),
        ('--exit-loss x', "--exit-loss must be one of ce, phuong, byot, eed, beed, got 'x'."),
        ('--exits ,', "--exits must be auto, 3, [3], 1,2, 0.25,0.5 or layer1,layer2, got ','."),
        ('--exits -3', '--exits must be a number of exits >= 1, got -3: the index alone is [-3].'),
        ('--exit-weights a', "--exit-weights must be weights >= 0 such as 1,0.5,2, got 'a'."),
        ('--exit-teacher exit0', "--exit-teacher must be main, all, or indices such as 0,-1, got 'exit0'."),
        ('--exit-widths 1-x', "--exit-widths must be widths such as 64-128-512,128-512, got '1-x'."),
        ('--opt-kwargs a', "--opt-kwargs must be KEY=VALUE, got 'a'."),
        ('--log-with comet', "--log-with must be one of tensorboard, wandb, got 'comet'."),
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


def test_every_number_has_a_range():
    free = {'local_rank'}  # not used
    assert {dest for dest, action in actions_of(create_train_parser()).items() if action.type in (int, float)} == free
    assert not [a.dest for a in create_validate_parser()._actions if a.type in (int, float)]


WRONG = {
    '>= 1': '0',
    '>= 0': '-1',
    'in [0, 4294967295]': '4294967296',
    'in [0, 1]': '1.5',
    'in [0, 1)': '1',
    'in (0, 1)': '1',
    '> 0': '0',
    '': 'nan',
}


@pytest.mark.parametrize('allowed', WRONG)
def test_numbers_out_of_range_are_refused(allowed, capsys):
    found = 0
    for parser in (create_train_parser(), create_validate_parser()):
        for action in parser._actions:
            if not isinstance(action.type, Number) or action.type.allowed != allowed:
                continue
            found += 1
            option, wrong = action.option_strings[-1], WRONG[allowed]
            count = action.nargs if isinstance(action.nargs, int) else 1
            with pytest.raises(SystemExit):
                parser.parse_args([f'{option}={wrong}'] if count == 1 else [option, *[wrong] * count])
            line = capsys.readouterr().err
            assert line.endswith(f'must be {allowed or "finite"}, got {wrong}.\n')
            assert line.startswith(f'{parser.prog}: error: --')
    assert found


@pytest.mark.parametrize('text', ['nan', 'inf', '-inf'])
def test_every_number_must_be_finite(text):
    for action in actions_of(create_train_parser()).values():
        if isinstance(action.type, Number):
            with pytest.raises(argparse.ArgumentTypeError, match='must be finite, got|must be an integer'):
                action.type(text)


def test_wrong_names_are_refused_and_all_allowed_are_listed(capsys):
    actions = [action for action in actions_of(create_train_parser()).values() if isinstance(action.type, Choice)]
    assert len(actions) > len(NAMED_HERE)
    for action in actions:
        option = action.option_strings[-1]
        with pytest.raises(SystemExit):
            parse_train_args([*DATA, f'{option}=nonsense'])
        line = capsys.readouterr().err
        assert line.startswith(f'train.py: error: {option} must be one of ')
        assert all((name or "''") in line for name in action.type.names)


@pytest.mark.parametrize('number', ['-1', '-0.5'])
def test_learning_rate_is_a_number_from_0(number, capsys):
    with pytest.raises(SystemExit):
        parse_train_args([*DATA, f'--lr={number}'])
    assert capsys.readouterr().err == f'train.py: error: --lr must be >= 0, got {number}.\n'
    assert parse_train_args([*DATA, '--lr', '0']).lr == 0


def test_names_of_the_program_are_those_of_the_caller(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(['--lr', '-1'], 'timm-multiexit train')
    assert capsys.readouterr().err == 'timm-multiexit train: error: --lr must be >= 0, got -1.\n'


# Contradictions

MULTILABEL = '--dataset hfds/a --task multilabel'
REFUSED = {
    '--torchscript': '--torchscript is not supported (torch.jit is deprecated). Use --torchcompile.',
    '--naflex-loader': "Use timm's own train.py",
    '--fuser te': '--fuser te is not supported',
    '--tta 2': '--tta must be 0 or 1, got 2.',
    '--device cuda:1': "--device must be cuda (any accelerator that Accelerate finds) or cpu, got 'cuda:1'.",
    '--amp --model-dtype bfloat16': '--amp needs float32 weights, got --model-dtype bfloat16.',
    '--eed --kd-model-name resnet18 --kd-distill-type feature': '--kd-distill-type must be logit for a model with exits, got feature.',
    '--exits 1 --kd-distill-type token': '--kd-distill-type must be logit for a model with exits, got token.',
    f'{MULTILABEL} --kd-model-name resnet18': '--kd-model-name distils softmax outputs',
    f'{MULTILABEL} --eed': 'Add --exit-output-loss mse or bernoulli.',
    f'{MULTILABEL} --exits 1 --exit-teacher main': '--exit-loss ce distils',
    f'{MULTILABEL} --loss jsd --aug-splits 2': "'jsd' does not support multi-label",
    '--task multilabel': '--task multilabel needs a --dataset with several labels',
    '--task multilabel --data-dir images': '--task multilabel needs a --dataset with several labels',
    '--target-format multihot': '--target-format multihot needs --task multilabel',
    '--exit-loss ce --exit-teacher-weights skill': 'skill needs several classifiers that teach. Add --eed,',
    '--exit-loss phuong --exit-teacher-weights skill': 'skill needs several classifiers that teach. Add --eed,',
    '--eed --exit-teacher -1 --exit-teacher-weights skill': 'skill needs several classifiers that teach. Add --eed,',
    '--exit-loss beed --exit-teacher-weights skill': '--exit-teacher-weights must be equal with --exit-loss beed',
    '--exit-loss ce --exit-output-loss mse': '--exit-output-loss, --exit-temperature and --exit-warmup-epochs need',
    '--exit-loss ce --exit-temperature 5': '--exit-output-loss, --exit-temperature and --exit-warmup-epochs need',
    '--exit-loss ce --exit-warmup-epochs 3': '--exit-output-loss, --exit-temperature and --exit-warmup-epochs need',
    '--eed --exit-output-loss mse --exit-temperature 5': '--exit-temperature is that of --exit-output-loss kl or',
    '--eed --exit-projectors': '--exit-projectors needs features that are distilled. Add --exit-feature-weight 1.',
    '--exit-teacher-weights skill': '--exit-teacher-weights needs exits. Add --exits or --exit-loss.',
    '--exits 1 --exit-survivors': '--exit-survivors needs a frozen backbone',
    '--eed --regime mixed --exit-survivors': '--exit-survivors needs a frozen backbone',
    f'{MULTILABEL} --exits 1 --freeze-backbone --exit-survivors': '--exit-survivors needs classes that exclude',
    '--aug-splits 1': '--aug-splits must be 0 or >= 2, got 1.',
    '--jsd-loss': 'got --aug-splits 0. Add --aug-splits 3.',
    '--loss jsd': 'got --aug-splits 0. Add --aug-splits 3.',
    '--aug-splits 2 --mixup 0.2': '--aug-splits cannot be combined with --mixup or --cutmix',
    '--aug-splits 2 --cutmix-minmax 0.2 0.8': '--aug-splits cannot be combined with --mixup or --cutmix',
    '--aug-splits 2 --no-aug': 'Leave out --no-aug',
    '--aug-splits 2 --no-prefetcher': 'Leave out --no-prefetcher',
    '--split-bn': '--split-bn needs augmentation splits, got --aug-splits 0',
    '--split-bn --sync-bn --aug-splits 2': '--split-bn and --sync-bn contradict',
    '--freeze-bn-stats': '--freeze-bn-stats keeps the statistics of trained weights',
    '--freeze-bn-stats --pretrained --sync-bn': '--freeze-bn-stats takes no statistics of batches',
    '--freeze-bn-stats --pretrained --split-bn --aug-splits 2': '--freeze-bn-stats takes no statistics of batches',
    '--mixup 0.2 --batch-size 7': '--batch-size must be even for --mixup and --cutmix, got 7.',
    '--mixup 0.2 --train-img-sizes 32 48 --train-batch-sizes 8 7': 'must be even for --mixup and --cutmix, got [8, 7].',
    '--split-bn --resplit --reprob 0.5 -b 7': '--batch-size must be even for --split-bn, got 7.',
    '--split-bn --resplit --reprob 0.5 --train-img-sizes 32 48 --train-batch-sizes 8 7': 'for --split-bn, got [8, 7].',
    '--start-epoch 5 --epochs 5': '--start-epoch must be below --epochs 5, got 5.',
    '--torchcompile-mode default': '--torchcompile-mode needs --torchcompile.',
    '--pretrained-path a.pth': '--pretrained-path is where --pretrained takes weights from',
    '--mixup 0.2 --mixup-mode half --no-prefetcher': '--mixup-mode half needs the prefetcher',
    '--train-img-sizes 32 --use-multi-epochs-loader': '--train-img-sizes cannot be combined with',
    '--train-img-sizes 32 --aug-splits 2': '--train-img-sizes cannot be combined with',
    '--train-batch-sizes 8': 'need --train-img-sizes.',
    '--train-size-schedule progressive': 'need --train-img-sizes.',
    '--train-img-sizes 32 64 --train-batch-sizes 8': 'one number per size of --train-img-sizes, which is [32, 64].',
    '--train-img-sizes 32 64 --train-size-probs 0 0': '--train-size-probs must have a number > 0, got [0.0, 0.0].',
    '--train-img-sizes 32 --train-size-schedule progressive': 'needs two sizes, got --train-img-sizes [32].',
    '--wandb-resume-id a': '--wandb-resume-id needs --resume.',
    '--resume auto': '--resume auto needs --experiment',
    '--experiment ../x': "--experiment must name a folder inside of --output, got '../x'. Name other places by --output.",
    '--experiment /tmp/x': "--experiment must name a folder inside of --output, got '/tmp/x'.",
    '--experiment a/../../x': 'must name a folder inside of --output',
    '--experiment .': "must name a folder inside of --output, got '.'.",
    '--experiment a\x1b[0m': 'must name a folder inside of --output',
    '--eed --backbone-epochs 3': '--backbone-epochs needs --regime mixed.',
    '--eed --regime mixed --epochs 9 --backbone-epochs 9': '--backbone-epochs must be < --epochs 9, got 9.',
    '--eed --freeze-backbone --head-warmup-epochs 1': 'Leave out --head-warmup-epochs',
    '--eed --exit-weights 0,0': '--exit-weights must have a number > 0',
    '--eed --exit-loss ce': '--eed and --exit-loss ce contradict each other. Give one of them.',
    '--eed --freeze-backbone --regime mixed': '--freeze-backbone and --regime mixed contradict',
    '--bce-loss --loss asl': '--bce-loss and --loss asl contradict',
    '--bce-loss --jsd-loss --aug-splits 2': '--bce-loss and --loss jsd contradict',
    '--bce-loss --bce-pos-weight 2 --loss-pos-weight 3': '--bce-pos-weight and --loss-pos-weight 3 contradict',
    '--drop-connect 0.1 --drop-path 0.2': '--drop-connect and --drop-path 0.2 contradict',
    '--regime frozen': '--regime needs exits. Add --exits or --exit-loss.',
    '--freeze-backbone': '--freeze-backbone needs exits. Add --exits or --exit-loss.',
    '--exit-widths 1,2': '--exit-widths needs exits. Add --exits or --exit-loss.',
    '--exit-projectors': '--exit-projectors needs exits',
    '--scale 0.5': '--scale must be two numbers, the smaller first, got [0.5].',
    '--ratio 2 1': '--ratio must be two numbers, the smaller first, got [2.0, 1.0].',
    '--decay-milestones 5 5': '--decay-milestones must be increasing, got [5, 5].',
    '--mean 0.5 0.5': '--mean must have 1 or 3 numbers, one per channel, got 2.',
    '--model-kwargs num_classes=3': '--model-kwargs must not have num_classes. Use --num-classes.',
    '--opt-kwargs lr=3': '--opt-kwargs must not have lr. Use --lr.',
    '--opt adamv': "got 'adamv'. Nearest are ",
    '--epochs 2 --stop-epoch 3': '--stop-epoch must be in [1, 2], the epochs of the schedule, got 3.',
    '--epochs 3 --sched wsd --data-dir images': 'of the -2 epochs after the warm-up',
    '--loss zlpr': "'zlpr' requires multi-label targets",
    '--bce-sum': 'only apply to the bce loss',
    f'{MULTILABEL} --loss twoway --mixup 0.5': 'does not support Mixup/CutMix',
    f'{MULTILABEL} --loss zlpr --loss-pos-weight 2': 'only supported by bce',
    f'{MULTILABEL} --loss db': 'requires class_counts',
    f'{MULTILABEL} --loss-class-weight missing.json': "Cannot read --loss-class-weight 'missing.json': ",
    f'{MULTILABEL} --loss-pos-weight neg_pos': "Cannot read --loss-pos-weight 'neg_pos': Class weight method",
    f'{MULTILABEL} --class-stats missing.json': "Cannot read --class-stats 'missing.json': ",
    '--crop-padding 4 --train-crop-mode rrc': '--crop-padding cannot be combined with --no-aug',
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
    with pytest.raises(MultiExitError, match='^pos_weight of the loss must have 4 numbers, one per class, got 3.$'):
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
    'one-for-list': ('mean: 0.5\nin_chans: 1', 'mean', [0.5]),
    'negative-list': ('mean: [-0.5]', 'mean', [-0.5]),
    'pairs': ('model_kwargs: [a=1, b=x]', 'model_kwargs', {'a': 1, 'b': 'x'}),
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
    'string': ('lr: fast', "lr must be a number >= 0, got 'fast'."),
    'scalar': ('input_size: 224', 'argument input_size: expected 3 arguments'),
    'too-short': ('input-size: [3, 32]', 'argument input_size: expected 3 arguments'),
    'item': ('decay_milestones: [1, x]', "decay_milestones must be an integer >= 0, got 'x'."),
    'item-kind': (
        'decay_milestones: [1, {}]',
        'decay_milestones must be a list, each item an integer >= 0, got [1, {}].',
    ),
    'item-like-a-flag': ('wandb_tags: [a, -b8]', 'wandb_tags must be a list, each item a string'),
    'empty-list': ('mean: []', 'argument mean: expected at least one argument'),
    'text-for-list': ('mean: 0.5 0.4', "mean must be a number, got '0.5 0.4'."),
    'choice': ('task: nope', "task must be one of classification, multilabel, got 'nope'."),
    'item-choice': ('log_with: [comet]', "log_with must be one of tensorboard, wandb, got 'comet'."),
    'fraction': ('epochs: 1.5', "epochs must be an integer >= 1, got '1.5'."),
    'truth-for-number': ('epochs: true', 'epochs must be an integer >= 1, got True.'),
    'number-for-switch': ('amp: 1', 'amp must be true or false, got 1.'),
    'text-for-switch': ("amp: 'yes'", "amp must be true or false, got 'yes'."),
    'number-for-text': ('experiment: 7', 'experiment must be a string (numbers and dates in quotes), got 7.'),
    'truth-for-text': ('model: no', 'model must be a string (numbers and dates in quotes), got False.'),
    'null': ('epochs:', 'epochs must be an integer >= 1, got None.'),
    'mapping': ('model_kwargs: 1', 'model_kwargs must be a mapping of names to values, got 1.'),
    'mapping-keys': ('opt_kwargs: {1: 2}', 'opt_kwargs must be a mapping of names to values, got {1: 2}.'),
    'exits': ("exits: ','", "exits must be auto, 3, [3], 1,2, 0.25,0.5 or layer1,layer2, got ','."),
    'exits-mapping': ('exits: {a: 1}', 'exits must be a value of --exits (where exits are: auto'),
    'exits-truth': ('exits: true', 'exits must be a value of --exits (where exits are: auto'),
    'weights': ('exit-weights: [a]', "exit_weights must be weights >= 0 such as 1,0.5,2, got '[a]'."),
    'list-for-number': ('lr: [1]', "lr must be a number >= 0, got '[1]'."),
    'list-for-text': ('experiment: [a]', "experiment must be a string (numbers and dates in quotes), got ['a']."),
    'unknown': (
        'batchsize: 8\nlr: 1',
        'has unknown keys: batchsize (nearest is batch_size). See --help for the flags.',
    ),
    'unknown-two': ('zzz: 8\nepoch: 1', 'has unknown keys: epoch (nearest is epochs), zzz. See'),
    'help': ('help: true', 'has unknown keys: help'),
    'twice': ('batch-size: 8\nbatch_size: 4', "has two keys for one flag, one of them 'batch_size'"),
    'twice-names': ('exit_widths: 1,2\nhead_widths: 1,2', "has two keys for one flag, one of them 'head_widths'"),
    'not-a-mapping': ('[1, 2]', 'must be a mapping of flag names to values, got [1, 2].'),
    'not-yaml': ('a: [1', 'must be a YAML file: '),
    'same-key-twice': ('lr: 1\nepochs: 3\nlr: 2', "must be a YAML file: the key 'lr' occurs twice, in line 3 again."),
    'script': ('torchscript: true', '--torchscript is not supported'),
    'both-compilers': ('torchscript: true\ntorchcompile: eager', '--torchscript is not supported'),
    'range': ('hflip: 2', 'hflip must be in [0, 1], got 2.'),
    'nan': ('lr: .nan', 'lr must be finite, got nan.'),
    'contradiction': ('eed: true\nexit_loss: ce', '--eed and --exit-loss ce contradict'),
}


@pytest.mark.parametrize(('content', 'message'), BAD_CONFIG.values(), ids=BAD_CONFIG.keys())
def test_config_values_that_a_flag_would_not_take_are_refused(content, message, tmp_path):
    with pytest.raises(MultiExitError) as caught:
        parse_config(tmp_path, content)
    line = str(caught.value)
    assert message in line
    assert '\n' not in line
    assert line.startswith((f'--config {tmp_path}/recipe.yaml', message[:5]))


RECIPES = sorted((Path(__file__).parents[3] / 'hub/recipes').glob('*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_the_command_line_that_it_stands_for(path):
    values = yaml.safe_load(path.read_text())
    kwargs = values.pop('opt_kwargs', {})
    words = to_command_line({key.replace('_', '-'): value for key, value in values.items()})
    words += ['--opt-kwargs', *(f'{key}={value!r}' for key, value in kwargs.items())] if kwargs else []
    assert vars(parse_train_args([*DATA, '--config', str(path)])) == vars(parse_train_args([*DATA, *words])) | {
        'config': str(path)
    }


def test_missing_config_is_named():
    with pytest.raises(MultiExitError, match='^--config nowhere.yaml cannot be read: No such file'):
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
        (
            {'freeze_backbone': True, 'eed': True},
            '--regime joint',
            {'regime': 'joint', 'eed': True, 'eval_metric': 'top1'},
        ),
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
