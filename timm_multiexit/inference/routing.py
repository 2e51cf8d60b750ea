"""Dynamic inference: samples leave the batch at the exit that decides for them."""

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from timm_multiexit.exits.cost import find_dtype
from timm_multiexit.exits.layouts import main_logits
from timm_multiexit.exits.taps import ForwardStopped, RunHead, Taps
from timm_multiexit.policies.leaving import PolicyRun, check_answer, raise_if_nan
from timm_multiexit.policies.policy import ExitPolicy, Prediction
from timm_multiexit.utils.errors import StateError

_logger = logging.getLogger(__name__)


class Route:
    """The visitor of one batch: runs heads, decides, and says which samples stay in it.

    There is one wait for the device per used exit, whatever the batch.

    Args:
        policy: Who leaves where.
        run_head: Gives an exit's logits.
        can_leave: For each exit, whether samples can leave the batch at its tap. Where they cannot, those that have
            decided stay in it as ballast until a tap where they can leave, or until all have decided.
        bucket_sizes: Batch sizes to continue with, rising: what is left is filled up to the next of them, so that
            compiled code meets few sizes. Empty for any size.
    """

    def __init__(
        self, policy: ExitPolicy, run_head: RunHead, *, can_leave: Sequence[bool], bucket_sizes: Sequence[int] = ()
    ):
        self._policy = policy
        self._run = PolicyRun(policy)
        self._run_head = run_head
        self._can_leave = can_leave
        self._bucket_sizes = tuple(bucket_sizes)
        self._used = frozenset(policy.used)
        self._visited: set[int] = set()
        self._answers: list[Tensor] = []
        self._places: list[Tensor] = []
        self._exits: list[int] = []
        self._rows = torch.empty(0, dtype=torch.int64)  # [N] place in the input of each row of the batch
        self._is_open: Tensor | None = None  # [N] bool, rows still to decide; None for all
        self._num_open = 0

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Start with a batch of so many samples."""
        self._rows = torch.arange(batch_size, device=device)
        self._num_open = batch_size

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot wait for the device
    def visit(self, idx: int, tensor: Tensor) -> Tensor | None:
        """Decide at a tap; see `taps.Visitor`.

        Raises:
            ForwardStopped: All samples have decided.
            InvalidValueError: An exit gives NaN.
        """
        if idx not in self._used:  # an exit that is not used, or main's features
            return None
        self._visited.add(idx)
        answer = self._run.answer(idx, self._run_head(idx, tensor))
        score = self._run.score(answer)
        leaves = self._policy.leaves(idx, score)
        is_nan = score.isnan()
        if self._is_open is not None:
            leaves, is_nan = leaves & self._is_open, is_nan & self._is_open
        num_leaving, num_nan = torch.stack([leaves.sum(), is_nan.sum()]).tolist()
        raise_if_nan(idx, len(self._policy.thresholds), num_nan, self._num_open)
        has_ballast = self._num_open < len(self._rows)
        if not num_leaving and not has_ballast:
            return None
        self._num_open -= num_leaving
        if num_leaving == len(self._rows):
            self._record(idx, answer, None)
            raise ForwardStopped
        # Sorted on the device, with the counts known here, so that there is nothing more to wait for.
        order = self._order(leaves)
        if num_leaving:
            self._record(idx, answer, order[self._num_open : self._num_open + num_leaving])
        if not self._num_open:
            raise ForwardStopped
        return self._continue(idx, order[: self._num_open])

    def finish(self, logits: Tensor | None) -> Prediction:
        """Return the answers in input order, given main's logits [N, C] of those that are left; None if nobody is.

        Raises:
            InvalidValueError: Main gives NaN.
            RuntimeError: The forward has come to its end without all used exits.
        """
        if logits is not None:
            missing = self._used - self._visited
            if missing:
                raise RuntimeError(
                    f"The tap of exit {min(missing)} did not fire: the backbone's forward does not call its module."
                )
            main, rows = len(self._policy.thresholds), None
            if self._is_open is not None:
                rows = self._order(torch.zeros_like(self._is_open))[: self._num_open]
            self._record(main, self._run.answer(main, logits), rows)
            check_answer(main, main, self._answers[-1])
        exits = [torch.full_like(places, idx) for idx, places in zip(self._exits, self._places)]
        if len(exits) == 1:  # all at once, so in the order they came in
            return Prediction(self._answers[0], exits[0])
        answers, places = torch.cat(self._answers), torch.cat(self._places)
        result = Prediction(torch.empty_like(answers), torch.empty_like(places))
        result.logits[places], result.exit_idx[places] = answers, torch.cat(exits)
        return result

    def _order(self, leaves: Tensor) -> Tensor:
        """Return the rows sorted: those that stay, those that leave, those that have left before."""
        kind = leaves.to(torch.int8)
        if self._is_open is not None:
            kind = kind.masked_fill(~self._is_open, 2)
        return kind.argsort(stable=True)

    def _record(self, idx: int, answer: Tensor, rows: Tensor | None) -> None:
        """Keep the answer of some rows, or of all."""
        self._answers.append(answer if rows is None else answer[rows])
        self._places.append(self._rows if rows is None else self._rows[rows])
        self._exits.append(idx)

    def _continue(self, idx: int, stay: Tensor) -> Tensor | None:
        """Return the rows of the next batch: those that stay, and ballast up to a bucket's size; None for all rows."""
        size = next((size for size in self._bucket_sizes if size >= len(stay)), len(stay))
        if not self._can_leave[idx] or size >= len(self._rows):
            self._is_open = torch.zeros_like(self._rows, dtype=torch.bool)
            self._is_open[stay] = True
            return None
        self._is_open = None
        rows = stay
        if size > len(stay):
            rows = torch.cat([stay, stay[:1].expand(size - len(stay))])
            self._is_open = torch.arange(size, device=rows.device) < len(stay)
        self._rows = self._rows[rows]
        self._run.select(rows)
        return rows


@torch.no_grad()
def find_leaving(backbone: nn.Module, taps: Taps, input_size: Sequence[int]) -> tuple[bool, ...]:
    """Return for each tap whether samples can leave the batch there, found by trying.

    They cannot where something else than the tapped tensor carries the whole batch on: a shortcut around the tap, a
    second branch, the output of an earlier stage. The backbone is in eval mode, an image (channels, height, width).

    Raises:
        StateError: Its logits are not finite.
    """
    num_taps = len(taps.names)
    device = next(backbone.parameters()).device
    if device.type == 'meta':
        raise StateError(f'{type(backbone).__name__} has no data (device meta): load its weights first.')
    generator = torch.Generator().manual_seed(0)  # of the CPU, whatever the default device
    images = torch.randn(num_taps + 2, *input_size, generator=generator, device='cpu')
    # Of different contrast and brightness, or a network at its initialization tells none apart.
    images *= torch.linspace(0.3, 3, len(images), device='cpu').view(-1, 1, 1, 1)
    images += torch.randn(len(images), input_size[0], 1, 1, generator=generator, device='cpu')
    images = images.to(device, find_dtype(backbone))
    output, tensors, _ = taps.collect(backbone, images)
    output = main_logits(backbone, output)
    reference = [*tensors, output]
    if not output.isfinite().all():
        raise StateError(
            f'{type(backbone).__name__} gives NaN or infinite logits for random images: check its weights.'
        )

    def agrees(leaving: Sequence[int]) -> bool:
        """Whether the backbone gives the same when the first sample leaves at these taps."""
        left, seen = torch.arange(len(images), device=images.device), {}

        def visit(idx: int, tensor: Tensor) -> Tensor | None:
            nonlocal left
            if idx >= num_taps:
                return None
            seen[idx] = tensor, left
            if idx not in leaving:
                return None
            left = left[1:]
            return torch.arange(1, len(tensor), device=tensor.device)

        try:
            output = cast(Tensor, taps.visit(backbone, images, visit))
            return all(
                _is_close(tensor, reference[idx][rows])
                for idx, (tensor, rows) in (seen | {num_taps: (output, left)}).items()
            )
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # what sizes that differ end in
            return False

    if agrees(range(num_taps)):
        return (True,) * num_taps
    alone = [idx for idx in range(num_taps) if agrees([idx])]
    # Two that work alone may not work together.
    alone = alone if agrees(alone) else []
    _logger.warning(
        f'{type(backbone).__name__} takes more across some exits than the tensor that is read there: samples leave the'
        f' batch at {", ".join(f"exit {idx}" for idx in alone) or "no exit"}; else they stay in it until all of it has'
        ' decided. Answers are the same, only time is not saved.'
    )
    return tuple(idx in alone for idx in range(num_taps))


def _is_close(tensor: Tensor, reference: Tensor) -> bool:
    """Whether two batches of samples agree, far nearer than two samples of one batch do."""
    if tensor.shape != reference.shape:
        return False
    # What another batch size changes by rounding: measured, up to 4e-4 in float32 where norms amplify it.
    rounding = 0.05 if tensor.dtype in (torch.float16, torch.bfloat16) else 1e-3
    tensor, reference = tensor.float(), reference.float()
    spread = float((reference - reference[:1]).abs().amax())
    tolerance = max(0.05 * spread, rounding * float(reference.abs().amax()))
    return bool((tensor - reference).abs().amax() <= tolerance)
