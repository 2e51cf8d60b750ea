import logging
import tarfile
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, IterableImageDataset, create_dataset, create_loader
from timm.data.readers.reader import Reader
from torchvision.datasets import ImageFolder, VisionDataset

from timm_multiexit.data.datasets import class_to_idx, create_checked_dataset
from timm_multiexit.data.holdout import choose_per_class, hold_out, read_targets
from timm_multiexit.utils.errors import MultiExitError


def digits(split='train'):
    return create_checked_dataset('digits', root=None, split=split)


def repeat(counts):
    return [label for label, count in enumerate(counts) for _ in range(count)]


def test_every_image_is_in_exactly_one_part():
    chosen = choose_per_class(repeat((7, 3, 12)), 9, seed=3)
    assert len(set(chosen)) == len(chosen) == 9
    assert chosen.tolist() == sorted(chosen.tolist())
    train, val = hold_out(digits(), 200)
    names = sorted([*train.filenames(), *val.filenames()], key=lambda name: int(name.split('.')[0]))
    assert (len(train), len(val)) == (1057, 200)
    assert names == [f'{idx}.png' for idx in range(1257)]


@pytest.mark.parametrize(
    ('counts', 'num', 'expected'),
    [
        ((10, 10, 10), 6, (2, 2, 2)),
        ((100, 10), 11, (10, 1)),
        ((50, 30, 20), 7, (4, 2, 1)),  # 3.5, 2.1, 1.4: the remainder of 0.5 is the largest
        ((1, 1, 8), 5, (0, 0, 5)),  # 0.5, 0.5, 4: the two with one image keep it
        ((1, 1, 1, 17), 16, (0, 0, 0, 16)),
        ((2, 3), 3, (1, 2)),
    ],
)
def test_classes_give_shares_worked_by_hand(counts, num, expected):
    for seed in range(5):
        targets = repeat(counts)
        given = Counter(targets[place] for place in choose_per_class(targets, num, seed=seed))
        assert tuple(given[label] for label in range(len(counts))) == expected


def test_shares_are_within_one_of_exact_and_no_class_is_emptied():
    generator = np.random.RandomState(0)
    for _ in range(60):
        counts = generator.randint(2, 40, generator.randint(1, 12))
        targets = generator.permutation(repeat(counts)).tolist()
        num = int(generator.randint(1, sum(counts) // 2 + 1))
        given = Counter(targets[place] for place in choose_per_class(targets, num, seed=1))
        assert sum(given.values()) == num
        for label, count in enumerate(counts):
            assert abs(given[label] - Fraction(int(count) * num, int(sum(counts)))) < 1
            assert given[label] < count


def test_fewer_images_than_classes_are_not_those_of_the_first_classes():
    targets = repeat([4] * 100)
    labels = {targets[place] for place in choose_per_class(targets, 20)}
    assert len(labels) == 20
    assert max(labels) > 60


def test_choice_hangs_on_the_seed_alone():
    targets = repeat((40, 40))
    first = choose_per_class(targets, 20, seed=5).tolist()
    np.random.seed(9)
    torch.manual_seed(9)
    assert choose_per_class(torch.tensor(targets), 20, seed=5).tolist() == first
    assert choose_per_class(targets, 20, seed=6).tolist() != first


def test_choice_is_the_first_of_each_class_in_a_shuffle_of_frozen_random_numbers():
    # A resumed run must hold out what the run before it did, whatever the version: this order of draws must stay.
    targets = [label % 4 for label in range(60)]
    random = np.random.RandomState(7)
    random.permutation(4)  # who gets one more where remainders are equal: nobody here
    shuffled = random.permutation(60).tolist()
    expected = [place for label in range(4) for place in [idx for idx in shuffled if targets[idx] == label][:3]]
    assert choose_per_class(targets, 12, seed=7).tolist() == sorted(expected)


@pytest.mark.parametrize('num', [0, -3, 22, 24])
def test_number_that_empties_a_class_is_refused(image_folder, num):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    message = rf'^Number of held-out images must be in \[1, 22\], got {num}: each of 2 classes of the 24 '
    if num == 22:
        assert [len(part) for part in hold_out(dataset, 22)] == [2, 22]
    else:
        with pytest.raises(MultiExitError, match=message):
            hold_out(dataset, num)


def test_streams_are_refused():
    with pytest.raises(MultiExitError, match='cannot be held out of a stream'):
        hold_out(IterableImageDataset('', reader=[]), 5)


def images_of(path, kind):
    """Return 24 images in two classes as a data set of timm, torchvision or in a tar file."""
    if kind == 'folder':
        return create_checked_dataset('', root=str(path), split='train')
    if kind == 'torchvision':
        return create_dataset('torch/folder', root=str(path), split='train')
    with tarfile.open(path / 'train.tar', 'w') as tar:
        tar.add(path / 'train', '.')
    return create_dataset('', root=str(path / 'train.tar'))


@pytest.mark.parametrize('kind', ['folder', 'tar', 'torchvision'])
def test_parts_hold_both_classes_and_load_with_a_transform_each(image_folder, kind):
    dataset = images_of(image_folder, kind)
    whole = [(np.asarray(image).tobytes(), int(target)) for image, target in dataset]
    train, val = hold_out(dataset, 6, seed=2)
    seen = [(np.asarray(image).tobytes(), int(target)) for part in (train, val) for image, target in part]
    assert sorted(seen) == sorted(whole)
    assert Counter(target for _, target in seen[18:]) == {0: 3, 1: 3}
    assert class_to_idx(train) == class_to_idx(val) == {'cat': 0, 'dog': 1}
    train.transform = lambda image: 'train'
    val.transform = lambda image: 'val'
    assert {train[idx][0] for idx in range(18)} == {'train'}
    assert {val[idx][0] for idx in range(6)} == {'val'}
    assert isinstance(dataset[0][0], Image.Image)


@pytest.mark.parametrize('kind', ['folder', 'torchvision'])
def test_parts_go_through_the_loaders_of_timm(image_folder, kind):
    train, val = hold_out(images_of(image_folder, kind), 6)
    options = dict(input_size=(3, 32, 32), batch_size=3, device=torch.device('cpu'))
    # The training loader first: the transform of the second must not reach it.
    loader = create_loader(
        AugMixDataset(train, num_splits=2), is_training=True, num_aug_splits=2, num_workers=0, **options
    )
    loader_eval = create_loader(val, num_workers=1, **options)
    assert [tuple(images.shape) for images, _ in loader_eval] == [(3, 3, 32, 32)] * 2
    assert {tuple(images.shape) for images, _ in loader} == {(6, 3, 32, 32)}
    assert sorted(target for _, batch in loader_eval for target in batch.tolist()) == [0, 0, 0, 1, 1, 1]


def test_skipped_image_is_replaced_out_of_its_own_part(image_folder):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    for part in hold_out(dataset, 12, seed=0):
        allowed = {np.asarray(image).tobytes() for image, _ in part}
        for idx in range(0, 12, 2):
            path = image_folder / 'train' / part.filename(idx)
            content = path.read_bytes()
            path.write_bytes(content[:300])
            assert np.asarray(part[idx][0]).tobytes() in allowed
            path.write_bytes(content)


def test_file_names_are_those_of_the_images(image_folder):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    _, val = hold_out(dataset, 6)
    for idx, name in enumerate(val.filenames()):
        assert np.array_equal(np.asarray(val[idx][0]), np.asarray(Image.open(image_folder / 'train' / name)))
        assert val.filename(idx, absolute=True) == str(image_folder / 'train' / name)


class LabelledElsewhere(Reader):
    """Gives its labels as timm's reader of Hugging Face data sets does, and refuses to read an image."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def iter_targets(self):
        yield from self.labels


class NumberedVision(VisionDataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def with_reader(labels):
    dataset = digits()
    dataset.reader = LabelledElsewhere(labels)
    return dataset


@pytest.mark.parametrize(
    ('dataset', 'targets'),
    [
        (with_reader([1, 0, 1]), [1, 0, 1]),
        (NumberedVision([2, 0]), [2, 0]),
        (NumberedVision(torch.tensor([2, 0])), [2, 0]),
        (NumberedVision(np.array([2, 0])), [2, 0]),
        (with_reader([[1, 2], [], [0]]), None),
        (NumberedVision(torch.zeros(2, 8)), None),
        (torch.utils.data.TensorDataset(torch.zeros(3)), None),
    ],
    ids=['reader', 'list', 'tensor', 'array', 'several labels', 'rows', 'none'],
)
def test_targets_are_found_without_reading_images(dataset, targets):
    assert read_targets(dataset) == targets


def test_targets_of_folders_and_tar_files_are_those_they_give(image_folder):
    expected = [0] * 12 + [1] * 12
    for kind in ('folder', 'tar', 'torchvision'):
        assert read_targets(images_of(image_folder, kind)) == expected
    assert isinstance(images_of(image_folder, 'torchvision'), ImageFolder)
    assert read_targets(digits('test')) == [target for _, target in digits('test')]


def test_images_with_several_labels_are_chosen_at_random_and_it_is_said(caplog):
    with caplog.at_level(logging.INFO):
        train, val = hold_out(with_reader([[1, 2], [], [0], [0, 1]] * 5), 8)
    assert (len(train), len(val)) == (12, 8)
    assert not set(train.reader.indices) & set(val.reader.indices)
    assert caplog.messages == [
        'The data set does not tell one class per image: held-out images are chosen without regard to it.'
    ]
