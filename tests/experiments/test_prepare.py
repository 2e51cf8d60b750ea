"""prepare.py: small images of large ones."""

from helpers.experiments import load_script
from PIL import Image


def test_images_are_made_smaller_and_drawn_the_same_again(tmp_path, run_script):
    prepare = load_script('prepare')
    for split, count in (('train', 6), ('val', 2)):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'large' / split / name
            folder.mkdir(parents=True)
            for idx in range(count):
                Image.new('L', (40, 20), 10 * idx).save(folder / f'{idx}.png')

    def draw(target, *flags):
        code, _, error = run_script(prepare.main, tmp_path / 'large', tmp_path / target, '--size', '8', *flags)
        assert (code, error) == (0, '')
        return {path.relative_to(tmp_path / target) for path in (tmp_path / target).rglob('*.png')}

    few, again = draw('few', '--per-class', '2'), draw('again', '--per-class', '2')
    more, every = draw('more', '--per-class', '4'), draw('every')
    other = draw('other', '--per-class', '4', '--seed', '1')
    assert few == again
    assert few < more < every
    assert other != more
    assert [len(draw) for draw in (few, more, every)] == [2 * 2 + 4, 2 * 4 + 4, 2 * 6 + 4]
    with Image.open(tmp_path / 'every/train/cat/3.png') as image:
        assert (image.mode, image.size, image.getpixel((4, 4))) == ('RGB', (8, 8), (30, 30, 30))
    code, _, error = run_script(prepare.main, tmp_path / 'large', tmp_path / 'none', '--per-class', '7')
    assert code == 2
    assert '--per-class must be in [1, 6], the images of' in error
    assert not (tmp_path / 'none').exists()
    Image.new('L', (40, 20)).save(tmp_path / 'large/val/dog/1.jpg')
    code, _, error = run_script(prepare.main, tmp_path / 'large', tmp_path / 'twice')
    assert code == 2
    assert 'names of images must differ before their suffix, got 1 twice in' in error
