"""Inference under a deadline: how long each part of a model takes, learnt by measuring, and how far the time allows."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

from timm_multiexit.exits.taps import ForwardStopped, RunHead, Taps
from timm_multiexit.policies.leaving import check_answer
from timm_multiexit.policies.policy import Prediction
from timm_multiexit.utils.timing import read_wall_clock

Clock = Callable[[torch.device], float]

# Nearly the longest of the last times of a part is expected: by their median every other answer would be late.
NUM_REMEMBERED = 32
QUANTILE = 0.9

HOPE = 1e-4
NUM_LATEST = 3  # of the first stage, whose median says how fast the machine is just now
NUM_FORMS = 16
NUM_PROBES = 3


class PartTimes:
    """How long each part of a model takes for one form of input: its stages, main's last, and its heads.

    Times are kept as multiples of what the first stage took just then, which always runs: a part that is not run for a
    while is assumed to have become slower or faster as that one has. Besides, with every call that does not reach it a
    part is assumed to be faster by a ten-thousandth, so that it is tried again in the end. Otherwise one slow moment
    would keep a model from its later exits for good. The number of exits is without main.
    """

    def __init__(self, num_exits: int):
        self.num_exits = num_exits
        self._first: deque[float] = deque(maxlen=NUM_LATEST)
        self._multiples: list[deque[float]] = [deque(maxlen=NUM_REMEMBERED) for _ in range(2 * num_exits + 1)]
        self._num_unrun = [0] * (2 * num_exits + 1)

    def add_stage(self, idx: int, seconds: float) -> None:
        """Remember how long it took from tap `idx - 1` to tap `idx`, or from the images, or to main's logits."""
        self._add(idx, seconds)

    def add_head(self, idx: int, seconds: float) -> None:
        """Remember how long head `idx` took."""
        self._add(self.num_exits + 1 + idx, seconds)

    def _add(self, part: int, seconds: float) -> None:
        if part == 0:
            self._first.append(seconds)
            self._num_unrun = [count + 1 for count in self._num_unrun]
        if self._num_unrun[part] > 1:  # what was assumed of it in the meantime holds from now on
            # Of a copy, since other threads may add to it meanwhile.
            faster = [multiple * self._hope(part) for multiple in tuple(self._multiples[part])]
            self._multiples[part] = deque(faster, maxlen=NUM_REMEMBERED)
        self._num_unrun[part] = 0
        self._multiples[part].append(seconds / self._unit())

    def _hope(self, part: int) -> float:
        return (1 - HOPE) ** max(0, self._num_unrun[part] - 1)

    def _unit(self) -> float:
        return max(_quantile(self._first, 0.5), 1e-9)

    def head(self, idx: int) -> float:
        """Return the seconds that are expected of head `idx`; nothing for main."""
        return self._expect(self.num_exits + 1 + idx) if idx < self.num_exits else 0.0

    def way(self, first: int, last: int) -> float:
        """Return the seconds expected from tap `first` to the answer of classifier `last`, without heads between.

        From the images `first` is -1.
        """
        return sum(self._expect(idx) for idx in range(first + 1, last + 1)) + self.head(last)

    def _expect(self, part: int) -> float:
        return _quantile(self._multiples[part], QUANTILE) * self._hope(part) * self._unit()


def _quantile(seconds: Iterable[float], share: float) -> float:
    ranked = sorted(seconds)
    return ranked[int(share * (len(ranked) - 1))]  # this runs at every tap, and numpy's takes longer than a head


class TimeBook:
    """`PartTimes` of the forms of input that a model was last asked with."""

    def __init__(self) -> None:
        self._forms: OrderedDict[Hashable, PartTimes] = OrderedDict()

    def find(self, x: Tensor) -> PartTimes | None:
        """Return what is known of inputs of this shape, dtype, device and precision; None if it is nothing."""
        return self._forms.get(self._key(x))

    def keep(self, x: Tensor, times: PartTimes) -> None:
        """Keep what was learnt; the oldest form is forgotten."""
        self._forms[self._key(x)] = times
        while len(self._forms) > NUM_FORMS:
            self._forms.popitem(last=False)

    @staticmethod
    def _key(x: Tensor) -> Hashable:
        is_autocast = torch.is_autocast_enabled(x.device.type)
        return tuple(x.shape), x.dtype, x.device, is_autocast, torch.get_num_threads()


class _Timed:
    """A forward whose parts are timed."""

    def __init__(self, times: PartTimes, run_head: RunHead, clock: Callable[[], float]):
        self.times, self._run_head, self._clock = times, run_head, clock
        self.started = self._last = clock()

    def arrive(self, idx: int) -> float:
        """Remember the stage that ends here, and return the time."""
        now = self._clock()
        self.times.add_stage(idx, now - self._last)
        self._last = now
        return now

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # time is read between compiled parts of a backbone
    def visit(self, idx: int, tensor: Tensor) -> None:
        """Time everything; the visitor of `learn_times`."""
        if idx < self.times.num_exits:
            self.arrive(idx)
            self.run_head(idx, tensor)

    def run_head(self, idx: int, tensor: Tensor) -> tuple[Tensor, float]:
        """Return logits and the time they are there, and remember how long the head took."""
        logits = self._run_head(idx, tensor)
        now = self._clock()
        self.times.add_head(idx, now - self._last)
        self._last = now
        return logits, now


def learn_times(
    backbone: nn.Module, taps: Taps, x: Tensor, *, run_head: RunHead, clock: Clock = read_wall_clock
) -> PartTimes:
    """Return how long the parts take for a batch of images [B, C, H, W], of a few forwards with all heads."""
    times = PartTimes(len(taps.names))
    for probe in range(NUM_PROBES + 1):
        # The first forward of a form is slow, and not remembered.
        part_times = times if probe else PartTimes(len(taps.names))
        timed = _Timed(part_times, run_head, lambda: clock(x.device))
        taps.visit(backbone, x, timed.visit)
        timed.arrive(len(taps.names))
    return times


class _Race:
    """The visitor of one batch under a deadline.

    At a tap it looks for the deepest classifier that can still answer in time. On the way there heads are run where
    the time allows that too, so that there is an answer if the rest takes longer than expected.
    """

    def __init__(self, timed: _Timed, deadline: float):
        self._timed, self._end = timed, timed.started + deadline
        self.answer: tuple[int, Tensor] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def visit(self, idx: int, tensor: Tensor) -> None:
        times = self._timed.times
        if idx >= times.num_exits:
            return
        left = self._end - self._timed.arrive(idx)
        ways = {later: times.way(idx, later) for later in range(idx, times.num_exits + 1)}
        target = max((later for later, way in ways.items() if way <= left), default=None)
        if target is None and self.answer is not None:
            raise ForwardStopped
        if target in (None, idx):
            self.offer(idx, *self._timed.run_head(idx, tensor))
            raise ForwardStopped
        if times.head(idx) + ways[target] <= left:
            self.offer(idx, *self._timed.run_head(idx, tensor))

    def offer(self, idx: int, logits: Tensor, now: float) -> None:
        """Take an answer that is in time, or that is the first."""
        if self.answer is None or now <= self._end:
            self.answer = idx, logits


def predict_by_deadline(
    backbone: nn.Module,
    taps: Taps,
    x: Tensor,
    times: PartTimes,
    *,
    deadline_ms: float,
    run_head: RunHead,
    clock: Clock = read_wall_clock,
) -> Prediction:
    """Return the deepest answer that is there before the deadline; if none can be, the shallowest exit's.

    The backbone is in eval mode, images are [B, C, H, W], the deadline is in milliseconds from now, above 0; the clock
    tells seconds. What is measured on the way is added to `times`, which is what is known of such inputs.

    Raises:
        InvalidValueError: What answers is NaN.
    """
    timed = _Timed(times, run_head, lambda: clock(x.device))
    race = _Race(timed, deadline_ms / 1e3)
    logits = taps.visit(backbone, x, race.visit)
    if logits is not None:
        race.offer(times.num_exits, logits, timed.arrive(times.num_exits))
    if race.answer is None:
        raise RuntimeError("No tap fired: the backbone's forward calls none of the tapped modules.")
    idx, logits = race.answer
    check_answer(idx, times.num_exits, logits)
    return Prediction(logits, torch.full(logits.shape[:1], idx, device=logits.device))
