import io

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from timm_multiexit.config import MultiExitError
from timm_multiexit.data import DigitsReader, check_classes, class_to_idx, create_checked_dataset


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
    with pytest.raises(MultiExitError, match="no split 'val', allowed are test, validation, train"):
        DigitsReader('val')


def test_digits_give_rgb_images():
    image, target = create_checked_dataset('digits', root=None, split='train')[0]
    assert (image.mode, image.size) == ('RGB', (32, 32))
    assert 0 <= target < 10


@pytest.mark.parametrize(
    ('root', 'message'),
    [('nowhere', "no data folder 'nowhere'"), (None, "no data folder ''"), ('empty', 'Found 0 images')],
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
    with pytest.raises(MultiExitError, match="2 classes and the other 2, 'cat' is not the same"):
        check_classes(train, val)


def test_split_that_is_not_there_is_refused_where_others_are(image_folder):
    # timm takes the folder itself, so that training and validation images are counted together
    with pytest.raises(MultiExitError, match="has no split 'test', allowed are train, val"):
        create_checked_dataset('', root=str(image_folder), split='test')
    assert len(create_checked_dataset('', root=str(image_folder), split='validation')) == 11
    assert len(create_checked_dataset('', root=str(image_folder / 'val'), split='test')) == 11
