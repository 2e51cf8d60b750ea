"""Links, folders that cannot be read, and what a class map leaves out: said before anything hangs or is lost."""

import os
import pickle

import pytest

from timm_multiexit.cli import train, validate
from timm_multiexit.data.datasets import class_to_idx, create_checked_dataset
from timm_multiexit.data.folders import read_folders
from timm_multiexit.utils.errors import DataError, InvalidValueError


def create(folder, split='train', **kwargs):
    return create_checked_dataset(kwargs.pop('name', ''), root=str(folder), split=split, **kwargs)


def make_cycle(folder, kind):
    """Links that os.walk would follow into ever longer paths."""
    train_folder = folder / 'train'
    if kind == 'parent':
        (train_folder / 'cat' / 'again').symlink_to(train_folder)
    elif kind == 'self':
        (train_folder / 'cat' / 'again').symlink_to('.')
    elif kind == 'data':
        (train_folder / 'all').symlink_to(folder)
    else:  # two folders that lead to each other
        (train_folder / 'cat' / 'friend').symlink_to(train_folder / 'dog')
        (train_folder / 'dog' / 'friend').symlink_to(train_folder / 'cat')


@pytest.mark.parametrize('kind', ['parent', 'self', 'data', 'each other'])
@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_links_in_a_cycle_are_named(name, kind, image_folder):
    make_cycle(image_folder, kind)
    with pytest.raises(
        DataError, match=r'^\S+/train/\S+ is a link to \S+/images\S*, a folder that it is in: remove it'
    ):
        create(image_folder, name=name)
    assert len(create(image_folder, 'validation')) == 11  # they are in the other split


@pytest.mark.parametrize('script', [train, validate], ids=['train', 'validate'])
def test_scripts_end_with_one_line_on_links_in_a_cycle(script, image_folder, run_script):
    for split in ('train', 'val'):
        for idx in range(3):  # three links on each level: nothing ends that follows them
            (image_folder / split / 'cat' / f'again{idx}').symlink_to(image_folder / split)
    code, _, err = run_script(script.main, '--model', 'test_resnet', '--num-classes', '2', '--data-dir', image_folder)
    assert (code, 'a folder that it is in: remove it.' in err.strip().splitlines()[-1]) == (2, True)


def test_links_without_a_cycle_are_followed(image_folder):
    outside = image_folder.parent / 'elsewhere'
    (image_folder / 'train' / 'cat').rename(outside)
    (image_folder / 'train' / 'cat').symlink_to(outside)
    (image_folder / 'train' / 'dog' / 'more').symlink_to(image_folder / 'val' / 'dog')
    tree = read_folders(image_folder / 'train')
    assert {os.path.relpath(path, image_folder / 'train'): num for path, num in tree.num_images.items()} == {
        'cat': 12,
        'dog': 12,
        'dog/more': 6,
    }


@pytest.mark.parametrize('class_map', [False, True])
def test_class_folder_linked_under_another_name_is_refused(class_map, image_folder):
    (image_folder / 'train' / 'puppy').symlink_to(image_folder / 'train' / 'dog')
    names = image_folder / 'classes.txt'
    names.write_text('cat\ndog\npuppy\n')
    with pytest.raises(DataError, match='/train/dog and .*/train/puppy are the same folder, so its images would be of'):
        create(image_folder, **({'class_map': str(names)} if class_map else {}))
    if class_map:  # named once, it is one class
        names.write_text('cat\ndog\n')
        assert len(create(image_folder, class_map=str(names))) == 24


@pytest.mark.parametrize('target', ['nowhere', 'bear'])
def test_class_folder_that_is_a_broken_link_is_named(target, image_folder):
    """timm takes it for a file that is not an image, and gives the classes after it other numbers."""
    (image_folder / 'train' / 'bear').symlink_to(target)
    with pytest.raises(DataError, match=r'/train/bear is a link to nothing that exists: repair or remove it\.$'):
        create(image_folder)


def test_image_that_is_a_broken_link_is_a_bad_image(image_folder, caplog):
    path = next((image_folder / 'train' / 'cat').iterdir())
    path.unlink()
    path.symlink_to('nowhere.jpg')
    dataset = create(image_folder)
    assert [dataset[idx][1] for idx in range(24)] == [0] * 12 + [1] * 12
    assert caplog.messages == [f'Cannot read image {path}, skipped: No such file or directory']


def test_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    """timm leaves it out, and gives the classes after it other numbers. Root reads everything, so it is made up here."""
    closed, scan = str(image_folder / 'train' / 'cat'), os.scandir

    def scandir(folder):
        if str(folder) == closed:
            raise PermissionError(13, 'Permission denied', closed)
        return scan(folder)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(DataError) as caught:
        create(image_folder)
    assert str(caught.value) == f'Cannot read folder {closed}: Permission denied.'


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        (['dog'], '12 of the 24 images in {root} are left out: 1 of their classes (cat) are not in the --class-map'),
        (['cat', 'dog', 'bear'], None),
    ],
)
def test_images_that_a_class_map_leaves_out_are_counted(names, said, image_folder, caplog):
    path = image_folder / 'classes.txt'
    path.write_text('\n'.join(names))
    dataset = create(image_folder, class_map=str(path))
    assert len(dataset) == (12 if said else 24)
    assert class_to_idx(dataset) == {name: idx for idx, name in enumerate(names)}
    root = image_folder / 'train'
    assert caplog.messages == ([f'{said.format(root=root)} {path}.'] if said else [])


def test_class_map_of_other_things_than_indices_is_refused(image_folder):
    for value in ('a', -1, 0.5):
        (image_folder / 'map.pkl').write_bytes(pickle.dumps({'cat': 0, 'dog': value}))
        with pytest.raises(DataError, match=f"an index >= 0 for each class, got {value!r} for 'dog'"):
            create(image_folder, class_map=str(image_folder / 'map.pkl'))


@pytest.mark.parametrize('name', ['nonsense', 'ImageFolder', 'cifar10', 'folder/images', 'torchvision/cifar10'])
def test_names_of_data_sets_that_timm_does_not_know_are_refused(name, image_folder):
    """timm reads the folder for any of them."""
    with pytest.raises(InvalidValueError) as caught:
        create(image_folder, name=name)
    assert str(caught.value) == (
        f"--dataset must be digits or TYPE/NAME, TYPE one of torch, hfds, hfids, tfds, wds, got '{name}'. Leave it out"
        ' for a folder of class folders.'
    )
