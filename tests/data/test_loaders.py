"""Data through whole runs: hold-outs, damaged files, splits, sizes and several labels per image."""

import csv
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import cases, write_images
from PIL import Image
from torch.utils.data import DataLoader

from timm_multiexit.cli import build_training, train
from timm_multiexit.cli.build_training import create_datasets, create_run_data
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.data.datasets import CheckedImages
from timm_multiexit.training.run import TrainingRun

QUICK = ('--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--opt', 'adamw', '--lr', '0.002')
QUICK += ('--warmup-epochs', '0', '--epochs', '1', '--output', 'out', '--experiment', 'run')


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'images')


@pytest.fixture
def train_on(run_script, tmp_path, monkeypatch):
    """Return a function that trains on a folder into out/run and returns that folder and what was printed."""
    iterators = []
    original = DataLoader._get_iterator

    def get_iterator(loader):
        iterators.append(original(loader))
        return iterators[-1]

    monkeypatch.setattr(DataLoader, '_get_iterator', get_iterator)

    def run(folder, *argv, code=0):
        result = run_script(train.main, *QUICK, '--data-dir', folder, *argv)
        assert result[0] == code, result
        return tmp_path / 'out/run', SimpleNamespace(out=result[1], err=result[2])

    yield run
    # Left to the garbage collector, every loading process takes five seconds to end.
    for iterator in iterators:
        getattr(iterator, '_shutdown_workers', lambda: None)()


def read_rows(run):
    with open(run / 'summary.csv') as file:
        return list(csv.DictReader(file))


def assert_one_line(result, message):
    line = result.err.strip().splitlines()[-1]
    assert line.startswith('train.py: error: ')
    assert message in line


@pytest.mark.parametrize('workers', ['0', '2'])
def test_damaged_image_stops_the_run_by_its_name(workers, folder, train_on):
    (folder / 'train/dog/3.jpg').write_bytes(b'no image')
    run, result = train_on(folder, '--eed', '--bad-images', 'stop', '-j', workers, code=2)
    assert_one_line(result, 'train/dog/3.jpg: it is not an image')
    assert not (run / 'summary.csv').exists()


def test_damaged_image_is_skipped_if_it_may_be(folder, train_on):
    (folder / 'train/dog/3.jpg').write_bytes(b'no image')
    run, _ = train_on(folder, '--eed', '--bad-images', 'skip')
    assert len(read_rows(run)) == 1


def test_damaged_image_of_the_evaluation_stops_the_run_too(folder, train_on):
    (folder / 'val/dog/3.jpg').write_bytes(b'no image')
    _, result = train_on(folder, '--eed', '--bad-images', 'stop', code=2)
    assert_one_line(result, 'val/dog/3.jpg: it is not an image')


def test_held_out_images_choose_the_epoch_and_train_nothing(folder, train_on, monkeypatch):
    opened = {'train': [], 'eval': []}
    original = CheckedImages.__getitem__

    def spy(dataset, index):
        kind = 'train' if 'Random' in str(dataset.transform) else 'eval'
        opened[kind].append(dataset.filename(index, absolute=True))
        return original(dataset, index)

    monkeypatch.setattr(CheckedImages, '__getitem__', spy)
    run, result = train_on(folder, '--eed', '--val-from-train', '8', '--epochs', '2')
    trained, evaluated = set(opened['train']), set(opened['eval'])
    held_out = {name for name in evaluated if '/train/' in name}
    assert len(held_out) == 8
    assert {name.split('/')[-2] for name in held_out} == {'cat', 'dog'}
    assert sum('/cat/' in name for name in held_out) == 4
    assert not trained & held_out
    assert len(trained | held_out) == 24
    assert {name for name in evaluated - held_out} == {str(path) for path in (folder / 'val').rglob('*.jpg')}
    assert not any('/val/' in name for name in trained)
    results = json.loads((run / 'results.json').read_text())
    assert (results['split'], results['num_samples']) == ('validation', 11)
    assert results['epoch_chosen_on'] == '8 images held out of train'
    assert 'chosen by top1 on 8 images held out of train:' in result.out


def test_too_many_held_out_images_are_one_line(folder, train_on):
    run, result = train_on(folder, '--eed', '--val-from-train', '23', code=2)
    assert_one_line(result, 'Number of held-out images must be in [1, 22], got 23')
    assert not run.exists()


def test_padded_crops_are_windows_of_the_padded_image(tmp_path):
    pixels = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251 + 1
    for name in ('a', 'b'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for idx in range(8):
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'train' / name / f'{idx}.png')
    flags = ('--crop-padding', '4', '--hflip', '0', '--color-jitter', '0', '--val-split', '', '--no-prefetcher')
    args = parse_train_args([*flags, '-j', '0', '-b', '8', '--data-dir', str(tmp_path)])
    (dataset, _, _), _ = create_datasets(args)
    config = {'input_size': (3, 32, 32), 'mean': (0, 0, 0), 'std': (1, 1, 1), 'interpolation': 'bilinear'}
    data, _ = create_run_data(args, (dataset, None, None), config, Accelerator(cpu=True), num_classes=2)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = {(top, left): padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
    seen = Counter()
    for epoch in range(20):
        for images, _ in data.train_loader.epoch(epoch):
            for image in (images * 255).round().permute(0, 2, 3, 1).numpy():
                seen[next(place for place, window in windows.items() if (window == image).all())] += 1
    assert seen.total() == 320
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))
    assert len(seen) > 70  # of 81; 320 draws leave 1.5 of them out


RUNS = {
    'padded': ('--eed', '--crop-padding', '4', '--cache-images'),
    'jsd-exits': ('--eed', '--aug-splits', '2', '--jsd-loss'),
    'jsd-plain': ('--aug-splits', '2', '--jsd-loss'),
    'split-bn': ('--eed', '--aug-splits', '2', '--jsd-loss', '--split-bn'),
    'split-erasing': ('--eed', '--aug-splits', '3', '--reprob', '0.5', '--resplit', '--aa', 'augmix-m3'),
    'sizes': ('--eed', '--train-img-sizes', '24', '32'),
    'sizes-plain': ('--train-img-sizes', '24', '32', '--train-batch-sizes', '8', '4'),
    'progressive': ('--eed', '--train-img-sizes', '24', '32', '--train-size-schedule', 'progressive'),
    'host': ('--eed', '--no-prefetcher', '--mixup', '0.3', '--cutmix', '0.3'),
    'no-aug': ('--eed', '--no-aug', '-vb', '3'),
    'grey': ('--eed', '--in-chans', '1'),
}


SLOW_RUNS = ('padded', 'jsd-plain', 'split-erasing', 'sizes', 'sizes-plain', 'no-aug')


@pytest.mark.parametrize('flags', cases({name: (flags,) for name, flags in RUNS.items()}, slow=SLOW_RUNS))
def test_flags_of_the_data_train_and_report(flags, folder, train_on):
    run, result = train_on(folder, *flags)
    row = read_rows(run)[0]
    assert np.isfinite(float(row['train_loss']))
    assert json.loads((run / 'results.json').read_text())['num_samples'] == 11
    assert result.out.count('main  classifier') == 1


@pytest.mark.slow
def test_split_norms_are_resumed_and_left_out_of_the_best_network(folder, train_on):
    flags = ('--eed', '--aug-splits', '2', '--jsd-loss', '--split-bn')
    run, _ = train_on(folder, *flags)
    run, _ = train_on(folder, *flags, '--epochs', '2', '--resume', 'auto')
    assert [row['epoch'] for row in read_rows(run)] == ['0', '1']
    state = torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']
    assert any('aux_bn' in key for key in state)


def test_batches_have_the_sizes_of_the_list(folder, train_on, monkeypatch):
    seen = []
    original = TrainingRun._on_update

    def note(run, trainer):
        seen.append(tuple(trainer.images.shape))
        original(run, trainer)

    monkeypatch.setattr(TrainingRun, '_on_update', note)
    train_on(folder, '--eed', '--train-img-sizes', '24', '32', '--train-batch-sizes', '6', '4', '--epochs', '3')
    assert set(seen) == {(6, 3, 24, 24), (4, 3, 32, 32)}


REFUSED = {
    'repeats': (('--aug-repeats', '3'), 'RepeatAugment not currently supported in non-distributed'),
    'policy': (('--aa', 'bogus'), 'Cannot load the training data: Unknown AA policy bogus'),
    'batch': (('-b', '64'), 'at most the number of training images, 24, got 64'),
}


@pytest.mark.parametrize(('flags', 'message'), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_loaded_so_is_one_line(flags, message, folder, train_on):
    run, result = train_on(folder, '--eed', *flags, code=2)
    assert_one_line(result, message)
    assert not run.exists()


class Labelled(torch.utils.data.Dataset):
    """Small pictures; one has the labels of the channels that are bright, none to three."""

    def __init__(self, count, seed):
        random = np.random.RandomState(seed)
        self.labels = [sorted(random.choice(3, random.randint(0, 4), replace=False).tolist()) for _ in range(count)]
        self.noise = random.randint(0, 60, (count, 36, 36, 3)).astype('uint8')
        self.transform = self.target_transform = None

    def __getitem__(self, index):
        pixels = self.noise[index].copy()
        pixels[:, :, self.labels[index]] += 180
        image, labels = Image.fromarray(pixels), self.labels[index]
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(labels) if self.target_transform else labels

    def __len__(self):
        return len(self.labels)


@pytest.fixture
def labelled(monkeypatch):
    def create(name, *, split, **kwargs):
        return Labelled(48, 0) if split == 'train' else Labelled(21, 1)

    monkeypatch.setattr(build_training, 'create_checked_dataset', create)


MULTI = ('--task', 'multilabel', '--dataset', 'hfds/some/labels', '--num-classes', '3')
MULTI_RUNS = {
    'exits': (('--exits', 'auto'), ('0', '1', '2', 'main', 'ens')),
    'distilled': (('--eed', '--exit-output-loss', 'bernoulli', '--model-ema'), ('0', '1', '2', 'main', 'ens')),
    'mixed': (('--exits', '1', '--mixup', '0.2', '--loss', 'asl'), ('0', 'main', 'ens')),
    'host': (('--exits', '1', '--no-prefetcher', '--mixup', '0.2'), ('0', 'main', 'ens')),
    'plain': ((), ('main',)),
}


@pytest.mark.parametrize(('flags', 'names'), cases(MULTI_RUNS, slow=('mixed', 'host')))
def test_several_labels_per_image_from_end_to_end(flags, names, labelled, train_on):
    run, result = train_on('nowhere', *MULTI, *flags, '--epochs', '2')
    row = read_rows(run)[-1]
    for name in names:
        prefix = {'main': 'eval_', 'ens': 'eval_ens_'}.get(name, f'eval_exit{name}_')
        for metric in ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1'):
            assert np.isfinite(float(row[prefix + metric]))
    results = json.loads((run / 'results.json').read_text())
    assert results['num_samples'] == 21
    assert tuple(found['exit'] for found in results['rows']) == names
    assert all(0 < found['mAP'] <= 100 for found in results['rows'])
    header = next(line for line in result.out.splitlines() if line.startswith('exit'))
    assert header.split()[-4:] == ['mAP', 'micro-F1', 'macro-F1', 'sample-F1']
    assert yaml.safe_load((run / 'args.yaml').read_text())['eval_metric'] == 'map'


@pytest.mark.slow
def test_several_labels_are_learned(labelled, train_on):
    run, _ = train_on('nowhere', *MULTI, '--exits', '1', '--epochs', '6', '--no-aug', '--lr', '0.01')
    rows = read_rows(run)
    # By chance the mean average precision is the share of positives, about a half.
    assert float(rows[-1]['eval_map']) > 90
    assert float(rows[-1]['eval_exit0_map']) > 90
    best = max(rows, key=lambda row: float(row['eval_map']))
    found = json.loads((run / 'results.json').read_text())['rows'][1]['mAP']
    assert found == pytest.approx(float(best['eval_map']), abs=1e-3)
