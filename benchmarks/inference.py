"""What inference costs: every way to ask a model, against plain timm in the same run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cuts import copy_plain, cut_by_hand
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy, Prediction
from timm_multiexit.utils.errors import StateError
from timm_multiexit.utils.timing import describe_ratios, measure_peak, time_interleaved

PLAIN = 'plain timm'

NONE_LEAVING = 'infer, none leaving'

# Confidences are in [0, 1]: at the first nobody leaves, at the second everybody does.
_NOBODY, _EVERYBODY = 1.0, 0.0


class Variant(NamedTuple):
    """One way to ask.

    Attributes:
        call: What is timed.
        macs: Multiply-accumulates of an image, the mean of the batch.
        against: Names of the variants that it is compared with beside plain timm -> their weights; their weighted
            times are added.
        shares: Of the images, those that leave at each classifier, main last; None where no policy decides.
    """

    call: Callable[[], object]
    macs: float
    against: Mapping[str, float] = {}
    shares: tuple[float, ...] | None = None


def force_policy(logits: Sequence[Tensor], share: float) -> ExitPolicy:
    """Return the policy by which a share of the images that reach each exit leaves there.

    Args:
        logits: One [B, C] tensor per classifier, main last, of the images that the policy is for: its thresholds lie
            between two of them.
        share: Above 0 and below 1; the number of images is rounded down.
    """
    thresholds = []
    left = torch.arange(len(logits[-1]), device=logits[-1].device)
    for single in logits[:-1]:
        scores = CRITERIA['confidence'].score(single.float())[left].double()
        ordered, places = scores.sort(descending=True)
        num_leaving = int(share * len(left))
        thresholds.append(float(ordered[num_leaving - 1 : num_leaving + 1].mean()) if num_leaving else _NOBODY)
        left = left[places[num_leaving:]]
    return ExitPolicy('confidence', tuple(thresholds))


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a backbone: its children, and in place of a plain sequence of them theirs."""
    for child in module.children():
        if type(child).forward is nn.Sequential.forward or isinstance(child, nn.ModuleList):
            yield from _find_blocks(child)
        else:
            yield child


class InferenceBenchmark:
    """All ways to ask a model about one batch.

    Args:
        model: In eval mode, on the device that counts.
        images: The batch, [B, in_chans, H, W].
        bucket_sizes: Batch sizes that `infer` continues with, any if not given.

    Attributes:
        variants: Name -> variant, filled by the `add_*` methods.
        uncut: Exits that have no network cut by hand.
    """

    def __init__(self, model: MultiExitModel, images: Tensor, *, bucket_sizes: Sequence[int] | None = None):
        self.model, self.images, self.bucket_sizes = model, images, bucket_sizes
        self.plain = copy_plain(model)
        self.costs = model.cost(tuple(images.shape[1:]))
        self._stage_costs = StageCosts.from_exit_costs(self.costs)
        self.variants: dict[str, Variant] = {}
        self.uncut: list[int] = []
        self._infer = partial(model.infer, images, bucket_sizes=bucket_sizes)

    def add_fixed(self) -> None:
        """Add plain timm, and what runs the same computation for every image."""
        model, plain, images = self.model, self.plain, self.images
        *exits, main = self.costs
        self.variants[PLAIN] = Variant(lambda: plain(images), main.fixed.macs)
        self.variants[f'{PLAIN} again'] = Variant(lambda: plain(images), main.fixed.macs, {PLAIN: 1.0})
        self.variants['model(x)'] = Variant(lambda: model(images), main.fixed.macs, {PLAIN: 1.0})
        for idx, cost in enumerate(exits):
            name = f'cut by hand at exit {idx}'
            network = cut_by_hand(model, plain, idx, images[:2])
            against = {name: 1.0} if network else {}
            call = partial(model, images, exit_idx=idx)
            self.variants[f'exit_idx={idx}'] = Variant(call, cost.fixed.macs, against)
            if network:
                self.variants[name] = Variant(partial(network, images), cost.fixed.macs)
            else:
                self.uncut.append(idx)
        self.variants['exits=True'] = Variant(lambda: model(images, exits=True), main.sequential.macs)
        self.variants['anytime'] = Variant(lambda: list(model.anytime(images)), main.sequential.macs, {'exits=True': 1})

    @torch.inference_mode()
    def add_policies(self, shares: Sequence[float]) -> None:
        """Add `infer` with all images leaving at one exit, none leaving, and these shares of those that get there.

        A share is compared with what it should take: the time to each exit, of those that leave there. A batch too
        small for any image to leave is left out.

        Raises:
            StateError: Heads are so confident that no threshold keeps all images from leaving.
        """
        num_exits = len(self.model.exits)
        for idx in range(num_exits + 1):
            thresholds = [_EVERYBODY if at == idx else _NOBODY for at in range(num_exits)]
            policy = ExitPolicy('confidence', thresholds)
            if bool((self._infer(policy).exit_idx != idx).any()):
                raise StateError(
                    f'Some images have a confidence of 1 before exit {idx}, and no threshold keeps them in the batch.'
                    ' Benchmark another model, or another --exit-head.'
                )
            if idx < num_exits:
                self._add_policy(f'infer, all at exit {idx}', policy, {f'exit_idx={idx}': 1.0})
            else:
                self._add_policy(NONE_LEAVING, policy, {'exits=True': 1.0})
        for share, policy in self._policies(shares).items():
            self._add_share(share, policy)

    def _add_share(self, share: float, policy: ExitPolicy) -> None:
        names = [*(f'infer, all at exit {idx}' for idx in range(len(self.model.exits))), NONE_LEAVING]
        name = f'infer, {100 * share:g} % leaving'
        self._add_policy(name, policy, dict(zip(names, self._shares(self._infer(policy)))))
        self.variants[f'exits=True, then policy, {100 * share:g} %'] = Variant(
            lambda: apply_policy(policy, self.model(self.images, exits=True).logits),
            self.costs[-1].sequential.macs,
            {name: 1.0},
            self.variants[name].shares,
        )

    def _add_policy(
        self,
        name: str,
        policy: ExitPolicy,
        against: Mapping[str, float],
        infer: Callable[[ExitPolicy], Prediction] | None = None,
    ) -> None:
        call = partial(infer or self._infer, policy)
        prediction = call()
        macs = self._stage_costs.mean(policy, prediction.exit_idx)
        self.variants[name] = Variant(call, macs, against, self._shares(prediction))

    def _shares(self, prediction: Prediction) -> tuple[float, ...]:
        counts = prediction.exit_idx.bincount(minlength=len(self.costs))
        return tuple((counts / len(self.images)).tolist())

    @torch.inference_mode()
    def add_compiled(self, shares: Sequence[float]) -> None:
        """Add the compiled forms of plain timm, of the model's forward, and of `infer` with compiled blocks and heads.

        Every batch size is compiled by itself. Blocks continue with the bucket sizes, by default a half, a quarter and
        an eighth of the batch.
        """
        images, batch_size = self.images, len(self.images)
        # What other batches compiled is no longer needed, and all forms share one limit.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 256
        model, plain = (torch.compile(module, dynamic=False) for module in (self.model, self.plain))
        *exits, main = self.costs
        against = {f'{PLAIN}, compiled': 1.0}
        self.variants[f'{PLAIN}, compiled'] = Variant(lambda: plain(images), main.fixed.macs, {PLAIN: 1.0})
        self.variants['model(x), compiled'] = Variant(lambda: model(images), main.fixed.macs, against)
        for idx, cost in enumerate(exits):
            call = partial(model, images, exit_idx=idx)
            self.variants[f'exit_idx={idx}, compiled'] = Variant(call, cost.fixed.macs, against)
        call = partial(model, images, exits=True)
        self.variants['exits=True, compiled'] = Variant(call, main.sequential.macs, against)
        in_blocks = deepcopy(self.model)
        for block in (*_find_blocks(in_blocks.backbone), *in_blocks.exits):
            block.compile(dynamic=False)
        sizes = self.bucket_sizes or sorted({-(-batch_size // part) for part in (8, 4, 2, 1)})
        infer = partial(in_blocks.infer, images, bucket_sizes=sizes)
        nobody = ExitPolicy('confidence', (_NOBODY,) * len(exits))
        self._add_policy(f'{NONE_LEAVING}, compiled', nobody, against, infer)
        for share, policy in self._policies(shares).items():
            self._add_policy(f'infer, {100 * share:g} % leaving, compiled', policy, against, infer)

    def _policies(self, shares: Sequence[float]) -> dict[float, ExitPolicy]:
        logits = self.model(self.images, exits=True).logits
        return {share: force_policy(logits, share) for share in shares if int(share * len(self.images))}

    @torch.inference_mode()
    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Return a row for each variant, after so many rounds."""
        device = self.images.device
        times = time_interleaved({name: variant.call for name, variant in self.variants.items()}, rounds, device)
        rows = [self._describe(name, times) for name in self.variants]
        if device.type == 'cuda':
            for row in rows:
                row['MiB above weights'] = measure_peak(self.variants[row['call']].call)
        return rows

    def _describe(self, name: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        variant = self.variants[name]
        middle, high = np.percentile(times[name], (50, 95))
        ratio, spread = describe_ratios(times[name], times[PLAIN])
        row = {
            'call': name,
            'p50 ms': 1e3 * float(middle),
            'p95 ms': 1e3 * float(high),
            'img/s': len(self.images) / float(middle),
            'time ratio': ratio,
            'quartiles': spread,
            'MACs ratio': variant.macs / self.costs[-1].fixed.macs,
            'leaving, %': ' '.join(f'{100 * share:.3g}' for share in variant.shares) if variant.shares else None,
            'against': None,
            'its ratio': None,
            'ratio to it': None,
        }
        if variant.against:
            expected = sum(weight * np.array(times[other]) for other, weight in variant.against.items())
            row['against'] = 'expected' if len(variant.against) > 1 else next(iter(variant.against))
            row['its ratio'] = describe_ratios(expected, times[PLAIN])[0]
            row['ratio to it'] = describe_ratios(times[name], expected)[0]
        return row
