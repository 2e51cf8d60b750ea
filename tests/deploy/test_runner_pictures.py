"""Pictures are prepared as timm prepares them for evaluation."""

import itertools

import numpy as np
import pytest
import timm
from PIL import Image

from timm_multiexit.data.datasets import _to_8_bits
from timm_multiexit.deploy.runner import _INTERPOLATION, RunnerError, prepare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_picture(width, height, mode='RGB', seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
    smooth = Image.fromarray(pixels[: height // 3 + 1, : width // 3 + 1]).resize((width, height))
    return Image.fromarray(np.asarray(smooth) // 2 + pixels // 2).convert(mode)


def by_timm(image, cfg):
    transform = timm.data.create_transform(**cfg, is_training=False)
    image = _to_8_bits(image).convert({1: 'L', 3: 'RGB', 4: 'RGBA'}[cfg['input_size'][0]])
    return transform(image)[None].numpy()


def config(**values):
    cfg = {'input_size': [3, 64, 64], 'interpolation': 'bicubic', 'crop_pct': 0.875, 'crop_mode': 'center'}
    return {**cfg, 'mean': list(MEAN), 'std': list(STD), **values}


SHAPES = [(64, 64), (100, 80), (80, 101), (300, 64), (33, 200), (20, 31), (73, 73), (1, 5), (641, 480)]
SIZES = [(64, 64), (48, 80), (81, 50), (7, 7)]


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
def test_pictures_are_those_of_timm(crop_mode):
    count = 0
    for shape, size, crop_pct in itertools.product(SHAPES, SIZES, (0.5, 0.875, 0.95, 1.0, 1.25)):
        cfg = config(input_size=[3, *size], crop_pct=crop_pct, crop_mode=crop_mode)
        image = make_picture(*shape)
        found = prepare(image, cfg)
        assert (found.dtype, found.shape) == (np.float32, (1, 3, *size))
        np.testing.assert_allclose(found, by_timm(image, cfg), atol=1e-6)
        count += 1
    assert count == 180


@pytest.mark.parametrize('interpolation', _INTERPOLATION)
def test_all_of_timms_interpolations(interpolation):
    for shape in SHAPES:
        cfg = config(interpolation=interpolation, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 2.0])
        np.testing.assert_allclose(prepare(make_picture(*shape), cfg), by_timm(make_picture(*shape), cfg), atol=1e-6)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_all_kinds_of_pixels(mode, channels, tmp_path):
    cfg = config(input_size=[channels, 32, 32], mean=[0.4] * channels, std=[0.3] * channels)
    if mode == 'I;16':
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (50, 60)).astype(np.uint16))
        assert image.mode == mode
    else:
        image = make_picture(60, 50).convert(mode)
    np.testing.assert_allclose(prepare(image, cfg), by_timm(image, cfg), atol=1e-6)
    if mode in ('L', 'RGB', 'I;16'):
        image.save(tmp_path / 'picture.png')
        for path in (tmp_path / 'picture.png', str(tmp_path / 'picture.png')):
            np.testing.assert_array_equal(prepare(path, cfg), prepare(image, cfg))


def test_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / 'text.png').write_text('text')
    make_picture(300, 300).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:20_000])
    floats = Image.fromarray(np.zeros((5, 5), np.float32))
    for image in (tmp_path / 'none.png', tmp_path / 'text.png', str(tmp_path / 'cut.png'), tmp_path, floats):
        with pytest.raises(RunnerError, match='cannot be read: ') as caught:
            prepare(image, config())
        assert '\n' not in str(caught.value)
        assert str(caught.value).startswith('The picture' if image is floats else str(image))
    for image in (None, 5, np.zeros((5, 5, 3), np.uint8)):
        with pytest.raises(RunnerError, match='^The picture must be a path or an image of Pillow, got '):
            prepare(image, config())
    with pytest.raises(RunnerError, match='takes 2 channels, which no picture has'):
        prepare(make_picture(5, 5), config(input_size=[2, 8, 8]))


@pytest.mark.parametrize('error', [RuntimeError, IndexError, MemoryError, OSError])
def test_whatever_a_decoder_raises_is_one_line(error, tmp_path, monkeypatch):
    make_picture(9, 9).save(tmp_path / 'a.png')

    def refuse(*args):
        raise error('of the\ndecoder')

    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', refuse)
    with pytest.raises(RunnerError, match='a.png cannot be read: of the decoder[.]$'):
        prepare(tmp_path / 'a.png', config())


def test_picture_of_extreme_shape_is_prepared_or_refused_in_one_line():
    assert prepare(make_picture(1, 1000), config(crop_mode='border')).shape == (1, 3, 64, 64)
    with pytest.raises(
        RunnerError, match='^The picture cannot be read: scaled for the network it would have 73 x 4745'
    ):
        prepare(Image.new('RGB', (1, 65_000)), config())


def test_postscript_is_not_run(tmp_path):
    make_picture(9, 9).save(tmp_path / 'a.eps')
    with pytest.raises(RunnerError, match='a.eps cannot be read: cannot identify image file'):
        prepare(tmp_path / 'a.eps', config())
