#!/usr/bin/env python3
"""Make a folder of small images from large ones: `hub/experiments/prepare.py SOURCE TARGET --size 64 --per-class 350`.

SOURCE holds train/CLASS/IMAGE and val/CLASS/IMAGE, and so does TARGET, as PNG files: square, the middle of an image
that is not. Of train some images of each class can be drawn, a longer draw of the same seed holding the shorter; val is
whole.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

SUFFIXES = {'.jpg', '.jpeg', '.png'}


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, metavar='SOURCE', help='folder with train and val')
    parser.add_argument('target', type=Path, metavar='TARGET', help='folder to make')
    parser.add_argument('--size', type=int, default=64, metavar='N', help='pixels along a side (default: 64)')
    parser.add_argument('--per-class', type=int, metavar='N', help='training images of each class, all if not given')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='of the draw (default: 0)')
    return parser


def choose_images(folder: Path, num: int | None, seed: int) -> list[Path]:
    """Return the images of a class, or `num` of them, which the seed and their names choose.

    Raises:
        ValueError: The folder has fewer, or two that differ in their suffix alone, which would become one.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f'names of images must differ before their suffix, got {twice[0]} twice in {folder}.')
    if num is None:
        return paths
    if not 1 <= num <= len(paths):
        raise ValueError(f'--per-class must be in [1, {len(paths)}], the images of {folder}, got {num}.')
    random.Random(f'{seed} {folder.name}').shuffle(paths)
    return sorted(paths[:num])


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Return the middle square of an image, RGB, `size` pixels along a side, by Lanczos."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.convert('RGB').resize((size, size), Image.Resampling.LANCZOS, box=box)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code, 2 for an error of one line."""
    args = create_parser().parse_args(argv)
    try:
        for split in ('train', 'val'):
            count = 0
            for folder in sorted(path for path in (args.source / split).iterdir() if path.is_dir()):
                paths = choose_images(folder, args.per_class if split == 'train' else None, args.seed)
                target = args.target / split / folder.name
                target.mkdir(parents=True)
                for path in paths:
                    with Image.open(path) as image:
                        shrink(image, args.size).save(target / f'{path.stem}.png')
                    count += 1
            print(f'{split}: {count} images')
    except (OSError, ValueError) as error:
        print(f'prepare.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
