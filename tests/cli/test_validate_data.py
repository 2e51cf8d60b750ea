"""The images of validate.py: those that thresholds are chosen on, and those timed."""

import logging

import pytest
import torch
from accelerate import Accelerator
from helpers.validation import DATA_CONFIG, parse

from timm_multiexit.cli.build_training import loader_options
from timm_multiexit.cli.validate_data import (
    create_calibration_split,
    create_split,
    find_training_args,
    image_names,
    load_mixed_batch,
)
from timm_multiexit.data.datasets import create_checked_dataset
from timm_multiexit.data.digits import DIGITS
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.data.loaders import create_eval_loader
from timm_multiexit.utils.errors import DataError, MultiExitError


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
    with pytest.raises(DataError, match=shared) as raised:
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


@pytest.mark.parametrize(
    ('flags', 'run', 'warns'),
    [
        ('--calib-from-train 150', 'val_from_train: 150', True),
        ('--calib-split validation', 'val_from_train: 150', False),
        ('--calib-split validation', 'val_split: validation', True),
        ('--calib-split validation', 'val_split: val', True),
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
    assert 'held out 100 images of train with seed 9, not 150 of train with seed 9' in caplog.messages[0]


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
    accelerator = Accelerator()

    def create_loader(dataset, config):
        return create_eval_loader(dataset, data_config=config, accelerator=accelerator, **loader_options(args))

    images = load_mixed_batch(Sorted(), config, 4, create_loader, accelerator.device)
    assert images[:, 0, 0, 0].round().tolist() == [0, 3, 6, 9]


def test_arguments_of_the_run_that_cannot_be_read_are_an_error(tmp_path, monkeypatch):
    """A missing file says nothing; a broken one may hide that the model was trained on the images."""
    (tmp_path / 'run/best').mkdir(parents=True)
    args = parse('--model', f'local-dir:{tmp_path}/run/best', '--calib-from-train', '150')
    assert find_training_args(args) == {}
    (tmp_path / 'run/args.yaml').write_text('a: [')
    with pytest.raises(MultiExitError, match='/run is not a training run: .*args.yaml must be a YAML file'):
        create_calibration_split(args, create_split(args, 'test', 3), 3)
    (tmp_path / 'run/args.yaml').write_text('seed: 5')
    monkeypatch.chdir(tmp_path / 'run/best')
    assert find_training_args(parse('--model', 'local-dir:.')) == {'seed': 5}
