"""Inference under a deadline: how long each part of a model takes, learnt by measuring, and how far the time allows."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from timm_multiexit.exits.taps import ForwardStopped, RunHead, Taps
from timm_multiexit.policies.leaving import check_answer
from timm_multiexit.policies.policy import Prediction
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.timing import read_wall_clock

Clock = Callable[[torch.device], float]

# Nearly the longest of the last times of a part is expected: by their median every other answer would be late.
NUM_REMEMBERED = 32
QUANTILE = 0.9

HOPE = 1e-4
NUM_LATEST = 3  # of the first stage, whose median says how fast the machine is just now
NUM_FORMS = 64
NUM_PROBES = 5


class PartTimes:
    """How long each part of a model takes for one form of input: stages, main's last, heads, the answer's check.

    Times are kept as multiples of what the first stage took just then, which always runs: a part that is not run for a
    while is assumed to have become slower or faster as that one has. Besides, with every call that does not reach it a
    part is assumed to be faster, by a ten-thousandth where 32 times of it are known and by (32 / n)^2 times as much
    where n are, so that it is tried again in the end. Otherwise one slow moment would keep a model from its later exits
    for good. If it turns out to be at most half as slow as was expected, what was known of it is forgotten.

    Args:
        num_exits: Number of exits without main.
        probes: Seconds of every part in a few forwards, the stages first, main's last, then the heads, then the check.
            The shortest of each counts, for all of them: what disturbs a measurement makes it longer.
    """

    def __init__(self, num_exits: int, probes: Sequence[Sequence[float]] = ()):
        self.num_exits = num_exits
        self._first: deque[float] = deque(maxlen=NUM_LATEST)
        self._multiples: list[deque[float]] = [deque(maxlen=NUM_REMEMBERED) for _ in range(2 * num_exits + 2)]
        self._num_unrun = [0] * (2 * num_exits + 2)
        shortest = [min(seconds) for seconds in zip(*probes)]
        for _ in probes:
            for part, seconds in enumerate(shortest):
                self._add(part, seconds)

    def add_stage(self, idx: int, seconds: float) -> None:
        """Remember how long it took from tap `idx - 1` to tap `idx`, or from the images, or to main's logits."""
        self._add(idx, seconds)

    def add_head(self, idx: int, seconds: float) -> None:
        """Remember how long head `idx` took."""
        self._add(self.num_exits + 1 + idx, seconds)

    def add_check(self, seconds: float) -> None:
        """Remember how long it took to look for NaN in the answer."""
        self._add(2 * self.num_exits + 1, seconds)

    def _add(self, part: int, seconds: float) -> None:
        if part == 0:
            self._first.append(seconds)
            self._num_unrun = [count + 1 for count in self._num_unrun]
        multiple = seconds / self._unit()
        if self._num_unrun[part] > 1:  # what was assumed of it in the meantime holds from now on
            known = () if 2 * multiple <= self._expect_multiple(part) else tuple(self._multiples[part])
            faster = [known_multiple * self._hope(part) for known_multiple in known]
            # Whole before other threads see it: they may share what is known.
            self._multiples[part] = deque([*faster, multiple], maxlen=NUM_REMEMBERED)
        else:
            self._multiples[part].append(multiple)
        self._num_unrun[part] = 0

    def _hope(self, part: int) -> float:
        doubt = NUM_REMEMBERED / max(1, len(self._multiples[part]))
        return (1 - HOPE * doubt**2) ** max(0, self._num_unrun[part] - 1)

    def _unit(self) -> float:
        return max(_quantile(self._first, 0.5), 1e-9)

    def head(self, idx: int) -> float:
        """Return the seconds that are expected of head `idx`; nothing for main."""
        return self._expect(self.num_exits + 1 + idx) if idx < self.num_exits else 0.0

    def check(self) -> float:
        """Return the seconds that are expected from the answer's logits to the answer."""
        return self._expect(2 * self.num_exits + 1)

    def way(self, first: int, last: int) -> float:
        """Return the seconds expected from tap `first` to the answer of classifier `last`, without heads between.

        From the images `first` is -1.
        """
        return sum(self._expect(idx) for idx in range(first + 1, last + 1)) + self.head(last) + self.check()

    def _expect(self, part: int) -> float:
        return self._expect_multiple(part) * self._unit()

    def _expect_multiple(self, part: int) -> float:
        return _quantile(self._multiples[part], QUANTILE) * self._hope(part)


def _quantile(seconds: Iterable[float], share: float) -> float:
    ranked = sorted(seconds)
    return ranked[int(share * (len(ranked) - 1))]  # this runs at every tap, and numpy's takes longer than a head


class TimeBook:
    """`PartTimes` of the forms of input that a model was last asked with.

    Copies and pickles start empty: another thread may be adding times, and a copy may be on another device.
    """

    def __init__(self) -> None:
        self._forms: OrderedDict[Hashable, PartTimes] = OrderedDict()

    def __reduce__(self) -> tuple[type['TimeBook'], tuple[()]]:
        return TimeBook, ()

    def find(self, x: Tensor) -> PartTimes | None:
        """Return what is known of inputs of this shape, dtype, device and precision; None if it is nothing."""
        key = self._key(x)
        times = self._forms.get(key)
        with suppress(KeyError):  # unknown, or forgotten by another thread
            self._forms.move_to_end(key)
        return times

    def keep(self, x: Tensor, times: PartTimes) -> None:
        """Keep what was learnt; the form that was not asked with for the longest time is forgotten."""
        self._forms[self._key(x)] = times
        while len(self._forms) > NUM_FORMS:
            self._forms.popitem(last=False)

    @staticmethod
    def _key(x: Tensor) -> Hashable:
        is_autocast = torch.is_autocast_enabled(x.device.type)
        return tuple(x.shape), x.dtype, x.device, is_autocast, torch.get_num_threads()


def _check(idx: int, num_exits: int, logits: Tensor) -> Prediction:
    check_answer(idx, num_exits, logits, waits=True)
    return Prediction(logits, torch.full(logits.shape[:1], idx, device=logits.device))


class _Probe:
    """The visitor that times all parts of one forward: its stages, main's last, its heads, the answer's check."""

    def __init__(self, num_exits: int, run_head: RunHead, clock: Callable[[], float]):
        self._num_exits, self._run_head, self._clock = num_exits, run_head, clock
        self.stages: list[float] = []
        self.heads: list[float] = []
        self._last = clock()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # time is read between compiled parts of a backbone
    def visit(self, idx: int, tensor: Tensor) -> None:
        if idx < self._num_exits:
            self.stages.append(self._lap())
            self._run_head(idx, tensor)
            self.heads.append(self._lap())

    def finish(self, logits: Tensor) -> list[float]:
        """Return the seconds of all parts, at the end of the forward."""
        main = self._lap()
        with suppress(InvalidValueError):  # which matters where main answers
            _check(self._num_exits, self._num_exits, logits)
        return [*self.stages, main, *self.heads, self._lap()]

    def _lap(self) -> float:
        last, self._last = self._last, self._clock()
        return self._last - last


def learn_times(
    backbone: nn.Module, taps: Taps, x: Tensor, *, run_head: RunHead, clock: Clock = read_wall_clock
) -> PartTimes:
    """Return how long the parts take for a batch of images [B, C, H, W], of a few forwards with all heads."""
    probes = []
    for _ in range(NUM_PROBES + 1):
        probe = _Probe(len(taps.names), run_head, lambda: clock(x.device))
        logits = taps.visit(backbone, x, probe.visit)
        assert logits is not None  # nothing stopped the forward
        probes.append(probe.finish(logits))
    return PartTimes(len(taps.names), probes[1:])  # the first forward of a form is slow


class _Race:
    """The visitor of one batch under a deadline.

    At a tap it looks for the deepest classifier that can still answer in time. On the way there heads are run where
    the time allows that too, so that there is an answer if the rest takes longer than expected.

    Args:
        times: What is expected; what each part takes is added.
        end: When the clock shows this it is too late.
        run_head: Gives the logits of an exit.
        clock: Tells seconds, when what was begun is done.
    """

    def __init__(self, times: PartTimes, end: float, run_head: RunHead, clock: Callable[[], float]):
        self._times, self._end, self._run_head, self._clock = times, end, run_head, clock
        self.answer: tuple[int, Tensor] | None = None
        self._last = clock()  # what was queued before is over, and no part of the first stage

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def visit(self, idx: int, tensor: Tensor) -> None:
        """Answer here, continue, or stop."""
        times = self._times
        if idx >= times.num_exits:
            return
        left = self._end - self._arrive(idx)
        ways = {later: times.way(idx, later) for later in range(idx, times.num_exits + 1)}
        target = max((later for later, way in ways.items() if way <= left), default=None)
        if target is None and self.answer is not None:
            raise ForwardStopped
        if target in (None, idx):
            self._answer(idx, tensor)
            raise ForwardStopped
        if times.head(idx) + ways[target] <= left:
            self._answer(idx, tensor)

    def finish(self, logits: Tensor) -> None:
        """Take the logits of main."""
        self._offer(self._times.num_exits, logits, self._arrive(self._times.num_exits))

    def check(self) -> Prediction:
        """Return the answer, the deepest that was in time."""
        if self.answer is None:
            raise RuntimeError("No tap fired: the backbone's forward calls none of the tapped modules.")
        idx, logits = self.answer
        prediction = _check(idx, self._times.num_exits, logits)
        self._times.add_check(self._clock() - self._last)
        return prediction

    def _arrive(self, idx: int) -> float:
        now = self._clock()
        self._times.add_stage(idx, now - self._last)
        self._last = now
        return now

    def _answer(self, idx: int, tensor: Tensor) -> None:
        logits = self._run_head(idx, tensor)
        now = self._clock()
        self._times.add_head(idx, now - self._last)
        self._last = now
        self._offer(idx, logits, now)

    def _offer(self, idx: int, logits: Tensor, now: float) -> None:
        """Take an answer that is in time, or that is the first."""
        if self.answer is None or now + self._times.check() <= self._end:
            self.answer = idx, logits


def predict_by_deadline(
    backbone: nn.Module,
    taps: Taps,
    x: Tensor,
    times: PartTimes,
    *,
    end: float,
    run_head: RunHead,
    clock: Clock = read_wall_clock,
) -> Prediction:
    """Return the deepest answer that is there before the deadline; if none can be, the shallowest exit's.

    The backbone is in eval mode, images are [B, C, H, W], `end` is the deadline as the clock tells it, in seconds. What
    was queued on the stream before counts: it is waited for. What is measured on the way is added to `times`, which is
    what is known of such inputs.

    Raises:
        InvalidValueError: What answers is NaN.
    """
    race = _Race(times, end, run_head, lambda: clock(x.device))
    logits = taps.visit(backbone, x, race.visit)
    if logits is not None:
        race.finish(logits)
    return race.check()
