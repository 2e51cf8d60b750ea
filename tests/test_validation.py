"""The parts of validate.py: what it chooses thresholds on, what it times, what it compares with."""

import logging
from argparse import Namespace
from functools import partial

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import create_loader
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit import dynamic_report
from timm_multiexit.arguments import create_validate_parser
from timm_multiexit.collecting import collect_logits
from timm_multiexit.comparison import create_static
from timm_multiexit.config import MultiExitError
from timm_multiexit.data import DIGITS, create_checked_dataset
from timm_multiexit.dynamics import evaluate_logits
from timm_multiexit.engine import evaluate_loader
from timm_multiexit.holdout import hold_out
from timm_multiexit.policy import ExitPolicy
from timm_multiexit.timing import time_interleaved
from timm_multiexit.validation import Validator
from timm_multiexit.validation_checks import check_flags
from timm_multiexit.validation_data import create_calibration_split, create_split, load_mixed_batch

DATA_CONFIG = {
    'input_size': (3, 32, 32),
    'mean': (0.5,) * 3,
    'std': (0.5,) * 3,
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
}


def parse(*flags):
    """Return arguments as validate.py has them when it begins: the digits' test split if no data is named."""
    args = create_validate_parser().parse_args([*flags, '--workers', '0'])
    args.data_dir = args.data_dir or args.data
    if not args.data_dir and not args.dataset:
        args.dataset, args.split = DIGITS, 'test'
    return args


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


# Logits


def test_kept_logits_give_the_table_of_the_loader(model):
    images, target = torch.randn(11, 3, 32, 32), torch.randint(10, (11,))
    loader = DataLoader(TensorDataset(images, target), batch_size=4)
    collected = collect_logits(model, loader)
    expected = evaluate_loader(model, loader)
    assert evaluate_logits(collected.logits, collected.targets, batch_size=4) == expected.metrics
    with torch.no_grad():
        assert torch.equal(collected.logits[0][8:], model(images[8:], exits=True).logits[0])
    assert torch.equal(collected.targets, target)


def test_half_precision_is_kept_as_float32(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), batch_size=2)
    logits = collect_logits(model.bfloat16(), loader).logits
    assert {single.dtype for single in logits} == {torch.float32}


def test_logits_are_of_eval_mode(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)))
    with pytest.raises(MultiExitError, match='model.eval'):
        collect_logits(model.train(), loader)
    with pytest.raises(MultiExitError, match='no batch'):
        collect_logits(model.eval(), [])


# What thresholds are chosen on


def test_held_out_images_are_those_of_training_and_not_augmented(model):
    """The same choice as train.py's, through the evaluation transform: the logits of a loader made by hand."""
    args = parse('--model', 'test_resnet', '--calib-from-train', '150', '--seed', '7', '--img-size', '32')
    validator = Validator(args, model, Accelerator())
    collected, source = validator._calibrate(collect_logits(model, [(torch.zeros(1, 3, 32, 32), torch.zeros(1))]))
    assert source == '150 images held out of the train split with seed 7'
    train = create_checked_dataset(DIGITS, root=None, split='train')
    _, held_out = hold_out(train, 150, seed=7)
    keys = ('mean', 'std', 'interpolation', 'crop_pct')
    prepared = {key: validator.data_config[key] for key in keys}
    loader = create_loader(held_out, (3, 32, 32), 256, num_workers=0, use_prefetcher=False, **prepared)
    images, target = next(iter(loader))
    assert torch.equal(collected.targets, target)
    with torch.no_grad():
        torch.testing.assert_close(collected.logits[0], model(images, exits=True).logits[0], rtol=1e-4, atol=1e-4)


def test_seed_of_the_run_is_the_default(tmp_path, caplog):
    for name, held_out, warns in (('same', 150, False), ('other', 100, True)):
        (tmp_path / name / 'best').mkdir(parents=True)
        (tmp_path / name / 'best/config.json').write_text('{"architecture": "test_resnet"}')
        (tmp_path / name / 'args.yaml').write_text(f'seed: 9\nval_from_train: {held_out}\ntrain_split: train\n')
        args = parse('--model', f'local-dir:{tmp_path}/{name}/best', '--calib-from-train', '150')
        with caplog.at_level(logging.WARNING):
            dataset, source = create_calibration_split(args, create_split(args, 'test', 3), 3)
        assert source == '150 images held out of the train split with seed 9'
        assert len(dataset) == 150
        assert bool(caplog.messages) == warns
    assert 'held 100 images of train out with seed 9, not 150 of train with seed 9' in caplog.messages[0]


def test_training_split_whole_is_warned_of(caplog):
    args = parse('--model', 'test_resnet', '--calib-split', 'train')
    with caplog.at_level(logging.WARNING):
        dataset, source = create_calibration_split(args, create_split(args, 'test', 3), 3)
    assert source == 'the train split, 1257 images'
    assert len(caplog.messages) == 1
    assert 'whole train split' in caplog.messages[0]


def test_validation_split_is_not_warned_of(caplog):
    args = parse('--model', 'test_resnet', '--calib-split', 'validation')
    dataset, source = create_calibration_split(args, create_split(args, 'test', 3), 3)
    assert (len(dataset), source, caplog.messages) == (180, 'the validation split, 180 images', [])


def test_splits_of_other_classes_are_refused(image_folder):
    (image_folder / 'val/dog').rename(image_folder / 'val/cow')
    args = parse('--model', 'test_resnet', '--calib-split', 'train', str(image_folder))
    with pytest.raises(MultiExitError, match='its classes are not those of the validation split'):
        create_calibration_split(args, create_split(args, 'validation', 3), 3)


def test_same_images_under_two_names_are_refused_by_their_logits(model, monkeypatch):
    """Some data sets take several names for one split."""
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = Validator(args, model, Accelerator())
    validator.calibration_split = create_split(args, 'test', 3), 'the test split'
    with pytest.raises(MultiExitError, match='--calib-split validation and --split test are the same images'):
        validator.run()


# What is timed


def test_timed_images_come_from_all_classes():
    """The folder is sorted by class; the first images would all be cats."""
    args = parse('--model', 'test_resnet', '--batch-size', '4')
    dataset = [(torch.full((3, 4, 4), float(idx)), idx) for idx in range(10)]

    class Sorted(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return len(dataset)

        def __getitem__(self, idx):
            image, target = dataset[idx]
            return image.byte().numpy(), target

    config = {**DATA_CONFIG, 'mean': (0.0,) * 3, 'std': (1 / 255,) * 3}
    images = load_mixed_batch(args, Sorted(), config, Accelerator())
    assert images[:, 0, 0, 0].round().tolist() == [0, 3, 6, 9]


def test_times_are_ratios_to_plain_timm(model, monkeypatch):
    """By a clock that counts the images that convolutions see."""
    clock, convolve = [0], torch.nn.Conv2d.forward

    def counted(self, x):
        clock[0] += len(x)
        return convolve(self, x)

    def ticks(call):
        before = clock[0]
        with torch.no_grad():
            call()
        return clock[0] - before

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', counted)
    monkeypatch.setattr(dynamic_report, 'time_interleaved', partial(time_interleaved, clock=lambda device: clock[0]))
    images = torch.randn(6, 3, 32, 32)
    policies = {'first': ExitPolicy('confidence', (0.0, None)), 'none': ExitPolicy('confidence', (None, None))}
    model.routing  # noqa: B018 - found once, by forwards that are no part of the time
    times = dynamic_report.time_policies(model, images, policies, rounds=2)
    expected = {
        'plain timm': ticks(lambda: model.backbone(images)),
        'all exits': ticks(lambda: model(images, exits=True)),
        'first': ticks(lambda: model(images, exit_idx=0)),
        'none': ticks(lambda: model.backbone(images)),
    }
    assert expected['first'] < expected['none'] < expected['all exits']
    assert {name: 6 / row['img/s'] for name, row in times.items()} == pytest.approx(expected)
    assert {name: row['time_ratio'] * expected['none'] for name, row in times.items()} == pytest.approx(expected)


# What it is compared with


def test_static_model_of_a_checkpoint_answers_as_it_did(tmp_path):
    network = timm.create_model('test_resnet', num_classes=5).eval()
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'last.pth.tar')
    model = create_static(f'test_resnet:{tmp_path}/last.pth.tar', num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))
    assert len(model.exits) == 0


def test_static_model_of_a_folder_is_the_main_network(tmp_path, model):
    tme.save_pretrained(model, tmp_path / 'net', data_config=DATA_CONFIG)
    static = create_static(f'local-dir:{tmp_path}/net', num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(static(images), model(images))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet51', "no model 'resnet51'"),
        ('test_resnet:nowhere.pth', '--compare test_resnet:nowhere.pth: There is no checkpoint nowhere.pth'),
        ('local-dir:nowhere', 'is no model folder'),
        ('NET', 'has 10 classes, allowed are the 4'),
        ('GRAY', 'takes images of 1 channels, allowed is 3'),
    ],
)
def test_static_models_that_cannot_be_compared(name, message, tmp_path, make_model):
    for folder, classes, channels in (('NET', 10, 3), ('GRAY', 4, 1)):
        net = timm.create_model('test_resnet', num_classes=classes, in_chans=channels)
        net = tme.attach_exits(net, input_size=(channels, 32, 32))
        tme.save_pretrained(net, tmp_path / folder, data_config={'input_size': (channels, 32, 32)})
    name = f'local-dir:{tmp_path}/{name}' if name.isupper() else name
    with pytest.raises(MultiExitError, match=message) as raised:
        create_static(name, num_classes=4)
    assert '\n' not in str(raised.value)


# Flags


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--threshold 1.5', 'A threshold is 1.5, confidence allows numbers from 0 to 1'),
        ('--threshold 0.5,0.6,0.7', 'The policy has 3 thresholds, the model 2 exits'),
        ('--threshold 0.5 --criterion patience', 'patience allows 1, 2'),
        ('--budget 60', "The budget is '60'"),
        ('--budget 60%', '--budget 60% needs data to keep it on: give --calib-split NAME or --calib-from-train N'),
        ('--max-drop 0.01', '--max-drop 0.01 needs data to prove it on'),
        ('--max-drop 2 --calib-split validation', '--max-drop is 2.0, allowed are numbers above 0 and below 1'),
        ('--delta 0', '--delta is 0.0, allowed'),
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


def test_several_processes_give_the_table_alone(model, monkeypatch):
    validator = Validator(parse('--model', 'test_resnet', '--img-size', '32'), model, Accelerator())
    validator.accelerator = Namespace(num_processes=2)
    assert not validator._keeps_logits()


def test_logits_that_nobody_asked_for_are_not_kept_beyond_memory(model, monkeypatch):
    validator = Validator(parse('--model', 'test_resnet', '--img-size', '32'), model, Accelerator())
    size = 4 * 360 * 10 * 3
    monkeypatch.setattr('timm_multiexit.validation._MAX_UNASKED_BYTES', size)
    assert validator._keeps_logits()
    monkeypatch.setattr('timm_multiexit.validation._MAX_UNASKED_BYTES', size - 1)
    assert not validator._keeps_logits()
    validator.args.threshold = [0.5]
    assert validator._keeps_logits()
