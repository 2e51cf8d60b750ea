"""Validation: which images and weights it is of, and what it measures."""

import dataclasses
import logging
from argparse import Namespace

import pytest
import torch
from helpers.validation import DATA_CONFIG, make_validator, parse
from timm.data import create_loader

import timm_multiexit as tme
from timm_multiexit.calibration.logits import collect_logits
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.cli.flags.validate_args import check_budgets, check_flags, check_outputs
from timm_multiexit.cli.validate import hash_own_weights, read_questions, save_chosen_policy
from timm_multiexit.cli.validate_data import create_split
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.evaluation.validator import Questions, Validation, Validator
from timm_multiexit.policies.budgets import BudgetPoint, BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError, StateError


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


# What thresholds are chosen on


def test_part_of_the_reported_images_is_refused_by_what_is_seen(model):
    """Where images have no file names, after evaluation; what was found by then is shown."""
    args, shown = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32'), []
    validator = make_validator(args, model, show=shown.append)
    part = hold_out(create_split(args, 'test', 3), 20, seed=1)[1]
    validator.data = dataclasses.replace(validator.data, calibration=(part, 'a part'))
    with pytest.raises(MultiExitError, match='are the same images'):
        validator.run()
    assert 'on the test split, 360 images' in shown[0]
    assert 'Failure AUROC' in shown[1]


def test_an_image_that_is_there_twice_is_warned_of(model, caplog):
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = make_validator(args, model)
    loader = [(torch.randn(50, 3, 32, 32), torch.zeros(50, dtype=torch.int64))]
    validator._collect = lambda _: collect_logits(model, loader)
    reported = [(torch.cat([loader[0][0][:2], torch.randn(8, 3, 32, 32)]), loader[0][1][:10])]
    with caplog.at_level(logging.WARNING):
        validator._calibrate(collect_logits(model, reported))
    assert caplog.messages == ['2 of 50 images that thresholds are chosen on are among those reported.']


def test_held_out_images_are_those_of_training_and_not_augmented(model):
    """The same choice as train.py's, through the evaluation transform: the logits of a loader made by hand."""
    args = parse('--model', 'test_resnet', '--calib-from-train', '150', '--seed', '7', '--img-size', '32')
    validator = make_validator(args, model)
    collected, source = validator._calibrate(collect_logits(model, [(torch.zeros(1, 3, 32, 32), torch.zeros(1))]))
    assert source == '150 images drawn from the train split with seed 7'  # the run is not known
    train = create_checked_dataset(DIGITS, root=None, split='train')
    _, held_out = hold_out(train, 150, seed=7)
    keys = ('mean', 'std', 'interpolation', 'crop_pct')
    prepared = {key: validator.data.config[key] for key in keys}
    loader = create_loader(held_out, (3, 32, 32), 256, num_workers=0, use_prefetcher=False, **prepared)
    images, target = next(iter(loader))
    assert torch.equal(collected.targets, target)
    with torch.no_grad():
        torch.testing.assert_close(collected.logits[0], model(images, exits=True).logits[0], rtol=1e-4, atol=1e-4)


def test_same_images_under_two_names_are_refused_by_their_logits(model, monkeypatch):
    """Some data sets take several names for one split."""
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = make_validator(args, model)
    same = create_split(args, 'test', 3), 'the test split'
    validator.data = dataclasses.replace(validator.data, calibration=same)
    with pytest.raises(MultiExitError, match='--calib-split validation and --split test are the same images'):
        validator.run()


# Flags


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            '--threshold 1.5',
            "A threshold of 'confidence' must be .* got 1.5",
        ),
        ('--threshold 0.5,0.6,0.7', 'each of the 2 exits of the model, got 3'),
        ('--threshold 0.5 --criterion patience', "A threshold of 'patience' must be an integer"),
        ('--budget 60', "A budget must be .* got '60'"),
        ('--budget 60%', '--budget 60% needs data to keep it on: give --calib-split NAME or --calib-from-train N'),
        ('--max-drop 0.01', '--max-drop 0.01 needs data to prove it on'),
        ('--max-drop 2 --calib-split validation', '--max-drop is 2.0, allowed are numbers above 0 and below 1'),
        ('--delta 0', '--delta is 0.0, allowed'),
        ('--delta 0.1', '--delta is of no effect without --max-drop'),
        ('--seed 0', '--seed is of no effect without --calib-from-train'),
        ('--train-split train --calib-split validation', '--train-split is of no effect without --calib-from-train'),
        ('--time-rounds -1', '--time-rounds is -1, allowed are integers from 0'),
        ('--seed -1', '--seed is -1, allowed'),
        ('--calib-from-train 0', '--calib-from-train is 0, allowed are integers from 1'),
        ('--calib-split validation --calib-from-train 9', 'exclude each other'),
        ('--criterion margin', '--criterion is of no effect without thresholds'),
        ('--combine mean', '--combine is of no effect without thresholds'),
    ],
)
def test_flags_that_do_not_fit(flags, message, model):
    with pytest.raises(MultiExitError, match=message) as raised:
        check_flags(parse('--model', 'test_resnet', *flags.split()), model, num_processes=1)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'flags', ['--threshold 0.5', '--compare a', '--plot p.png', '--calib-split train', '--budget 60%', '--max-drop .1']
)
def test_flags_that_need_exits_and_one_process(flags, model, make_model):
    args = parse('--model', 'net', *flags.split())
    plain = tme.MultiExitModel(model.backbone, [])
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs a model with exits, net has none'):
        check_flags(args, plain, num_processes=1)
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs all logits in one process'):
        check_flags(args, model, num_processes=2)


@pytest.fixture
def net_folder(model, tmp_path):
    """A folder with a network of the digits."""
    tme.save_pretrained(model, tmp_path / 'net', data_config={**DATA_CONFIG, 'crop_pct': 0.9})
    return tmp_path / 'net'


SAVED = '--save-policy --calib-split validation --budget 90%'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            f'{SAVED} --model test_resnet',
            'writes to a model folder, test_resnet is none: give --model local-dir:FOLDER',
        ),
        (f'{SAVED} --model hf-hub:org/net@abc', 'writes to a model folder, hf-hub:org/net@abc is none'),
        (f'{SAVED} --checkpoint last.pth.tar', '--save-policy and --checkpoint exclude each other'),
        (f'{SAVED} --exits 2', '--save-policy and --exits exclude each other'),
        (f'{SAVED} --gp max', '--save-policy and --gp exclude each other'),
        ('--save-policy --budget 90%', '--save-policy needs data to choose thresholds on: give --calib-split NAME or'),
        ('--save-policy --calib-split validation --threshold 0.9', 'needs a policy to save: give --budget B or'),
    ],
)
def test_policies_that_are_not_the_folders_are_not_saved(flags, message, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *flags.split())
    with pytest.raises(MultiExitError, match=message) as raised:
        check_flags(args, model, num_processes=1)
    assert '\n' not in str(raised.value)


def test_policy_of_other_classes_or_no_exits_is_not_saved(make_model, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split())
    with pytest.raises(MultiExitError, match="the folder's own classes, not 7 others: leave --num-classes out"):
        check_flags(args, make_model(exits=[1, 3], num_classes=7), num_processes=1)
    with pytest.raises(MultiExitError, match='holds a plain timm model'):
        check_flags(args, tme.MultiExitModel(model.backbone, []), num_processes=1)
    check_flags(args, model, num_processes=1)
    with pytest.raises(MultiExitError, match='needs all logits in one process'):
        check_flags(args, model, num_processes=2)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--crop-pct 0.9 --img-size 32', None),
        ('--crop-pct 0.8', 'with crop_pct 0.9, not 0.8'),
        ('--img-size 64', r'with input_size \[3, 32, 32\], not \[3, 64, 64\]'),
        ('--mean 0.1', r'with mean \[0.5, 0.5, 0.5\], not \[0.1, 0.1, 0.1\]'),
    ],
)
def test_policy_is_saved_for_images_as_the_folder_has_them_alone(flags, message, net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split(), *flags.split())
    if message is None:
        make_validator(args, model)
    else:
        with pytest.raises(MultiExitError, match=message):
            make_validator(args, model)


def test_policy_is_not_saved_for_weights_that_came_later(net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split())
    weights = hash_own_weights(args, model)
    before = (net_folder / 'config.json').read_bytes()
    policy = ExitPolicy('confidence', (0.5, 0.5))
    budgets = BudgetTable((BudgetPoint(policy, 50.0, (0.0, 0.0, 1.0), macs=10),), total_macs=10, max_macs=20)
    found = Validation(None, {'calibrated_on': 'some images'}, policy, budgets)
    with open(net_folder / 'exits.safetensors', 'ab') as file:
        file.write(b'more')
    with pytest.raises(StateError, match='other weights in the meantime'):
        save_chosen_policy(args, found, weights)
    assert (net_folder / 'config.json').read_bytes() == before


def test_weights_are_named_where_they_are_the_folders(make_model, net_folder, monkeypatch):
    """Fresh exits or classes are not in its files."""
    results = ('--results-file', 'new.json', '--results-format', 'json')
    monkeypatch.chdir(net_folder.parent)
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    folder = ('--model', f'local-dir:{net_folder}', '--img-size', '32')
    for flags, evaluated, is_named in (
        ((*folder, *results), model, True),
        (folder, model, False),  # nothing is written
        ((*folder, *results, '--exits', '2'), model, False),
        ((*folder, *results, '--checkpoint', 'last.pth.tar'), model, False),
        ((*folder, *results), make_model(exits=[1, 3], num_classes=12), False),
        (('--model', 'test_resnet', *results, '--img-size', '32'), model, False),
    ):
        weights = hash_own_weights(parse(*flags), evaluated)
        assert (set(weights) if is_named else weights) == (
            {'model.safetensors', 'exits.safetensors'} if is_named else None
        )


# What is measured


def test_budgets_and_drops_need_images_to_choose_thresholds_on(model):
    data = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model).data
    for questions in (Questions(budgets=('90%',)), Questions(max_drop=0.1)):
        with pytest.raises(InvalidValueError, match='need images to choose thresholds on'):
            Validator(model, data, questions, accelerator=None)


def test_several_processes_give_the_table_alone(model, monkeypatch):
    validator = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model)
    validator.accelerator = Namespace(num_processes=2)
    assert not validator._keeps_logits()


def test_logits_that_nobody_asked_for_are_not_kept_beyond_memory(model, monkeypatch):
    validator = make_validator(parse('--model', 'test_resnet', '--img-size', '32'), model)
    size = 4 * 360 * 10 * 3
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_BYTES', size)
    assert validator._keeps_logits()
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_BYTES', size - 1)
    assert not validator._keeps_logits()
    validator.questions = read_questions(parse('--model', 'a', '--threshold', '0.5'), 2)
    assert validator._keeps_logits()


# Budgets that cannot be, and files that cannot be written


@pytest.mark.parametrize('budget', ['3%', '0.001MMACs', '500%', '9TMACs'])
def test_budgets_that_no_policy_meets_are_refused_before_evaluation(budget, model):
    costs = StageCosts.from_exit_costs(model.cost())
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--budget', budget)
    with pytest.raises(MultiExitError, match=f'The budget must be .* got {budget}, which is') as raised:
        check_budgets(args, model, costs)
    assert '\n' not in str(raised.value)


def test_budgets_from_always_the_first_exit_to_main_with_all_heads_are_possible(model):
    costs = StageCosts.from_exit_costs(model.cost())
    lowest, highest = model.cost()[0].fixed.macs, model.cost()[-1].sequential.macs
    for macs, is_possible in ((lowest - 1, False), (lowest, True), (highest, True), (highest + 1, False)):
        args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--budget', '9ms', f'{macs}MACs')
        if is_possible:
            check_budgets(args, model, costs)
        else:
            with pytest.raises(MultiExitError, match='The budget'):
                check_budgets(args, model, costs)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--plot folder', 'folder is a folder'),
        ('--results-file folder', 'folder is a folder'),
        ('--results-file file/rows.csv', 'file/rows.csv cannot be written: '),
        ('--plot file/deep/er/a.png', 'file/deep/er/a.png cannot be written: '),
        (f'--results-file {"x" * 254}', 'cannot be written: File name too long'),
        ('--results-file new/accuracy_vs_macs.png', 'is the name of the picture too'),
        ('--results-file a --plot ./a', 'is the name of the picture too'),
        (
            '--results-file net/config.json --model local-dir:net --save-policy',
            'net/config.json is the name of the configuration of the model too: give the results another one',
        ),
        ('--model local-dir:file --save-policy', 'file/config.json cannot be written: '),
    ],
)
def test_paths_that_cannot_be_written_are_known_before(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(MultiExitError, match=message) as raised:
        check_outputs(parse('--model', 'test_resnet', *flags.split()))
    assert '\n' not in str(raised.value)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_checking_paths_leaves_files_as_they_are(tmp_path):
    (tmp_path / 'rows.csv').write_text('old')
    check_outputs(parse('--model', 'a', '--results-file', f'{tmp_path}/rows.csv', '--plot', f'{tmp_path}/new/a.png'))
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['new', 'rows.csv']
    assert (tmp_path / 'rows.csv').read_text() == 'old'
