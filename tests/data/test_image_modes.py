"""Grey images of 8, 16 and 32 bits, images of four channels, and what augmentation does not take."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import resolve_data_config

from timm_multiexit.cli import train
from timm_multiexit.data.datasets import choose_image_mode, create_checked_dataset
from timm_multiexit.data.loaders import create_eval_loader, create_train_loader
from timm_multiexit.utils.errors import DataError, InvalidValueError


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def grey_folder(tmp_path):
    """Eight images of 16 bits, each of one grey: 0, 4096, ..., 28672 of 65535."""
    for idx in range(8):
        for split in ('train', 'val'):
            grey = np.full((32, 32), 4096 * idx, dtype=np.uint16)
            save(tmp_path / 'grey' / split / f'class{idx % 2}' / f'{idx}.png', grey)
    return tmp_path / 'grey'


def create(folder, split='train', mode=None, in_chans=1, **kwargs):
    mode = choose_image_mode(mode, in_chans)
    return create_checked_dataset('', root=str(folder), split=split, input_img_mode=mode, bad_images='stop', **kwargs)


@pytest.mark.parametrize(('mode', 'in_chans'), [(None, 1), ('L', 1), (None, 3)])
def test_images_of_16_bits_are_scaled_to_8(mode, in_chans, grey_folder):
    """Pillow's own conversion makes 255 of all above 255, which would be seven of the eight images."""
    dataset = create(grey_folder, mode=mode, in_chans=in_chans)
    greys = sorted(np.unique(np.asarray(image)).tolist() for image, _ in (dataset[idx] for idx in range(8)))
    assert greys == [[16 * idx] for idx in range(8)]
    assert {image.mode for image, _ in (dataset[idx] for idx in range(8))} == {'RGB' if in_chans == 3 else 'L'}


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_images_of_floats_or_32_bits_are_refused_at_once(dtype, tmp_path):
    for name in 'ab':
        save(tmp_path / 'train' / name / 'x.tif', np.ones((8, 8), dtype=dtype))
    with pytest.raises(
        DataError, match=r'/train/a/x\.tif has pixels of mode [IF], floats or 32-bit integers of an unkn'
    ):
        create(tmp_path, input_key='.tif')


@pytest.mark.parametrize(
    ('mode', 'in_chans', 'line'),
    [
        (
            'I;16',
            1,
            "must be one of L, LA, RGB, YCbCr, LAB, HSV, RGBA, RGBX, CMYK, got 'I;16'. Images of 16 bits are sca",
        ),
        ('F', 1, "got 'F'"),
        ('P', 1, "got 'P'"),
        ('nonsense', 3, "got 'nonsense'"),
        (
            'L',
            3,
            '--input-img-mode L has 1 channels, and the model takes 3: give RGB or YCbCr or LAB or HSV, or --in-ch',
        ),
        (None, 4, '--in-chans 4 needs --input-img-mode RGBA or RGBX or CMYK.'),
        (None, 2, '--in-chans 2 needs --input-img-mode LA.'),
        (None, 5, '--in-chans must be 1 to 4, the channels of image files, got 5.'),
    ],
)
def test_modes_that_are_not_the_models_are_refused(mode, in_chans, line):
    with pytest.raises(InvalidValueError) as caught:
        choose_image_mode(mode, in_chans)
    assert line in str(caught.value)


@pytest.mark.parametrize('mode', ['I;16', 'F', None])
def test_training_begins_with_the_line(mode, image_folder, run_script):
    flags = ('--model', 'test_resnet', '-j', '0', '--in-chans', '4' if mode is None else '1', '--img-size', '32')
    flags += () if mode is None else ('--input-img-mode', mode)
    code, _, err = run_script(train.main, *flags, '--data-dir', image_folder)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith('train.py: error: --in')
    assert 'Traceback' not in err
    assert not (image_folder.parent / 'output').exists()


def train_batches(dataset, in_chans, **kwargs):
    config = resolve_data_config({'input_size': (in_chans, 32, 32)})
    options = {'seed': 0, 'accelerator': Accelerator(cpu=True), 'batch_size': 8}
    loader, _ = create_train_loader(dataset, data_config=config, **options, **kwargs)
    return [images for images, _ in loader.epoch(0)]


AUGMENTATIONS = [
    {'auto_augment': 'rand-m9-mstd0.5-inc1'},
    {'auto_augment': 'original'},
    {'auto_augment': '3a'},
    {'auto_augment': 'augmix-m5-w2'},
    {'auto_augment': 'rand-m9', 're_prob': 1.0, 're_mode': 'pixel'},
    {'re_prob': 1.0, 're_mode': 'rand'},
    {'re_prob': 1.0, 're_mode': 'const', 'grayscale_prob': 0.5, 'gaussian_blur_prob': 0.5},
]


@pytest.mark.parametrize('uses_prefetcher', [True, False])
@pytest.mark.parametrize('augmentation', AUGMENTATIONS, ids=lambda value: '-'.join(map(str, value.values())))
def test_grey_images_take_every_augmentation(augmentation, uses_prefetcher, grey_folder):
    (images,) = train_batches(
        create(grey_folder), 1, augmentation={'color_jitter': 0.4, **augmentation}, uses_prefetcher=uses_prefetcher
    )
    assert images.shape == (8, 1, 32, 32)
    assert torch.isfinite(images).all()


def test_grey_images_are_normalized_by_the_mean_of_the_channels(grey_folder):
    """Without the prefetcher, timm would make three channels of one."""
    config = resolve_data_config({'input_size': (1, 32, 32), 'crop_pct': 1.0})
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    expected = [(16 * idx / 255 - mean) / std for idx in (0, 2, 4, 6, 1, 3, 5, 7)]
    for uses_prefetcher in (True, False):
        loader = create_eval_loader(
            create(grey_folder, 'val'),
            data_config=config,
            batch_size=8,
            accelerator=Accelerator(cpu=True),
            uses_prefetcher=uses_prefetcher,
        )
        images, _ = next(iter(loader))
        assert images.shape == (8, 1, 32, 32)
        assert images[:, 0, 16, 16].tolist() == pytest.approx(expected, abs=1e-5)


def test_images_of_four_channels_are_trained_on(image_folder):
    dataset = create(image_folder, mode='RGBA', in_chans=4)
    images = train_batches(dataset, 4, augmentation={'color_jitter': 0.4, 're_prob': 1.0, 're_mode': 'pixel'})
    assert [batch.shape for batch in images] == [(8, 4, 32, 32)] * 3


@pytest.mark.parametrize(
    ('mode', 'augmentation', 'line'),
    [
        (
            'RGBA',
            {'auto_augment': 'rand-m9'},
            '--aa takes images of mode L or RGB, got --input-img-mode RGBA. Leave out',
        ),
        (
            'YCbCr',
            {'grayscale_prob': 0.1},
            '--grayscale-prob takes images of mode L or RGB, got --input-img-mode YCbCr.',
        ),
        ('HSV', {'color_jitter': 0.4}, 'got --input-img-mode HSV. Give --color-jitter 0.'),
    ],
)
def test_augmentation_that_pillow_cannot_do_is_refused(mode, augmentation, line, image_folder):
    in_chans = len(Image.new(mode, (1, 1)).getbands())
    with pytest.raises(InvalidValueError) as caught:
        train_batches(create(image_folder, mode=mode, in_chans=in_chans), in_chans, augmentation=augmentation)
    assert line in str(caught.value)


def test_evaluation_crops_as_the_model_says(tmp_path):
    """A left half in black, a right half in white: squashed, all of it is seen, cropped, its ends are not."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 24:] = 255
    save(tmp_path / 'val' / 'a' / 'x.png', pixels)
    for mode, white in (('squash', 4), ('center', 0), (None, 0)):
        config = resolve_data_config({'input_size': (3, 16, 16), 'crop_pct': 1.0, 'interpolation': 'nearest'})
        loader = create_eval_loader(
            create(tmp_path, 'val', in_chans=3),
            data_config={**config, 'crop_mode': mode, 'mean': (0.0,) * 3, 'std': (1.0,) * 3},
            batch_size=1,
            accelerator=Accelerator(cpu=True),
        )
        images, _ = next(iter(loader))
        assert (images[0, 0, 8] > 0.5).sum() == white
