"""scikit-learn's handwritten digits, which need no download."""

from io import BytesIO

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader

from timm_multiexit.utils.errors import DataError

DIGITS = 'digits'
DIGITS_SIZE = 32

# Places in a fixed shuffle of the 1,797 images. The epoch is chosen on 'validation' and 'test' is reported.
_DIGITS_SPLITS = {'test': slice(0, 360), 'validation': slice(360, 540), 'train': slice(540, None)}


class DigitsReader(Reader):
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as 32x32 images, in a fixed split.

    Args:
        split: 'train' (1,257 images), 'validation' (180) or 'test' (360).

    Raises:
        DataError: Unknown split, or scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, test part.
    """

    def __init__(self, split: str):
        super().__init__()
        if split not in _DIGITS_SPLITS:
            raise DataError(f"split of the digits must be one of {', '.join(_DIGITS_SPLITS)}, got '{split}'.")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                'The digits need scikit-learn. Install it with pip install "timm-multiexit[digits]", or name your own'
                ' images with --data-dir.'
            ) from error
        digits = load_digits()
        # The data set comes in runs of 0 to 9. RandomState's stream is frozen, so the split is the same everywhere.
        order = np.random.RandomState(0).permutation(len(digits.target))[_DIGITS_SPLITS[split]]
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        self.samples = [(_encode_digit(digits.images[idx]), int(digits.target[idx])) for idx in order]

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        content, target = self.samples[index]
        return BytesIO(content), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index}.png'


def _encode_digit(image: np.ndarray) -> bytes:
    """Return an 8x8 array of 0 to 16 as a 32x32 PNG."""
    content = BytesIO()
    picture = Image.fromarray((image * (255 / 16)).round().astype('uint8'))
    picture.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(content, 'png')
    return content.getvalue()
