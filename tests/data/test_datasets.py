import io
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset, create_loader
from torch.utils.data import DataLoader

from timm_multiexit.data.datasets import (
    BadImageError,
    CheckedImages,
    check_classes,
    class_to_idx,
    create_checked_dataset,
)
from timm_multiexit.data.digits import DigitsReader
from timm_multiexit.data.holdout import hold_out
from timm_multiexit.utils.errors import MultiExitError


def test_digit_splits_cover_every_image_once():
    from sklearn.datasets import load_digits

    samples = [sample for split in ('train', 'validation', 'test') for sample in DigitsReader(split).samples]
    assert [len(DigitsReader(split)) for split in ('train', 'validation', 'test')] == [1257, 180, 360]
    assert len(samples) == 1797
    # Some digits look alike at eight by eight; as a multiset the images must be those of the data set.
    assert sorted(target for _, target in samples) == sorted(load_digits().target.tolist())


def test_every_digit_split_holds_every_class():
    for split in ('train', 'validation', 'test'):
        counts = np.bincount([target for _, target in DigitsReader(split).samples], minlength=10)
        assert counts.min() >= 10, (split, counts)


def test_digit_image_is_the_enlarged_original():
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = np.random.RandomState(0).permutation(1797)[0]
    content, target = DigitsReader('test').samples[0]
    image = Image.open(io.BytesIO(content))
    assert image.size == (32, 32)
    assert target == digits.target[first]
    shrunk = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
    assert np.abs(shrunk - digits.images[first]).mean() < 1.5  # bicubic blurs, it does not move


def test_unknown_digit_split_is_named():
    with pytest.raises(MultiExitError, match="split of the digits must be one of test, validation, train, got 'val'"):
        DigitsReader('val')


def test_digits_give_rgb_images():
    image, target = create_checked_dataset('digits', root=None, split='train')[0]
    assert (image.mode, image.size) == ('RGB', (32, 32))
    assert 0 <= target < 10


@pytest.mark.parametrize(
    ('root', 'message'),
    [('nowhere', "Data folder 'nowhere' does not"), (None, "Data folder '' does not"), ('empty', 'Found 0 images')],
)
def test_missing_and_empty_folders_are_named(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    with pytest.raises(MultiExitError, match=message) as error:
        create_checked_dataset('', root=root, split='train')
    assert '\n' not in str(error.value)


def test_class_count_and_names_come_from_the_folders(image_folder):
    train = create_dataset('', root=str(image_folder), split='train')
    val = create_dataset('', root=str(image_folder), split='validation')
    assert class_to_idx(train) == {'cat': 0, 'dog': 1}
    assert check_classes(train, val) == 2
    assert check_classes([1, 2], val) is None


def test_splits_that_number_their_classes_otherwise_are_refused(image_folder):
    (image_folder / 'val' / 'cat').rename(image_folder / 'val' / 'emu')
    train = create_dataset('', root=str(image_folder), split='train')
    val = create_dataset('', root=str(image_folder), split='validation')
    with pytest.raises(MultiExitError, match="got 2 in the training split and 2 in the other; 'cat' differs"):
        check_classes(train, val)


def test_split_that_is_not_there_is_refused_where_others_are(image_folder):
    # timm takes the folder itself, so that training and validation images are counted together
    with pytest.raises(MultiExitError, match="must be one of train, val, got 'test'"):
        create_checked_dataset('', root=str(image_folder), split='test')
    assert len(create_checked_dataset('', root=str(image_folder), split='validation')) == 11
    assert len(create_checked_dataset('', root=str(image_folder / 'val'), split='test')) == 11


@pytest.mark.parametrize('below', ['bear', 'bear/inner', 'bear/.cache'])
def test_class_folder_without_images_is_named(image_folder, below):
    (image_folder / 'train' / below).mkdir(parents=True)
    (image_folder / 'train' / 'bear' / 'notes.txt').write_text('none yet')
    name = 'inner' if below == 'bear/inner' else 'bear'
    with pytest.raises(MultiExitError, match=f"^Class '{name}' in .*train.* has no images: add some, or remove"):
        create_checked_dataset('', root=str(image_folder), split='train')
    assert len(create_checked_dataset('', root=str(image_folder), split='validation')) == 11


@pytest.mark.parametrize('hidden', ['.ipynb_checkpoints', '__MACOSX'])
def test_folders_that_tools_leave_behind_are_no_classes(image_folder, hidden):
    (image_folder / 'train' / hidden).mkdir()
    assert class_to_idx(create_checked_dataset('', root=str(image_folder), split='train')) == {'cat': 0, 'dog': 1}


def test_folders_around_class_folders_are_no_classes(image_folder):
    (image_folder / 'train' / 'pets').mkdir()
    (image_folder / 'train' / 'cat').rename(image_folder / 'train' / 'pets' / 'cat')
    assert class_to_idx(create_checked_dataset('', root=str(image_folder), split='train')) == {'cat': 0, 'dog': 1}


def test_class_map_keeps_the_numbers_of_classes_without_images(image_folder):
    (image_folder / 'train' / 'bear').mkdir()
    names = {'bear': 0, 'cat': 1, 'dog': 2}
    dataset = create_checked_dataset('', root=str(image_folder), split='train', class_map=names)
    assert class_to_idx(dataset) == names
    assert {target for _, target in dataset.reader.samples} == {1, 2}


def test_class_names_of_a_tar_file_are_found(image_folder, tmp_path):
    with tarfile.open(tmp_path / 'val.tar', 'w') as tar:
        tar.add(image_folder / 'val', '.')
    dataset = CheckedImages(create_dataset('', root=str(tmp_path / 'val.tar')))
    assert class_to_idx(dataset) == {'cat': 0, 'dog': 1}
    image, target = dataset[10]
    assert (image.size, int(target)) == ((40, 40), 1)


def damage(path, how):
    """Spoil an image in a way that Pillow meets with another error each."""
    content = path.read_bytes()
    if how == 'missing':
        path.unlink()
    elif how == 'png header':
        file = io.BytesIO()
        Image.new('RGB', (9, 9)).save(file, 'png')
        path.write_bytes(file.getvalue()[:8] + b'\0\0\0\3IHDR' + file.getvalue()[16:])
    elif how == 'bomb':
        path.write_bytes(b'P6 60000 60000 255\n')
    elif how == 'qoi':
        path.write_bytes(b'qoif' + (9).to_bytes(4, 'big') * 2 + bytes([3, 0]))
    else:
        path.write_bytes({'empty': b'', 'text': b'not found', 'truncated': content[:-100]}[how])


DAMAGES = {
    'missing': 'No such file or directory',
    'empty': 'it is not an image',
    'text': 'it is not an image',
    'truncated': 'image file is truncated',
    'png header': 'IHDR',
    'bomb': 'exceeds limit',
    'qoi': 'index out of range',
}


@pytest.mark.parametrize(('how', 'reason'), DAMAGES.items(), ids=DAMAGES)
def test_unreadable_image_is_named_once_and_the_next_one_taken(image_folder, caplog, how, reason):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    bad = image_folder / 'train' / 'cat' / '3.jpg'
    damage(bad, how)
    with caplog.at_level(logging.WARNING):
        taken = [dataset[3], dataset[3]]
    expected, target = dataset[4]
    for image, label in taken:
        assert (np.asarray(image) == np.asarray(expected)).all()
        assert label == target == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f'Cannot read image {bad}, skipped: ')
    assert reason in caplog.messages[0]
    assert '\n' not in caplog.messages[0]


@pytest.mark.parametrize(('how', 'reason'), DAMAGES.items(), ids=DAMAGES)
@pytest.mark.parametrize('mode', ['RGB', None])
def test_unreadable_image_stops_where_asked(image_folder, how, reason, mode):
    dataset = create_checked_dataset('', root=str(image_folder), split='train', bad_images='stop', input_img_mode=mode)
    bad = image_folder / 'train' / 'cat' / '3.jpg'
    damage(bad, how)
    assert dataset[2][1] == 0
    with pytest.raises(MultiExitError) as error:
        dataset[3]
    message = str(error.value)
    assert message.startswith(f'Cannot read image {bad}: ')
    assert message.endswith('. Remove or repair it, or use --bad-images skip.')
    assert reason in message
    assert '\n' not in message


def test_cached_images_are_read_once_and_not_changed_by_transforms(image_folder):
    plain = create_checked_dataset('', root=str(image_folder), split='train')
    cached = create_checked_dataset('', root=str(image_folder), split='train', cache=True)
    cached.transform = blacken
    train, held_out = hold_out(cached, 4, seed=0)
    names = [[part.filename(idx, absolute=True) for idx in range(len(part))] for part in (train, held_out)]
    assert len(list(train)) == 20
    train.transform = None
    for name in names[0]:
        Path(name).unlink()
    assert len(list(train)) == len(names[0]) == 20
    assert all(np.asarray(image).any() for image, _ in train)
    # The other part has its own images under the same numbers.
    held_out.transform = None
    plain.reader = held_out.reader
    pairs = list(zip(held_out, plain, strict=True))
    assert len(pairs) == 4
    assert all((np.asarray(image) == np.asarray(other)).all() for (image, _), (other, _) in pairs)


def blacken(image):
    image.paste(0, (0, 0, *image.size))
    return image


def test_data_sets_that_read_no_files_are_not_cached(monkeypatch):
    monkeypatch.setattr('timm_multiexit.data.datasets.create_dataset', lambda *args, **kwargs: [])
    with pytest.raises(MultiExitError, match="^'torch/cifar10' does not read image files: leave --cache-images out"):
        create_checked_dataset('torch/cifar10', root='x', split='train', cache=True)


def test_last_image_is_followed_by_the_first(image_folder):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    damage(image_folder / 'train' / 'dog' / '11.jpg', 'empty')
    assert dataset[23][1] == 0


def test_index_past_the_end_is_an_error_so_that_iterating_ends(image_folder):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    with pytest.raises(IndexError):
        dataset[24]
    assert len(list(zip(range(100), dataset))) == 24


def test_ten_unreadable_images_in_a_row_are_too_many(image_folder):
    dataset = create_checked_dataset('', root=str(image_folder), split='train')
    for idx in range(10):
        damage(image_folder / 'train' / 'cat' / f'{idx}.jpg', 'empty')
    with pytest.raises(BadImageError, match=r'^Cannot read 10 images in a row, the last is .*9\.jpg: it is not an'):
        dataset[0]
    assert dataset[1][1] == 0


@pytest.mark.parametrize(
    ('num_workers', 'context'), [(0, None), (1, 'fork'), pytest.param(1, 'spawn', marks=pytest.mark.slow)]
)
def test_message_is_one_line_out_of_loader_workers(image_folder, num_workers, context):
    dataset = create_checked_dataset('', root=str(image_folder), split='val', bad_images='stop')
    dataset.transform = ToArray()
    bad = image_folder / 'val' / 'dog' / '0.jpg'
    damage(bad, 'empty')
    loader = DataLoader(dataset, 4, num_workers=num_workers, multiprocessing_context=context)
    batches = iter(loader)
    assert next(batches)[1].tolist() == [0, 0, 0, 0]
    with pytest.raises(BadImageError) as error:
        next(batches)
    assert str(error.value) == (
        f'Cannot read image {bad}: it is not an image. Remove or repair it, or use --bad-images skip.'
    )


class ToArray:
    def __call__(self, image):
        return np.array(image)


@pytest.mark.slow
def test_timm_loader_gives_what_it_gives_of_its_own_data_set(image_folder):
    options = dict(input_size=(3, 32, 32), batch_size=4, num_workers=0, device=torch.device('cpu'))
    checked = create_checked_dataset('', root=str(image_folder), split='val')
    plain = create_dataset('', root=str(image_folder), split='val')
    assert checked.filenames() == plain.filenames()
    for (images, target), (other_images, other_target) in zip(
        create_loader(checked, **options), create_loader(plain, **options), strict=True
    ):
        assert torch.equal(images, other_images)
        assert torch.equal(target, other_target)


def test_transforms_bytes_and_missing_labels_are_those_of_timm(image_folder):
    class Unlabelled:
        def __getitem__(self, index):
            return io.BytesIO(b'raw'), None, 'extra'

        def __len__(self):
            return 1

    plain = create_dataset('', root=str(image_folder), split='val', target_transform=lambda target: target + 5)
    assert [target for _, target in CheckedImages(plain)] == [target for _, target in plain] == [5] * 5 + [6] * 6
    plain.reader, plain.load_bytes, plain.additional_features = Unlabelled(), True, ['name']
    assert CheckedImages(plain)[0] == plain[0] == (b'raw', -1, 'extra')


def test_checked_data_set_survives_pickling(image_folder):
    dataset = pickle.loads(
        pickle.dumps(create_checked_dataset('', root=str(image_folder), split='val', bad_images='stop'))
    )
    damage(image_folder / 'val' / 'cat' / '0.jpg', 'text')
    with pytest.raises(BadImageError, match='it is not an image'):
        dataset[0]


def test_unknown_way_with_bad_images_is_refused(image_folder):
    with pytest.raises(MultiExitError, match="--bad-images must be skip or stop, got 'halt'"):
        create_checked_dataset('', root=str(image_folder), split='val', bad_images='halt')


def test_streams_cannot_stop_at_bad_images(monkeypatch):
    stream = IterableImageDataset('', reader=[])
    monkeypatch.setattr('timm_multiexit.data.datasets.create_dataset', lambda *args, **kwargs: stream)
    assert create_checked_dataset('wds/photos', root='x', split='train') is stream
    with pytest.raises(MultiExitError, match="'wds/photos' is a stream, which cannot stop at a bad image"):
        create_checked_dataset('wds/photos', root='x', split='train', bad_images='stop')
