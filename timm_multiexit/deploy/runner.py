"""Run an exported multi-exit network: numpy and ONNX Runtime, and Pillow for pictures; neither torch nor timm.

This file lies beside the programs in every folder that `timm_multiexit.export` writes, and imports nothing of the
package: copy the folder to the device, and

    python runner.py FOLDER PICTURE --budget 60%

answers there. In a program:

    from runner import Runner
    runner = Runner('FOLDER')
    logits, exit_idx = runner.infer(runner.preprocess('PICTURE'), budget='60%')
"""

import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
MANIFEST = 'manifest.json'
OWN_NAME = 'runner.py'  # who runs it has trusted it before it could check itself
_MAX_MANIFEST_BYTES = 4 * 2**20

# What a manifest says: a type, a list of one rule, alternatives in a tuple, or an object of these keys alone; with '?'
# a key may be missing, `str` stands for any keys.
_POLICY = {'criterion': str, 'thresholds': [(float, None)], 'temperatures': [float], 'combine': (str, None)}
_CONDITIONAL = {'path': str, 'criterion': str, 'combine': (str, None)}
_PROGRAMS = {'fixed': [str], 'stages': [str], 'conditional': (_CONDITIONAL, None)}
_RULES = {
    'format': int,
    'name': str,
    'versions': {str: (str, None)},
    'opset': int,
    'num_classes': int,
    'classes': ([str], None),
    'preprocessing': {
        'input_size': [int],
        'interpolation': str,
        'crop_pct': float,
        'crop_mode': str,
        'mean': [float],
        'std': [float],
    },
    'exits': [{'name': str, 'macs': {'fixed': int, 'sequential': int}, 'params': int}],
    'plain_macs': int,
    'policy': (_POLICY, None),
    'budgets': [{'macs': float, 'accuracy': float, 'policy': _POLICY}],
    'programs': {'fp32': _PROGRAMS, 'int8?': _PROGRAMS},
    'pt2': ({'fixed': [str], 'stages': [str]}, None),
    'int8': (
        {
            'images': int,
            'limit': float,
            'top1': {'fp32': [float], 'int8': [float]},
            'policies': [{'macs': float, 'fp32': float, 'int8': float}],
        },
        None,
    ),
    'files': {str: {'size': int, 'sha256': str}},
}

_AT_LEAST = {'confidence': True, 'margin': True, 'patience': True, 'entropy': False}  # criterion -> leaves above, below
_COMBINATIONS = (None, 'mean', 'geometric')
_SCALES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
_SLACK = 1e-9  # a budget that a policy's cost was printed as must reach it
_INTERPOLATION = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_CROP_MODES = ('center', 'squash', 'border')
_MAX_PIXELS = 2**28  # of a picture that was scaled
_IMAGE_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}

_NUM_REMEMBERED, _NUM_PROBES, _NUM_FORMS = 32, 5, 64  # times of a stage, forwards at first, shapes of batches
_QUANTILE, _HOPE = 0.9, 1e-4


class RunnerError(ValueError):
    """An argument, the folder or a picture is not what it must be; the message is one line."""


class PictureError(RunnerError):
    """A picture cannot be read."""


class Answer(NamedTuple):
    """What is answered for a batch.

    Attributes:
        logits: [B, C] float32, the answer of each image in input order: tempered and combined as the policy says.
        exit_idx: [B] int64, the classifier that answered; main is the number of exits.
    """

    logits: np.ndarray
    exit_idx: np.ndarray


# --- The folder -------------------------------------------------------------------------------------------------------


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of an exported folder, checked: nothing in it is unknown, and no path leaves the folder.

    Raises:
        RunnerError: The folder or its manifest is missing, cannot be read, or says something that is not allowed.
    """
    path = Path(folder) / MANIFEST
    try:
        found = path.is_file()
    except OSError as error:
        raise RunnerError(f'{path} cannot be read: {_one_line(error)}.') from error
    if not found:
        raise RunnerError(f'{folder} is not an exported folder: it has no {MANIFEST}.')
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError(f'it has more than {_MAX_MANIFEST_BYTES} bytes')
        text = path.read_text(encoding='utf-8')
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if isinstance(values, dict) and values.get('format', FORMAT) != FORMAT:
            raise ValueError(f'format must be {FORMAT}, got {_brief(values["format"])}: take the runner.py beside it')
        _check_rule('', values, _RULES)
        _check_content(values)
    except RecursionError:
        raise RunnerError(f'{path} cannot be read: it is nested too deeply.') from None
    except (OSError, ValueError) as error:
        raise RunnerError(f'{path} cannot be read: {_one_line(error)}.') from error
    return values


def check_files(folder: str | Path, manifest: dict[str, Any], *, hashes: bool = True) -> None:
    """Compare the files of a folder with what its manifest says of them: they are there, their sizes, and `hashes`.

    Raises:
        RunnerError: A file is missing or has changed.
    """
    for name, entry in manifest['files'].items():
        path = Path(folder) / name
        if name == OWN_NAME:
            continue
        try:
            if not path.is_file():
                raise RunnerError(f'{folder} has no {name}, which its {MANIFEST} lists: copy the folder again.')
            size, digest = path.stat().st_size, _sha256(path) if hashes else None
        except OSError as error:
            raise RunnerError(f'{path} cannot be read: {_one_line(error)}.') from error
        _check_file(path, entry, size, digest)


def _check_file(path: Path, entry: dict[str, Any], size: int, digest: str | None) -> None:
    """Raise unless size and SHA-256 of a file, if that is known, are those of the manifest."""
    if size != entry['size']:
        raise RunnerError(f'{path} must have {entry["size"]} bytes, got {size}: copy the folder again.')
    if digest not in (None, entry['sha256']):
        raise RunnerError(f'{path} has changed: its SHA-256 is not that of {MANIFEST}. Copy the whole folder again.')


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError('a key occurs twice')
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not a finite number')


def _check_rule(where: str, value: Any, rule: Any) -> None:
    """Raise `ValueError` unless a value is what a rule of `_RULES` allows."""
    if isinstance(rule, tuple):
        if value is not None:
            _check_rule(where, value, rule[0])
        return
    kind = type(rule) if isinstance(rule, (dict, list)) else rule
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e18
    if not (number and (kind is float or isinstance(value, int)) if kind in (int, float) else isinstance(value, kind)):
        names = {dict: 'an object', list: 'a list', str: 'text', int: 'an integer', float: 'a number'}
        raise ValueError(f'{where or "it"} must be {names[kind]}, got {_brief(value)}')
    if kind is list:
        for idx, item in enumerate(value):
            _check_rule(f'{where}[{idx}]', item, rule[0])
    elif kind is dict:
        rules = dict.fromkeys(value, rule[str]) if str in rule else {name.rstrip('?'): rule[name] for name in rule}
        unknown = sorted(value.keys() - rules.keys())
        missing = [] if str in rule else [name for name in rule if not name.endswith('?') and name not in value]
        if unknown or missing:
            what = f'an unknown key {_brief(unknown[0])}' if unknown else f'no key {missing[0]!r}'
            raise ValueError(f'{where or "it"} has {what}')
        for name, item in value.items():
            _check_rule(f'{where}.{name}'.lstrip('.'), item, rules[name])


def _check_content(manifest: dict[str, Any]) -> None:
    """Raise `ValueError` for values of the right types that are out of range or do not go together."""
    exits = manifest['exits']
    if len(exits) < 2 or manifest['num_classes'] < 2 or manifest['plain_macs'] < 1:
        raise ValueError('it must have two or more classifiers, two or more classes, and plain_macs > 0')
    _check_macs([each['macs'] for each in exits], manifest['plain_macs'])
    if manifest['classes'] is not None and len(manifest['classes']) != manifest['num_classes']:
        raise ValueError(f'classes must be {manifest["num_classes"]} names, got {len(manifest["classes"])}')
    for path, entry in manifest['files'].items():
        parts = path.split('/')
        if path == MANIFEST or not all(re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9._-]{0,99}', part) for part in parts):
            raise ValueError(f'a file must be a path of plain names inside the folder, got {_brief(path)}')
        if entry['size'] < 0 or not re.fullmatch(r'[0-9a-f]{64}', entry['sha256']):
            raise ValueError(f'files.{path} must have a size >= 0 and a SHA-256 of 64 digits')
    made = {**manifest['programs'], 'pt2': manifest['pt2'] or {}}
    for name, programs in made.items():
        _check_programs(name, programs, len(exits), manifest['files'])
    if not any(any(programs.values()) for programs in made.values()):
        raise ValueError('it must have programs, got none: export it again')
    _check_preprocessing(manifest['preprocessing'])
    for policy in (manifest['policy'], *(point['policy'] for point in manifest['budgets'])):
        if policy is not None:
            _Policy(policy, len(exits) - 1)


def _check_macs(macs: list[dict[str, int]], total: int) -> None:
    if total != macs[-1]['fixed']:
        raise ValueError(f'plain_macs must be the fixed macs of main, {macs[-1]["fixed"]}, got {total}')
    wrong = next((each for each in macs if not 0 <= each['fixed'] <= each['sequential']), None)
    if wrong is not None:
        raise ValueError(f'macs must be fixed >= 0 and sequential >= fixed, got {_brief(wrong)}')


def _check_programs(name: str, programs: dict[str, Any], count: int, files: dict[str, Any]) -> None:
    paths = [*programs.get('fixed', ()), *programs.get('stages', ())]
    if any(len(programs.get(form, ())) not in (0, count) for form in ('fixed', 'stages')):
        raise ValueError(f'{name} must have a program of each form for each of the {count} classifiers, or none')
    one = programs.get('conditional')
    if one is not None:
        _require_known(one['criterion'], one['combine'])
        paths.append(one['path'])
    missing = [path for path in paths if path not in files]
    if missing:
        raise ValueError(f'files must list all programs, and lacks {_brief(missing[0])}')


def _check_preprocessing(cfg: dict[str, Any]) -> None:
    size, mean, std = cfg['input_size'], cfg['mean'], cfg['std']
    if len(size) != 3 or not all(1 <= side <= 2**16 for side in size):
        raise ValueError(f'input_size must be three integers in [1, 65536], got {_brief(size)}')
    if not len(mean) == len(std) == size[0] or not min(std) > 0:
        raise ValueError(f'mean and std must have a number for each of {size[0]} channels, std > 0, got {mean}, {std}')
    if cfg['interpolation'] not in _INTERPOLATION or cfg['crop_mode'] not in _CROP_MODES:
        raise ValueError(f'interpolation must be one of {_INTERPOLATION}, crop_mode of {_CROP_MODES}')
    if not 0.01 <= cfg['crop_pct'] <= 10:
        raise ValueError(f'crop_pct must be in [0.01, 10], got {cfg["crop_pct"]}')


def _brief(value: Any) -> str:
    text = ' '.join(repr(value).split())
    return text if len(text) <= 80 else f'{text[:77]}...'


def _one_line(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror  # without its number and the path
    return ' '.join(_printable(str(error)).split())[:300].rstrip('.: ') or type(error).__name__


def _printable(text: str) -> str:
    """Return a text from outside as one line that does nothing to a terminal."""
    return ''.join(sign if sign.isprintable() else ' ' for sign in text)


# --- Policies ---------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _require_known(criterion: Any, combine: Any) -> None:
    if not isinstance(criterion, str) or criterion not in _AT_LEAST:
        raise RunnerError(f'criterion must be one of {", ".join(_AT_LEAST)}, got {_brief(criterion)}.')
    if not isinstance(combine, (str, type(None))) or combine not in _COMBINATIONS:
        raise RunnerError(f'combine must be None, mean or geometric, got {_brief(combine)}.')


class _Policy:
    """An `ExitPolicy` of timm_multiexit, from the dict that its `to_dict` gives, checked for so many exits."""

    def __init__(self, values: Any, num_exits: int):
        keys = ('criterion', 'thresholds', 'temperatures', 'combine')
        if not isinstance(values, dict) or not {'criterion', 'thresholds'} <= values.keys() <= set(keys):
            raise RunnerError(f'policy must be a dict of {", ".join(keys)}, got {_brief(values)}.')
        self.criterion, self.combine = values['criterion'], values.get('combine')
        _require_known(self.criterion, self.combine)
        self.thresholds, self.temperatures = values['thresholds'], values.get('temperatures')
        self.temperatures = [] if self.temperatures is None else self.temperatures
        if not all(isinstance(numbers, (list, tuple)) for numbers in (self.thresholds, self.temperatures)):
            raise RunnerError('thresholds and temperatures of a policy must be lists of numbers.')
        if len(self.thresholds) != num_exits:
            raise RunnerError(
                f'The policy must have one threshold for each of the {num_exits} exits, got {len(self.thresholds)}.'
                ' Main has none; use None for an exit that is not used.'
            )
        least, most = (1, 1000) if self.criterion == 'patience' else (0, 1)
        for value in self.thresholds:
            is_whole = self.criterion != 'patience' or (_is_number(value) and value == int(value))
            if value is not None and not (_is_number(value) and least <= value <= most and is_whole):
                raise RunnerError(
                    f'A threshold of {self.criterion} must be {"an integer " if least else ""}in [{least}, {most}], or'
                    f' None for an exit that is not used, got {_brief(value)}.'
                )
        if len(self.temperatures) not in (0, num_exits + 1):
            raise RunnerError(
                f'temperatures must be empty or have {num_exits + 1} values, main last, got {len(self.temperatures)}.'
            )
        for value in self.temperatures:
            if not _is_number(value) or not 0.01 <= value <= 100:
                raise RunnerError(f'A temperature must be in [0.01, 100], got {_brief(value)}.')


class _PolicyRun:
    """A policy at work on a batch, exit by exit; between two exits images may leave the batch.

    In float32, as timm_multiexit computes.
    """

    def __init__(self, policy: _Policy):
        self._policy = policy
        self._num_seen = 0
        self._total: np.ndarray | None = None
        self._predicted: np.ndarray | None = None
        self._streak: np.ndarray | None = None

    def answer(self, idx: int, logits: np.ndarray) -> np.ndarray:
        """Return what classifier `idx` answers, [N, C], given its logits [N, C]."""
        if self._policy.temperatures:
            logits = logits / np.float32(self._policy.temperatures[idx])
        if self._policy.combine is None:
            return logits
        if self._policy.combine == 'geometric':
            logits = logits - logits.max(-1, keepdims=True)
            logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self._total = logits if self._total is None else self._total + logits
        self._num_seen += 1
        return self._total / np.float32(self._num_seen)

    def leaves(self, idx: int, answer: np.ndarray) -> np.ndarray:
        """Return which images leave at exit `idx`, [N] bool."""
        score, threshold = self._score(answer), np.float32(self._policy.thresholds[idx])
        return score >= threshold if _AT_LEAST[self._policy.criterion] else score <= threshold

    def _score(self, answer: np.ndarray) -> np.ndarray:
        if self._policy.criterion == 'patience':
            predicted = answer.argmax(-1)
            streak = np.zeros(len(answer), np.float32)
            if self._predicted is not None and self._streak is not None:
                streak = np.where(predicted == self._predicted, self._streak + 1, streak)
            self._predicted, self._streak = predicted, streak
            return streak
        shares = softmax(answer)
        if self._policy.criterion == 'confidence':
            return shares.max(-1)
        if self._policy.criterion == 'margin':
            second, first = np.partition(shares, -2, axis=-1)[:, -2:].T
            return first - second
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.minimum(-(shares * logs).sum(-1) / np.float32(math.log(shares.shape[-1])), np.float32(1))

    def select(self, rows: np.ndarray) -> None:
        """Continue with some of the images, by place."""
        for name in ('_total', '_predicted', '_streak'):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state[rows])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities [..., C] of logits [..., C]."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def prepare(image: Any, cfg: dict[str, Any]) -> np.ndarray:
    """Return a picture as the network wants it, [1, C, H, W] float32: what timm's transform for evaluation gives.

    Args:
        image: A path, or a `PIL.Image.Image`.
        cfg: `preprocessing` of a manifest.

    Raises:
        RunnerError: Pillow is missing, or the picture cannot be read.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RunnerError('Pillow is missing, which reads pictures: pip install pillow.') from None
    channels, height, width = cfg['input_size']
    if channels not in _IMAGE_MODES:
        raise RunnerError(f'The network takes {channels} channels, which no picture has: give infer an array.')
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise RunnerError(f'The picture must be a path or an image of Pillow, got {type(image).__name__}.')
    name = 'The picture' if isinstance(image, Image.Image) else _printable(os.fspath(image))
    try:
        if not isinstance(image, Image.Image):
            Image.init()
            # Not PostScript, for which Pillow starts a program.
            image = Image.open(image, formats=[name for name in Image.OPEN if name != 'EPS'])
        image.load()
        if image.mode.startswith('I;16'):  # Pillow itself would make white of all above 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ('I', 'F'):
            raise ValueError('its pixels have an unknown range: save it with 8 or 16 bits')
        image = image.convert(_IMAGE_MODES[channels])
        size = _scaled_size(image.size, cfg)
        if math.prod(size) > _MAX_PIXELS:
            raise ValueError(f'scaled for the network it would have {size[0]} x {size[1]} pixels')
        if image.size != size:
            image = image.resize(size, getattr(Image.Resampling, cfg['interpolation'].upper()))
    except Exception as error:  # what decoders raise for a damaged picture has no common base
        raise PictureError(f'{name} cannot be read: {_one_line(error)}.') from error
    fill = [round(255 * value) for value in cfg['mean']] if cfg['crop_mode'] == 'border' else [0] * channels
    image = _crop(image, (width, height), fill)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / np.float32(255)
    pixels = (pixels - np.float32(cfg['mean'])) / np.float32(cfg['std'])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)


def _scaled_size(size: tuple[int, int], cfg: dict[str, Any]) -> tuple[int, int]:
    """Return width and height that a picture of this width and height is scaled to before it is cropped."""
    width, height = size
    target_height, target_width = (math.floor(side / cfg['crop_pct']) for side in cfg['input_size'][1:])
    if cfg['crop_mode'] == 'squash':
        return target_width, target_height
    if cfg['crop_mode'] == 'center' and target_height == target_width:  # the shorter edge, as torchvision rounds
        longer = int(target_width * max(size) / min(size))
        return (target_width, longer) if width <= height else (longer, target_width)
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if cfg['crop_mode'] == 'border' else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _crop(image: Any, size: tuple[int, int], fill: Sequence[int]) -> Any:
    """Return the middle of a picture, with borders where it is smaller."""
    from PIL import Image

    missing = [max(0, wanted - side) for wanted, side in zip(size, image.size)]
    if any(missing):
        padded_size = tuple(side + more for side, more in zip(image.size, missing))
        padded = Image.new(image.mode, padded_size, tuple(fill) if len(fill) > 1 else fill[0])
        padded.paste(image, tuple(more // 2 for more in missing))
        image = padded
    left, top = (round((side - wanted) / 2) for wanted, side in zip(size, image.size))
    return image.crop((left, top, left + size[0], top + size[1]))


# --- Answers ----------------------------------------------------------------------------------------------------------


class _Times:
    """How long the stages of the chain take for one shape of batch, in multiples of the first, which always runs.

    What is not run for long is assumed to have become a little faster, so that one slow moment does not keep the
    network from its later exits for good.
    """

    def __init__(self, num_stages: int):
        self._unit: deque[float] = deque(maxlen=3)
        self._multiples: list[deque[float]] = [deque(maxlen=_NUM_REMEMBERED) for _ in range(num_stages)]
        self._num_unrun = [0] * num_stages

    def add(self, idx: int, seconds: float) -> None:
        """Remember how long a stage took."""
        if idx == 0:
            self._unit.append(seconds)
            self._num_unrun = [count + 1 for count in self._num_unrun]
        multiple = seconds / self._first()
        if self._num_unrun[idx] > 1:  # what was assumed meanwhile holds from now on
            hope = self._hope(idx)
            known = [value * hope for value in tuple(self._multiples[idx])]
            if known and 2 * multiple <= _quantile(known, _QUANTILE):
                known = []
            # Whole before another thread sees it.
            self._multiples[idx] = deque([*known, multiple], maxlen=_NUM_REMEMBERED)
        else:
            self._multiples[idx].append(multiple)
        self._num_unrun[idx] = 0

    def expect(self, idx: int) -> float:
        """Return the seconds that a stage will take, nearly the longest of the last times."""
        return _quantile(self._multiples[idx], _QUANTILE) * self._hope(idx) * self._first()

    def _first(self) -> float:
        return max(_quantile(self._unit, 0.5), 1e-9)

    def _hope(self, idx: int) -> float:
        doubt = _NUM_REMEMBERED / max(1, len(self._multiples[idx]))
        return float((1 - _HOPE * doubt**2) ** max(0, self._num_unrun[idx] - 1))


def _quantile(values: Collection[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[int(share * (len(ranked) - 1))]


class Runner:
    """An exported network, ready to answer. Several threads may use one.

    Args:
        folder: What `timm_multiexit.export` wrote. It is not trusted: its manifest and all its files are checked.
        precision: 'fp32', or 'int8' where the folder has that.
        providers: Of ONNX Runtime, the best first; None for the CPU.
        threads: That one operator may use; None leaves it to ONNX Runtime.
        check: Compute the checksums of all files; False compares their sizes alone, for a quick start.

    Attributes:
        manifest: What `manifest.json` says.
        classes: Names of the classes; None where they have none.
        num_exits: Number of exits, without main.

    Raises:
        RunnerError: ONNX Runtime is missing, an argument is not what it must be, or the folder is not.
    """

    def __init__(
        self,
        folder: str | Path,
        precision: str = 'fp32',
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        *,
        check: bool = True,
    ):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        check_files(self.folder, self.manifest, hashes=check)
        if precision not in self.manifest['programs']:
            raise RunnerError(
                f'precision must be one of {", ".join(self.manifest["programs"])} for this folder,'
                f' got {_brief(precision)}.'
            )
        self.precision, self.classes = precision, self.manifest['classes']
        self.num_exits = len(self.manifest['exits']) - 1
        self._programs = self.manifest['programs'][precision]
        if not any(self._programs.values()):
            raise RunnerError(f'{self.folder} has no ONNX programs of {precision}: export it with the format onnx.')
        self._open, self._checks = _make_opener(providers, threads), check
        self._root = self.folder.absolute()  # the working directory may change
        self._sessions: dict[str, Any] = {}
        self._times: OrderedDict[tuple[int, ...], _Times] = OrderedDict()

    def __call__(self, images: np.ndarray, exit_idx: int = -1) -> np.ndarray:
        """Return the logits [B, C] of one classifier, main unless told; nothing after it is computed.

        Args:
            images: [B, C, H, W] float32, normalized, as `preprocess` gives them.
            exit_idx: 0 for the shallowest exit; -1 or the number of exits for main.
        """
        images, idx = self._check_images(images), self._check_exit(exit_idx)
        if self._programs['fixed']:
            logits = self._run(self._programs['fixed'][idx], [images])[0]
        else:
            self._require_stages('a call with exit_idx', 'fixed')
            state = [images]
            for stage in range(idx + 1):
                logits, *state = self._run_stage(stage, state)
        return self._checked(idx, logits)

    def infer(
        self,
        images: np.ndarray,
        policy: dict[str, Any] | None = None,
        *,
        threshold: float | Sequence[float | None] | None = None,
        budget: str | None = None,
    ) -> Answer:
        """Answer each image at the exit that decides for it; what has left is not computed further.

        One of `policy`, `threshold` and `budget` may be given; without any of them it is the folder's own policy.

        Args:
            images: [B, C, H, W] float32, normalized, as `preprocess` gives them.
            policy: What `ExitPolicy.to_dict` gives: criterion, thresholds, temperatures, combine.
            threshold: Least confidence to leave at, of all exits or of each; None for an exit that is not used.
            budget: Mean MACs per image, such as '60%' of main's or '1.2GMACs'.

        Raises:
            RunnerError: An argument is not what it must be, or a classifier gives NaN.
        """
        images = self._check_images(images)
        rule = self._choose(policy, threshold, budget)
        if not self._programs['stages']:
            return self._infer_each(images, rule)
        main, run, state = self.num_exits, _PolicyRun(rule), [images]
        rows = np.arange(len(images))
        answers = np.zeros((len(images), self.manifest['num_classes']), np.float32)
        exit_idx = np.full(len(images), main, np.int64)
        for idx in range(main + 1):
            logits, *state = self._run_stage(idx, state)
            if idx < main and rule.thresholds[idx] is None:
                continue
            answer = self._checked(idx, run.answer(idx, logits))
            leaves = np.ones(len(rows), bool) if idx == main else run.leaves(idx, answer)
            answers[rows[leaves]], exit_idx[rows[leaves]] = answer[leaves], idx
            stay = np.flatnonzero(~leaves)
            if not len(stay):
                break
            if len(stay) < len(rows):
                rows, state = rows[stay], [tensor[stay] for tensor in state]
                run.select(stay)
        return Answer(answers, exit_idx)

    def _infer_each(self, images: np.ndarray, rule: _Policy) -> Answer:
        """Answer image by image, by the program that leaves at run time."""
        one = self._programs['conditional']
        if one is None:
            self._require_stages('infer', 'conditional')
        if (one['criterion'], one['combine']) != (rule.criterion, rule.combine):
            raise RunnerError(
                f'{one["path"]} leaves by {one["criterion"]}, combine {one["combine"]}, and not by {rule.criterion},'
                f' combine {rule.combine}: export {self.folder} with the form stages.'
            )
        thresholds = np.array([np.nan if value is None else value for value in rule.thresholds], np.float32)
        temperatures = np.array(rule.temperatures or [1.0] * (self.num_exits + 1), np.float32)
        found = [
            self._run(one['path'], [images[idx : idx + 1], thresholds, temperatures]) for idx in range(len(images))
        ]
        logits, exit_idx = (np.concatenate(parts) for parts in zip(*found))
        for idx in np.unique(exit_idx):
            self._checked(int(idx), logits[exit_idx == idx])
        return Answer(logits, exit_idx)

    def anytime(self, images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (k, logits [B, C]) of each exit as soon as it is computed, main last; leaving the loop stops the work.

        Args:
            images: [B, C, H, W] float32, normalized, as `preprocess` gives them.
        """
        images = self._check_images(images)
        self._require_stages('anytime')

        def step() -> Iterator[tuple[int, np.ndarray]]:
            state = [images]
            for idx in range(self.num_exits + 1):
                logits, *state = self._run_stage(idx, state)
                yield idx, self._checked(idx, logits)

        return step()

    def predict(self, images: np.ndarray, deadline_ms: float) -> Answer:
        """Return the deepest answer that is there before the deadline; if none can be, the shallowest exit's.

        How long the stages take is learnt: the first call with a shape of `images` measures a few forwards, which do
        not count, and each call adds what it sees.

        Args:
            images: [B, C, H, W] float32, normalized, as `preprocess` gives them.
            deadline_ms: Milliseconds from the call on, > 0.
        """
        end = time.perf_counter() + self._check_deadline(deadline_ms)
        images = self._check_images(images)
        self._require_stages('predict')
        times = self._times.get(images.shape)
        if times is None:
            times = self._learn(images)
            end = time.perf_counter() + deadline_ms / 1e3
        with suppress(KeyError):  # another thread may have forgotten it
            self._times.move_to_end(images.shape)
        found: tuple[int, np.ndarray] | None = None
        state, last = [images], time.perf_counter()
        for idx in range(self.num_exits + 1):
            if found is not None and last + times.expect(idx) > end:
                break
            logits, *state = self._run_stage(idx, state)
            now = time.perf_counter()
            times.add(idx, now - last)
            last = now
            if found is None or now <= end:
                found = idx, logits
        assert found is not None
        idx, logits = found
        return Answer(self._checked(idx, logits), np.full(len(logits), idx, np.int64))

    def preprocess(self, image: Any) -> np.ndarray:
        """Return a picture as [1, C, H, W] float32, given a path or a `PIL.Image.Image`; see `prepare`."""
        return prepare(image, self.manifest['preprocessing'])

    def macs(self, exit_idx: int, skipped: Collection[int] = ()) -> float:
        """Return what it costs to leave at a classifier, as a share of main's MACs alone.

        Args:
            exit_idx: As for a call.
            skipped: Exits on the way whose heads are not run; the heads of all others are.
        """
        idx = self._check_exit(exit_idx)
        macs = [each['macs'] for each in self.manifest['exits']]
        heads = [each['sequential'] - each['fixed'] for each in macs]  # of all exits before
        spent = macs[idx]['sequential'] - sum(heads[k + 1] - heads[k] for k in skipped if k < idx)
        return float(spent / self.manifest['plain_macs'])

    def unused(
        self,
        policy: dict[str, Any] | None = None,
        *,
        threshold: float | Sequence[float | None] | None = None,
        budget: str | None = None,
    ) -> list[int]:
        """Return the exits whose heads `infer` does not run, given its arguments: none of the stages skips one."""
        if self._programs['stages']:
            return []
        rule = self._choose(policy, threshold, budget)
        return [idx for idx, value in enumerate(rule.thresholds) if value is None]

    def _learn(self, images: np.ndarray) -> _Times:
        seconds = []
        for _ in range(_NUM_PROBES + 1):
            state, marks = [images], [time.perf_counter()]
            for idx in range(self.num_exits + 1):
                _, *state = self._run_stage(idx, state)
                marks.append(time.perf_counter())
            seconds.append([after - before for before, after in zip(marks, marks[1:])])
        times = _Times(self.num_exits + 1)
        for _ in range(_NUM_PROBES):
            for idx, of_stage in enumerate(zip(*seconds[1:])):  # the first forward is slow, and loads the programs
                times.add(idx, min(of_stage))
        self._times[images.shape] = times
        while len(self._times) > _NUM_FORMS:
            self._times.popitem(last=False)
        return times

    def _choose(self, policy: Any, threshold: Any, budget: Any) -> _Policy:
        if sum(value is not None for value in (policy, threshold, budget)) > 1:
            raise RunnerError('policy, threshold and budget are mutually exclusive: give one of them.')
        if threshold is not None:
            each = threshold.tolist() if hasattr(threshold, 'tolist') else threshold
            each = list(each) if isinstance(each, (list, tuple)) else [each] * self.num_exits
            policy = {'criterion': 'confidence', 'thresholds': each}
        elif budget is not None:
            policy = self._select(budget)
        elif policy is None:
            policy = self.manifest['policy']
            if policy is None:
                raise RunnerError('The network has no policy of its own: give policy, threshold or budget.')
        return _Policy(policy, self.num_exits)

    def _select(self, budget: Any) -> dict[str, Any]:
        """Return the policy of the best accuracy within a budget; of equals the dearest."""
        pattern = r'([0-9]{1,20}(?:\.[0-9]{0,20})?) ?(%|[kKMGT]?MACs|ms)'
        match = re.fullmatch(pattern, budget) if isinstance(budget, str) else None
        if match is None or float(match[1]) <= 0:
            raise RunnerError(
                f"budget must be a share of main's MACs such as '60%', or MACs such as '1.2GMACs', > 0, got"
                f' {_brief(budget)}.'
            )
        if match[2] == 'ms':
            raise RunnerError('budget must be a share or MACs on a device: for a time use predict(deadline_ms).')
        points = self.manifest['budgets']
        if not points:
            raise RunnerError(f'The network has no table of budgets to look {budget!r} up in: calibrate it first.')
        plain = self.manifest['plain_macs']
        value = float(match[1]) * (plain / 100 if match[2] == '%' else _SCALES[match[2][:-4]])
        lowest = min(point['macs'] for point in points)
        largest = max(self.manifest['exits'][-1]['macs']['sequential'], *(point['macs'] for point in points))
        if not lowest * (1 - _SLACK) <= value <= largest * (1 + _SLACK):
            low, high = _show(lowest, match[2], plain, up=True), _show(largest, match[2], plain, up=False)
            raise RunnerError(f'budget must be {low} to {high}, got {budget}.')
        within = [point for point in points if point['macs'] <= value * (1 + _SLACK)]
        return max(within, key=lambda point: (point['accuracy'], point['macs']))['policy']

    def _require_stages(self, call: str, *others: str) -> None:
        """Raise unless there are stages, which a call needs where none of the other forms is there."""
        if not self._programs['stages']:
            forms = ' or '.join(('stages', *others))
            raise RunnerError(
                f'{self.folder} has no {forms} of {self.precision}, which {call} needs: export it with'
                f' the form {forms}.'
            )

    def _check_exit(self, exit_idx: Any) -> int:
        if isinstance(exit_idx, bool) or not isinstance(exit_idx, (int, np.integer)):
            raise RunnerError(f'exit_idx must be an integer, got {_brief(exit_idx)}.')
        idx = int(exit_idx) + (self.num_exits + 1) * (exit_idx < 0)
        if not 0 <= idx <= self.num_exits:
            raise RunnerError(f'exit_idx must be in [{-self.num_exits - 1}, {self.num_exits}], got {exit_idx}.')
        return idx

    def _check_deadline(self, deadline_ms: Any) -> float:
        if not _is_number(deadline_ms) or not 0 < deadline_ms <= 1e9:
            raise RunnerError(f'deadline_ms must be > 0 and <= 1e9, got {_brief(deadline_ms)}.')
        return float(deadline_ms) / 1e3

    def _check_images(self, images: Any) -> np.ndarray:
        channels, height, width = self.manifest['preprocessing']['input_size']
        wanted = f'images must be a non-empty float32 array [B, {channels}, {height}, {width}]'
        if not isinstance(images, np.ndarray):
            raise RunnerError(f'{wanted}, got {type(images).__name__}.')
        if images.dtype != np.float32:
            raise RunnerError(f'{wanted}, got {images.dtype}: normalize them, and images.astype(numpy.float32).')
        if images.shape[1:] != (channels, height, width) or not len(images):
            hint = ' Add the dimension of the batch: images[None].' if images.ndim == 3 else ''
            raise RunnerError(f'{wanted}, got {list(images.shape)}.{hint}')
        return images

    def _checked(self, idx: int, logits: np.ndarray) -> np.ndarray:
        num_wrong = int((~np.isfinite(logits.max(-1))).sum())  # NaN is the largest, and some classes may be -inf
        if num_wrong:
            name = 'main' if idx == self.num_exits else f'exit {idx}'
            raise RunnerError(
                f'{name} gives NaN or infinite logits for {num_wrong} of {len(logits)} images: check the input.'
            )
        return logits

    def _run_stage(self, idx: int, state: list[np.ndarray]) -> list[np.ndarray]:
        return self._run(self._programs['stages'][idx], state)

    def _run(self, path: str, values: list[np.ndarray]) -> list[np.ndarray]:
        session = self._sessions.get(path)
        if session is None:
            session = self._sessions[path] = self._open_program(path)
        try:
            return session.run(None, dict(zip([node.name for node in session.get_inputs()], values)))
        except Exception as error:  # ONNX Runtime's own kinds have no common base
            raise RunnerError(f'{path} cannot be run: {_one_line(error)}.') from error

    def _open_program(self, path: str) -> Any:
        """Open a program, which is still the one that the manifest lists."""
        try:
            content = (self._root / path).read_bytes()
        except OSError as error:
            raise RunnerError(f'{self.folder / path} cannot be opened: {_one_line(error)}.') from error
        digest = hashlib.sha256(content).hexdigest() if self._checks else None
        _check_file(self.folder / path, self.manifest['files'][path], len(content), digest)
        try:
            return self._open(content)
        except Exception as error:  # ONNX Runtime's own kinds have no common base
            raise RunnerError(f'{self.folder / path} cannot be opened: {_one_line(error)}.') from error


def _show(cost: float, unit: str, total: float, *, up: bool) -> str:
    """Return a cost as a budget that is allowed again, rounded up or down to four digits, as timm_multiexit does."""
    scale, suffix = total / 100, unit
    if unit != '%':
        units = ((1e9, 'GMACs'), (1e6, 'MMACs'), (1e3, 'kMACs'))
        scale, suffix = next((each for each in units if cost >= each[0]), (1.0, 'MACs'))
    value = cost / scale
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    rounded = (math.ceil(value / step - 1e-6) if up else math.floor(value / step + 1e-6)) * step
    return f'{rounded:.10g}{suffix}'


def _make_opener(providers: Any, threads: Any) -> Any:
    """Return a function that opens the content of a program, from memory, so that it can read no other file."""
    try:
        import onnxruntime
    except ImportError:
        raise RunnerError('ONNX Runtime is missing: pip install onnxruntime.') from None
    names = ['CPUExecutionProvider'] if providers is None else providers
    known = onnxruntime.get_available_providers()
    if isinstance(names, str) or not names or not all(name in known for name in names):
        raise RunnerError(f'providers must be a list of {", ".join(known)}, got {_brief(providers)}.')
    options = onnxruntime.SessionOptions()
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise RunnerError(f'threads must be an integer in [1, 1024], got {_brief(threads)}.')
        options.intra_op_num_threads = threads
    return partial(onnxruntime.InferenceSession, sess_options=options, providers=list(names))


# --- The command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Answer pictures, a line each, and return the exit code: 2 for an error, of one line, or of each bad picture."""
    import argparse  # of the script alone

    description = (
        'Answer pictures with an exported network. Shares are those of the policy, with its temperatures; with'
        ' --threshold, --deadline-ms and --all they are those of the logits as they are.'
    )
    parser = argparse.ArgumentParser(prog=OWN_NAME, description=description)
    parser.add_argument('folder', help='what timm-multiexit export wrote')
    parser.add_argument('pictures', nargs='+', metavar='PICTURE')
    parser.add_argument('--budget', metavar='B', help="mean MACs per picture: '60%%' of main's, 1.2GMACs")
    parser.add_argument(
        '--threshold',
        type=_thresholds,
        metavar='T',
        help='least confidence to leave at, for all exits or each: 0.9,none,0.8',
    )
    parser.add_argument('--deadline-ms', type=float, metavar='MS', help='the deepest answer in so many milliseconds')
    parser.add_argument('--all', action='store_true', help='the answer of every exit, as soon as it is there')
    parser.add_argument('--precision', default='fp32', help='fp32 or int8')
    parser.add_argument('--threads', type=int, metavar='N', help='of ONNX Runtime')
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # names that it cannot write
    given = [args.budget is not None, args.threshold is not None, args.deadline_ms is not None, args.all]
    try:
        if sum(given) > 1:
            raise RunnerError(
                '--budget, --threshold, --deadline-ms and --all are mutually exclusive: give one of them.'
            )
        runner, code = Runner(args.folder, args.precision, threads=args.threads), 0
        for picture in args.pictures:
            try:
                images, name = runner.preprocess(picture), _printable(picture)
            except PictureError as error:  # the others are answered
                print(f'{OWN_NAME}: error: {error}', file=sys.stderr)
                code = 2
                continue
            if args.all:
                for idx, logits in runner.anytime(images):
                    print(f'{name}: {describe(runner, logits[0], idx)}', flush=True)
                continue
            skipped: Sequence[int] = ()
            if args.deadline_ms is not None:
                answer = runner.predict(images, args.deadline_ms)
            else:
                answer = runner.infer(images, threshold=args.threshold, budget=args.budget)
                skipped = runner.unused(threshold=args.threshold, budget=args.budget)
            print(f'{name}: {describe(runner, answer.logits[0], int(answer.exit_idx[0]), skipped)}', flush=True)
    except RunnerError as error:
        print(f'{OWN_NAME}: error: {error}', file=sys.stderr)
        return 2
    return code


def _thresholds(text: str) -> float | list[float | None]:
    """Return what `--threshold` means: a number for all exits, or one of each, none for one that is not used."""
    import argparse

    try:
        each = [None if part.strip().lower() == 'none' else float(part) for part in text.split(',')]
    except ValueError:
        each = [None]
    if len(each) > 1:
        return each
    if each[0] is None:
        raise argparse.ArgumentTypeError(f'must be a number, or one per exit (none to leave one out), got {text!r}.')
    return each[0]


def describe(runner: Runner, logits: np.ndarray, exit_idx: int, skipped: Sequence[int] = ()) -> str:
    """Return an answer [C] in words; for `skipped` see `Runner.macs`."""
    shares = softmax(logits)
    best = int(shares.argmax())
    name = _printable(runner.classes[best]) if runner.classes else f'class {best}'
    where, macs = _printable(runner.manifest['exits'][exit_idx]['name']), runner.macs(exit_idx, skipped)
    return f'{name}, {100 * shares[best]:.1f} %, at {where} with {100 * macs:.0f} % of the MACs'


if __name__ == '__main__':
    sys.exit(main())
