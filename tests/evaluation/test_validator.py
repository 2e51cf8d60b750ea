"""The parts of validate.py: what it chooses thresholds on, what it times, what it compares with."""

import logging
import subprocess
from argparse import Namespace
from functools import partial

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import create_loader
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit.calibration.logits import LogitSet, collect_logits, fingerprint
from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.calibration.temperature import fit_temperatures
from timm_multiexit.calibration.thresholds import search_budgets
from timm_multiexit.cli.flags.validate_args import (
    check_budgets,
    check_outputs,
    check_validate_args,
    create_validate_parser,
)
from timm_multiexit.cli.validate_data import create_calibration_split, create_split, image_names, load_mixed_batch
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.evaluation import report as dynamic_report
from timm_multiexit.evaluation.evaluate import create_static, evaluate_loader, evaluate_logits
from timm_multiexit.evaluation.stamp import name_dataset
from timm_multiexit.evaluation.validator import Validator
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.environment import _find_commit, describe_environment
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_output
from timm_multiexit.utils.timing import time_interleaved
from timm_multiexit.version import __version__

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


def test_fingerprint_tells_images_apart_whatever_the_batch():
    images = torch.rand(7, 3, 9, 5)
    images[6] = images[2]
    images[5] = images[2].flip(-1)  # the same values in other places
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        batch = images.to(dtype)
        alone = [fingerprint(image[None]).item() for image in batch]
        strided = fingerprint(batch.contiguous(memory_format=torch.channels_last))
        assert fingerprint(batch).tolist() == strided.tolist() == alone
        assert alone[6] == alone[2]
        assert len(set(alone)) == 6


# What thresholds are chosen on


@pytest.mark.parametrize(
    ('folder', 'flags', 'shared'),
    [
        ('train', '--split validation --calib-from-train 4', '4 of the 4'),
        ('train', '--split validation --calib-split test', 'are the same images'),
        ('.', '--split training --calib-from-train 4', '4 of the 4'),
        ('.', '--split train --calib-from-train 4', '4 of the 4'),
        ('.', '--split train --train-split training --calib-from-train 4', '4 of the 4'),
        ('.', '--split validation --calib-split val', 'are the same images'),
        ('link', '--split val --calib-split test', 'are the same images'),
        ('some', '--split val --calib-split test', '11 of the 22'),
    ],
)
def test_images_under_another_name_are_refused(folder, flags, shared, image_folder):
    """By where they are, so that links and folders that timm falls back to are seen through."""
    for name, inside in (('link', ''), ('some', 'more')):
        (image_folder / name).mkdir()
        (image_folder / name / 'val').symlink_to(image_folder / 'val')
        if not inside:
            (image_folder / name / 'test').symlink_to(image_folder / 'val')
    for label in ('cat', 'dog'):
        (image_folder / 'some/test' / label).mkdir(parents=True)
        (image_folder / 'some/test' / label / 'old').symlink_to(image_folder / 'val' / label)
        for file in (image_folder / 'val' / label).iterdir():
            (image_folder / 'some/test' / label / file.name).write_bytes(file.read_bytes())
    args = parse('--model', 'test_resnet', *flags.split(), str(image_folder / folder))
    if folder == 'some':
        args.class_map = str(image_folder / 'classes.txt')
        (image_folder / 'classes.txt').write_text('cat\ndog\nold\n')
    with pytest.raises(MultiExitError, match=shared) as raised:
        create_calibration_split(args, create_split(args, args.split, 3), 3)
    assert '\n' not in str(raised.value)


def test_names_of_held_out_images_are_those_of_the_files(image_folder):
    args = parse('--model', 'test_resnet', str(image_folder))
    train = create_split(args, 'train', 3)
    kept, held_out = hold_out(train, 5, seed=3)
    names = [image_names(part) for part in (train, kept, held_out)]
    assert names[0] == {str(path.resolve()) for path in (image_folder / 'train').rglob('*.jpg')}
    assert (len(names[1]), len(names[2]), names[1] | names[2]) == (19, 5, names[0])
    assert image_names(create_checked_dataset(DIGITS, root=None, split='test')) == set()


def test_part_of_the_reported_images_is_refused_by_what_is_seen(model):
    """Where images have no file names, after evaluation; what was found by then is shown."""
    args, shown = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32'), []
    validator = Validator(args, model, Accelerator(), show=shown.append)
    validator.calibration_split = hold_out(create_split(args, 'test', 3), 20, seed=1)[1], 'a part'
    with pytest.raises(MultiExitError, match='are the same images'):
        validator.run()
    assert 'on the test split, 360 images' in shown[0]
    assert 'Failure AUROC' in shown[1]


def test_an_image_that_is_there_twice_is_warned_of(model, caplog):
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--img-size', '32')
    validator = Validator(args, model, Accelerator())
    loader = [(torch.randn(50, 3, 32, 32), torch.zeros(50, dtype=torch.int64))]
    validator._collect = lambda _: collect_logits(model, loader)
    reported = [(torch.cat([loader[0][0][:2], torch.randn(8, 3, 32, 32)]), loader[0][1][:10])]
    with caplog.at_level(logging.WARNING):
        validator._calibrate(collect_logits(model, reported))
    assert caplog.messages == ['2 of 50 images that thresholds are chosen on are among those reported.']


@pytest.mark.parametrize(
    ('flags', 'run', 'warns'),
    [
        ('--calib-from-train 150', 'val_from_train: 150', True),
        ('--calib-split validation', 'val_from_train: 150', False),
        ('--calib-split validation', 'val_split: validation', True),
        ('--calib-split validation', 'val_split: test', False),
    ],
)
@pytest.mark.parametrize('max_drop', [True, False])
def test_bound_on_images_that_chose_the_epoch_is_warned_of(flags, run, warns, max_drop, tmp_path, caplog):
    (tmp_path / 'run/best').mkdir(parents=True)
    (tmp_path / 'run/args.yaml').write_text(f'seed: 42\ntrain_split: train\n{run}\n')
    flags = [*flags.split(), *(['--max-drop', '0.1'] if max_drop else [])]
    args = parse('--model', f'local-dir:{tmp_path}/run/best', *flags)
    with caplog.at_level(logging.WARNING):
        create_calibration_split(args, create_split(args, 'test', 3), 3)
    assert ['chose its best epoch on' in text for text in caplog.messages] == [True] * (warns and max_drop)


def test_held_out_images_of_an_unknown_run_are_warned_of(caplog):
    args = parse('--model', 'test_resnet', '--calib-from-train', '150')
    with caplog.at_level(logging.WARNING):
        create_calibration_split(args, create_split(args, 'test', 3), 3)
    assert len(caplog.messages) == 1
    assert 'whether it was trained on the 150 images of train' in caplog.messages[0]


def test_held_out_images_are_those_of_training_and_not_augmented(model):
    """The same choice as train.py's, through the evaluation transform: the logits of a loader made by hand."""
    args = parse('--model', 'test_resnet', '--calib-from-train', '150', '--seed', '7', '--img-size', '32')
    validator = Validator(args, model, Accelerator())
    collected, source = validator._calibrate(collect_logits(model, [(torch.zeros(1, 3, 32, 32), torch.zeros(1))]))
    assert source == '150 images drawn from the train split with seed 7'  # the run is not known
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
        caveat = ', on which the network was trained' if warns else ''
        how = 'drawn from' if warns else 'held out of'
        assert source == f'150 images {how} the train split with seed 9{caveat}'
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


def test_latency_is_of_one_image_to_each_exit_alone(model, monkeypatch):
    """By a clock that counts the values that convolutions give."""
    clock, convolve = [0], torch.nn.Conv2d.forward

    def counted(self, x):
        out = convolve(self, x)
        clock[0] += out.numel()
        return out

    def ticks(call):
        before = clock[0]
        with torch.no_grad():
            call()
        return clock[0] - before

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', counted)
    monkeypatch.setattr(dynamic_report, 'time_interleaved', partial(time_interleaved, clock=lambda device: clock[0]))
    images = torch.randn(6, 3, 32, 32)
    model(images[:1], exit_idx=0)  # what is found once is no part of the time
    latency = dynamic_report.time_exits(model, images, rounds=3)
    expected = {
        'plain timm': ticks(lambda: model.backbone(images[:1])),
        '0': ticks(lambda: model(images[:1], exit_idx=0)),
        '1': ticks(lambda: model(images[:1], exit_idx=1)),
        'main': ticks(lambda: model.backbone(images[:1])),
    }
    assert 0 < expected['0'] < expected['1']
    assert latency['ms'] == {name: 1e3 * num for name, num in expected.items()}
    assert {**latency, 'ms': None} == {'batch_size': 1, 'rounds': 3, 'device': 'cpu', 'ms': None}
    assert list(latency['ms']) == ['plain timm', '0', '1', 'main']


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
        (
            '--budget 60%',
            '--budget 60% needs data to choose thresholds on: give --calib-split NAME or --calib-from-train N',
        ),
        ('--max-drop 0.01', '--max-drop 0.01 needs data to choose thresholds on'),
        ('--delta 0.1', '--delta needs --max-drop F'),
        ('--seed 0', '--seed needs --calib-from-train N'),
        ('--train-split train --calib-split validation', '--train-split needs --calib-from-train N'),
        ('--calib-split validation --calib-from-train 9', 'exclude each other'),
        ('--criterion margin', '--criterion needs thresholds'),
        ('--combine mean', '--combine needs thresholds'),
    ],
)
def test_flags_that_do_not_fit(flags, message, model):
    with pytest.raises(MultiExitError, match=message) as raised:
        check_validate_args(parse('--model', 'test_resnet', *flags.split()), model, num_processes=1)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'flags', ['--threshold 0.5', '--compare a', '--plot p.png', '--calib-split train', '--budget 60%', '--max-drop .1']
)
def test_flags_that_need_exits_and_one_process(flags, model, make_model):
    args = parse('--model', 'net', *flags.split())
    plain = tme.MultiExitModel(model.backbone, [])
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs a model with exits, net has none'):
        check_validate_args(args, plain, num_processes=1)
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs all logits in one process'):
        check_validate_args(args, model, num_processes=2)


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
            'needs --model local-dir:FOLDER, got test_resnet',
        ),
        (f'{SAVED} --model hf-hub:org/net@abc', 'needs --model local-dir:FOLDER, got hf-hub:org/net@abc'),
        (f'{SAVED} --checkpoint last.pth.tar', '--save-policy and --checkpoint exclude each other'),
        (f'{SAVED} --exits 2', '--save-policy and --exits exclude each other'),
        (f'{SAVED} --gp max', '--save-policy and --gp exclude each other'),
        ('--save-policy --budget 90%', '--save-policy needs data to choose thresholds on: give --calib-split NAME or'),
        ('--save-policy --calib-split validation --threshold 0.9', 'needs a policy to save. Give --budget B or'),
    ],
)
def test_policies_that_are_not_the_folders_are_not_saved(flags, message, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *flags.split())
    with pytest.raises(MultiExitError, match=message) as raised:
        check_validate_args(args, model, num_processes=1)
    assert '\n' not in str(raised.value)


def test_policy_of_other_classes_or_no_exits_is_not_saved(make_model, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split())
    with pytest.raises(MultiExitError, match="the folder's own classes, got 7 others. Leave out --num-classes"):
        check_validate_args(args, make_model(exits=[1, 3], num_classes=7), num_processes=1)
    with pytest.raises(MultiExitError, match='holds a plain timm model'):
        check_validate_args(args, tme.MultiExitModel(model.backbone, []), num_processes=1)
    check_validate_args(args, model, num_processes=1)
    with pytest.raises(MultiExitError, match='needs all logits in one process'):
        check_validate_args(args, model, num_processes=2)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--crop-pct 0.9 --img-size 32', None),
        ('--crop-pct 0.8', 'own crop_pct 0.9, got 0.8'),
        ('--img-size 64', r'own input_size \[3, 32, 32\], got \[3, 64, 64\]'),
        ('--mean 0.1', r'own mean \[0.5, 0.5, 0.5\], got \[0.1, 0.1, 0.1\]'),
    ],
)
def test_policy_is_saved_for_images_as_the_folder_has_them_alone(flags, message, net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split(), *flags.split())
    if message is None:
        Validator(args, model, Accelerator())
    else:
        with pytest.raises(MultiExitError, match=message):
            Validator(args, model, Accelerator())


def test_policy_is_not_saved_for_weights_that_came_later(net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split())
    validator = Validator(args, model, Accelerator())
    before = (net_folder / 'config.json').read_bytes()
    policies = {'budget 90%': (ExitPolicy('confidence', (0.5, 0.5)), 'some images')}
    with open(net_folder / 'exits.safetensors', 'ab') as file:
        file.write(b'more')
    with pytest.raises(MultiExitError, match='other weights in the meantime'):
        validator._save_policy(None, policies)
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
        described = Validator(parse(*flags), evaluated, Accelerator()).described
        weights = described.pop('weights', {})
        assert set(weights) == ({'model.safetensors', 'exits.safetensors'} if is_named else set())
        assert described.pop('preparation')['input_size'] == [3, 32, 32]
        assert described == {'dataset': 'digits', 'input_size': [3, 32, 32], 'precision': 'float32'}


@pytest.mark.parametrize(
    ('dataset', 'data_dir', 'name'),
    [
        ('digits', None, 'digits'),
        ('torch/cifar10', 'data', 'cifar10'),
        ('hfds/uoft-cs/cifar10', None, 'uoft-cs/cifar10'),
        ('TFDS/imagenet2012:5.0.0', 'data', 'imagenet2012:5.0.0'),
        ('hfds//home/me/private/birds', None, 'birds'),
        ('torch/image_folder', '/home/me/birds', 'birds'),
        ('', '/home/me/birds/', 'birds'),
        ('', 'birds/new/..', 'birds'),
    ],
)
def test_data_are_named_without_folders_of_the_machine(dataset, data_dir, name):
    assert name_dataset(Namespace(dataset=dataset, data_dir=data_dir)) == name


def test_data_here_are_named_by_their_folder(tmp_path, monkeypatch):
    (tmp_path / 'birds').mkdir()
    monkeypatch.chdir(tmp_path / 'birds')
    assert name_dataset(Namespace(dataset='', data_dir='.')) == 'birds'


# What measurements are stamped with


def test_commit_is_that_of_the_file_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    for name in ('ours', 'installed'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'module.py').write_text('')
        assert _find_commit.__wrapped__(tmp_path / name / 'module.py') == 'unknown'
        who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
        for words in (('init', '-q'), (*who, 'commit', '-q', '--allow-empty', '-m', 'first')):
            subprocess.run(('git', '-C', str(tmp_path / name), *words), check=True)
    # Of the second, the file is in somebody's folder and not in his repository.
    assert _find_commit.__wrapped__(tmp_path / 'installed/module.py') == 'unknown'
    for words in (('add', '.'), (*who, 'commit', '-q', '-m', 'second')):
        subprocess.run(('git', '-C', str(tmp_path / 'ours'), *words), check=True)
    head = next((tmp_path / 'ours/.git/refs/heads').iterdir()).read_text()
    assert _find_commit.__wrapped__(tmp_path / 'ours/module.py') == head[:12]
    (tmp_path / 'ours/module.py').write_text('changed')
    assert _find_commit.__wrapped__(tmp_path / 'ours/module.py') == f'{head[:12]}-dirty'


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert describe_environment()['commit'] == 'unknown'


def test_environment_names_every_library_that_results_hang_on():
    words = [item.split()[0] for item in describe_environment()['versions'].split(', ')]
    libraries = ['timm', 'torch', 'torchvision', 'accelerate', 'safetensors', 'huggingface_hub']
    assert words == ['python', 'timm_multiexit', *libraries]
    assert f'timm_multiexit {__version__},' in describe_environment()['versions']


def test_several_processes_give_the_table_alone(model, monkeypatch):
    validator = Validator(parse('--model', 'test_resnet', '--img-size', '32'), model, Accelerator())
    validator.accelerator = Namespace(num_processes=2)
    assert not validator._keeps_logits()


def test_logits_that_nobody_asked_for_are_not_kept_beyond_memory(model, monkeypatch):
    validator = Validator(parse('--model', 'test_resnet', '--img-size', '32'), model, Accelerator())
    size = 4 * 360 * 10 * 3
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_UNASKED_BYTES', size)
    assert validator._keeps_logits()
    monkeypatch.setattr('timm_multiexit.evaluation.validator._MAX_UNASKED_BYTES', size - 1)
    assert not validator._keeps_logits()
    validator.args.threshold = [0.5]
    assert validator._keeps_logits()


# Budgets that cannot be, and files that cannot be written


@pytest.mark.parametrize('budget', ['3%', '0.001MMACs', '500%', '9TMACs'])
def test_budgets_that_no_policy_meets_are_refused_before_evaluation(budget, model):
    costs = StageCosts.from_exit_costs(model.cost())
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--budget', budget)
    with pytest.raises(MultiExitError, match=f'The budget {budget} is') as raised:
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
        ('--plot folder', 'folder must be the path of a file, got a folder'),
        ('--results-file folder', 'folder must be the path of a file, got a folder'),
        ('--results-file file/rows.csv', 'Cannot write file/rows.csv: '),
        ('--plot file/deep/er/a.png', 'Cannot write file/deep/er/a.png: '),
        (f'--results-file {"x" * 254}', 'Cannot write x+: File name too long'),
        ('--results-file new/accuracy_vs_macs.png', 'is the path of the picture too'),
        ('--results-file a --plot ./a', 'is the path of the picture too'),
        (
            '--results-file net/config.json --model local-dir:net --save-policy',
            'net/config.json is the path of the configuration of the model too. Give the results another one',
        ),
        ('--model local-dir:file --save-policy', 'Cannot write file/config.json: '),
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


def test_full_disk_leaves_the_old_file_and_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / 'rows.csv'
    path.write_text('old')

    def write_half(self, content):
        self.open('wb').close()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', write_half)
    with pytest.raises(MultiExitError, match='rows.csv could not be written: No space left on device') as raised:
        write_output(path, b'new')
    assert '--resume' not in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ['rows.csv']
    assert path.read_text() == 'old'


# The curve


@pytest.mark.parametrize(
    ('seed', 'num', 'scales'), [(0, 200, (1, 2, 3, 4)), (10, 500, (4, 1, 5, 0.5)), (6, 200, (1,) * 4)]
)
def test_search_is_at_or_above_the_solver_where_both_were_chosen(seed, num, scales):
    """The solver decides by raw confidence as in the field, the search with temperatures."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (num,), generator=generator)
    shared, logits = torch.randn(num, 10, generator=generator), []
    for idx, scale in enumerate(scales):
        single = shared + torch.randn(num, 10, generator=generator) * (4 - idx) * 0.375
        single[torch.arange(num), targets] += 1 + 0.7 * idx
        logits.append(single * scale)
    costs = StageCosts((10, 40, 70, 100), (2, 2, 2))
    collected = LogitSet(tuple(logits), targets, torch.zeros(1, 3, 1, 1), torch.arange(num))
    table = search_budgets(logits, targets, costs, temperatures=fit_temperatures(logits, targets))
    meter = PolicyMeter(logits, targets, costs)
    curve = dynamic_report.report_curve(meter, dynamic_report.Calibration(collected, 'the same'), costs, table)
    for point in curve['points']:
        assert point['search'] is not None
        assert point['search']['top-1'] >= point['solver']['top-1'] - 1e-9
        assert point['search']['macs'] <= point['solver']['macs'] * (1 + 1e-6)
