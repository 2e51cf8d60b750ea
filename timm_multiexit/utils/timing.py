"""Time and memory. Times are measured so that they can be compared: in turns, as paired ratios."""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def read_clock(device: torch.device) -> float:
    """Return the time in seconds, with all work on the device done.

    On a CPU with one thread it is the time that this process has used, in which other programs do not count.
    """
    if device.type == 'cpu' and torch.get_num_threads() == 1:
        return time.process_time()
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def read_wall_clock(device: torch.device) -> float:
    """Return the time in seconds that passes for everybody, with all work on the device's current stream done."""
    if device.type == 'mps':  # has one stream, which cannot be waited for by itself
        torch.accelerator.synchronize(device)
    elif device.type != 'cpu':
        torch.accelerator.current_stream(device).synchronize()
    return time.perf_counter()


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    clock: Callable[[torch.device], float] = read_clock,
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round, after one round that does not count.

    Every variant takes one turn per round, in an order that changes from round to round, so that a busy machine slows
    all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for round_idx in range(rounds + 1):
        shuffle(order)
        for name in order:
            started = clock(device)
            variants[name]()
            if round_idx:
                times[name].append(clock(device) - started)
    return times


def describe_ratios(times: Sequence[float], reference: Sequence[float]) -> tuple[float, str]:
    """Return the median of the ratios of two variants' times, round by round, and their quartiles as text.

    >>> describe_ratios([2.0, 5.0, 20.0], [1.0, 2.0, 10.0])
    (2.0, '2.000-2.250')
    """
    quarter, median, three_quarters = np.percentile(np.divide(times, reference), (25, 50, 75))
    return float(median), f'{quarter:.3f}-{three_quarters:.3f}'


def measure_peak(call: Callable[[], object]) -> float:
    """Return the MiB that a call takes on the GPU above what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
