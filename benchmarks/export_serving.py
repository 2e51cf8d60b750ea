"""What the runner of exported folders makes of real images: images/s, MACs and accuracy of budgets."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.deploy.manifest import describe_exported
from timm_multiexit.deploy.runner import Answer, Runner
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.errors import InvalidValueError, MissingFileError
from timm_multiexit.utils.timing import describe_ratios, read_clock

_TURN = 64  # images at least, so that a turn of single images meets easy and hard ones


def load_images(runner: Runner, folder: Path, num_images: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, C, H, W] of a folder with a folder per class, as the runner wants them, and their classes [N].

    They are drawn with a fixed seed, all of them if no number is given.

    Raises:
        MissingFileError: The folder is missing or has no images.
        InvalidValueError: It has fewer images, or other classes than the network.
    """
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise MissingFileError(f'--images must be a folder with a folder of images per class, got {folder}.') from error
    num_classes = runner.manifest['num_classes']
    if found.classes != (runner.classes or found.classes) or len(found.classes) != num_classes:
        raise InvalidValueError(
            f'--images must have the {num_classes} classes of the network, got {len(found.classes)}, from'
            f' {found.classes[0]} on.'
        )
    samples = random.Random(0).sample(found.samples, len(found.samples))
    if num_images is not None and num_images > len(samples):
        raise InvalidValueError(f'--num-images must be <= {len(samples)}, the images of {folder}, got {num_images}.')
    paths, classes = zip(*samples[:num_images])
    return np.concatenate([runner.preprocess(path) for path in paths]), np.array(classes)


class EagerRunner:
    """A model in PyTorch that answers as an exported folder's runner does, in channels last.

    Args:
        model: In eval mode, on the CPU.
        input_size: (channels, height, width) of an image.
    """

    def __init__(self, model: MultiExitModel, input_size: tuple[int, int, int]):
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.input_size = input_size
        self.manifest = describe_exported(model, input_size, class_names=None, policy=None)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return main's logits [B, C]."""
        with torch.inference_mode():
            return self.model(self._to_tensor(images)).numpy()

    def infer(self, images: np.ndarray, budget: str) -> Answer:
        """Return what is answered under a budget."""
        prediction = self.model.infer(self._to_tensor(images), budget=budget)
        return Answer(prediction.logits.numpy(), prediction.exit_idx.numpy())

    def find_costs(self, budget: str) -> np.ndarray:
        """Return what leaving at each classifier costs under a budget, as shares of main's MACs alone."""
        assert self.model.budgets is not None  # or `infer` would have refused the budget
        costs = StageCosts.from_exit_costs(self.model.cost(self.input_size))
        return np.array(costs.leaving(self.model.budgets.select(budget).policy.used)) / costs.total

    def _to_tensor(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


def _find_costs(runner: Runner | EagerRunner, budget: str) -> np.ndarray:
    """Return what leaving at each classifier costs under a budget, as shares of main's MACs alone."""
    if isinstance(runner, EagerRunner):
        return runner.find_costs(budget)
    unused = runner.unused(budget=budget)
    return np.array([runner.macs(idx, unused) for idx in range(len(runner.manifest['exits']))])


class Serving:
    """Exported folders of one network, which answer the same images in turns.

    Args:
        runners: Folder -> its runner; main is that of the first.
        budgets: For each runner, as `Runner.infer` takes them.
        model: The network in PyTorch, which takes turns too.

    Raises:
        InvalidValueError: The folders are of several networks.
        RunnerError: A budget is not allowed.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        budgets: Sequence[str],
        model: MultiExitModel | None = None,
    ):
        first = next(iter(runners.values()))
        input_size = first.manifest['preprocessing']['input_size']
        eager = {} if model is None else {'PyTorch': EagerRunner(model, tuple(input_size))}
        everyone: dict[str, Runner | EagerRunner] = {**runners, **eager}
        for name, runner in everyone.items():
            if runner.manifest['exits'] != first.manifest['exits']:
                where = '--model' if name in eager else name
                raise InvalidValueError(f'FOLDER must be one network in all forms, got another one in {where}.')
        self.costs: dict[str, np.ndarray] = {}  # of each budget: where an image leaves -> share of main's MACs alone
        self.calls: dict[str, Callable[[np.ndarray], Any]] = {'main': first, 'main again': first}
        self.calls |= {f'{name}, main': runner for name, runner in eager.items()}
        for name, runner in everyone.items():
            for budget in budgets:
                self.calls[f'{name}, {budget}'] = partial(runner.infer, budget=budget)
        for call in self.calls.values():
            call(np.zeros((1, *input_size), np.float32))  # a budget that is not allowed is found here
        for name, runner in everyone.items():
            for budget in budgets:
                self.costs[f'{name}, {budget}'] = _find_costs(runner, budget)

    def measure(self, images: np.ndarray, classes: np.ndarray, batch_size: int) -> list[dict[str, Any]]:
        """Return a row for each call, all images in batches of this size: turns of some batches, in changing order.

        Images are [N, C, H, W] float32, normalized, and the true classes [N].

        `speed` is the median over turns of the images/s against those of main in the same turn; images that do not
        fill a turn count for accuracy and MACs alone. These are those of the exits where images left, with the heads on
        the way that are run.
        """
        device = torch.device('cpu')
        times: dict[str, list[float]] = {name: [] for name in self.calls}
        answers: dict[str, list[Any]] = {name: [] for name in self.calls}
        order, shuffle = list(self.calls), random.Random(0).shuffle
        for call in self.calls.values():
            call(images[:batch_size])
        size = batch_size * -(-_TURN // batch_size)
        for start in range(0, len(images), size):
            turn = images[start : start + size]
            batches = [turn[idx : idx + batch_size] for idx in range(0, len(turn), batch_size)]
            shuffle(order)
            for name in order:
                started = read_clock(device)
                found = [self.calls[name](batch) for batch in batches]
                if len(turn) == size or not start:
                    times[name].append(read_clock(device) - started)
                answers[name] += found
        return [
            {
                'batch': batch_size,
                'call': name,
                **self._describe(name, answers[name], classes),
                'images/s': min(size, len(images)) / np.median(times[name]),
                **dict(zip(('speed', 'quartiles'), describe_ratios(times['main'], times[name]))),
            }
            for name in self.calls
        ]

    def _describe(self, name: str, answers: list[Any], classes: np.ndarray) -> dict[str, float]:
        costs = self.costs.get(name)  # None of main
        logits = np.concatenate([answer if costs is None else answer.logits for answer in answers])
        macs = 1.0 if costs is None else np.mean(costs[np.concatenate([each.exit_idx for each in answers])])
        return {'top-1, %': 100 * np.mean(logits.argmax(-1) == classes), 'MACs, %': 100 * macs}
