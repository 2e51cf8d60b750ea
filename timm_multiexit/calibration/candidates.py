"""From held-out logits to what the threshold search works on, and back to policies.

Thresholds that are chosen by counting right answers overfit: with 500 samples they were up to 0.5 points worse on
fresh ones than the field's solver, which does not look at answers. So the search looks at the probability that an
answer is right, by a ridge logistic regression on the confidences of all classifiers; counts decide what is reported.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from timm_multiexit.calibration.search import HeldOut, choose_cuts, search
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.policies.leaving import walk
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy

_RIDGE = 20.0  # as if so many samples spoke against another classifier's confidence
_ALL_SETS = 4  # exits up to which all sets of them are tried
_RELUCTANCE = 0.01  # right answers that a policy without temperatures must be ahead, so that it wins no tie


def rank_scores(eagerness: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of [N], largest first, and each sample's place among them, [N] int64."""
    values, ranks = (-eagerness).unique(return_inverse=True)
    return -values, ranks


def split_geometrically(ranks: Tensor) -> Tensor:
    """Return the cuts of the field's 39 policies, [39, E] int64, -1 for an exit not used; ranks as in `HeldOut`.

    Source: see `timm_multiexit.calibration.thresholds.solve_budgeted_batch`.
    """
    num_exits, num = ranks.shape
    shares = torch.tensor([[(p / 20) ** k for k in range(1, num_exits + 2)] for p in range(1, 40)], dtype=torch.float64)
    wanted = (num * (shares / shares.sum(1, keepdim=True))).floor().long()  # [39, E + 1]
    here, cuts = torch.ones(len(wanted), num, dtype=torch.bool), []
    for idx, rank in enumerate(ranks):
        order = rank.argsort()
        seen = here[:, order].cumsum(1)  # [39, N], how many that have not left are as eager
        want = wanted[:, idx, None]
        last = (seen < want).sum(1, keepdim=True)
        reachable = (want > 0) & (last < num)
        cut = torch.where(reachable, rank[order][last.clamp(max=num - 1)] + 1, -1)
        here &= rank >= cut
        cuts.append(cut)
    return torch.cat(cuts, 1)


def list_used_sets(policy: ExitPolicy) -> list[tuple[int, ...]]:
    """Return the sets of exits that a search tries one by one.

    One set of all where the search itself may leave exits out: where an exit's scores do not depend on the others.
    Else all sets of up to four exits; of more, the first ones, the last ones, all but one, and every second one.

    >>> list_used_sets(ExitPolicy('confidence', (None, None), combine='mean'))
    [(), (0,), (1,), (0, 1)]
    """
    num_exits = len(policy.thresholds)
    every = tuple(range(num_exits))
    if policy.is_memoryless:
        return [every]
    if num_exits <= _ALL_SETS:
        return [used for size in range(num_exits + 1) for used in combinations(every, size)]
    sets = {part for idx in range(num_exits + 1) for part in (every[:idx], every[idx:])}
    sets |= {every[:idx] + every[idx + 1 :] for idx in every} | {every[::2], every[1::2]}
    return sorted(sets, key=lambda used: (len(used), used))


class Candidates:
    """The policies that use one set of exits, on held-out samples: logits [N, C] per classifier, targets [N] int64.

    Of `base` the thresholds do not matter. `worth`, a [U + 1, N] float tensor, is the probability that each classifier
    is right if that is known; with `is_bare` the field's policies are all there are.
    """

    def __init__(
        self,
        base: ExitPolicy,
        used: tuple[int, ...],
        logits: Sequence[Tensor],
        targets: Tensor,
        *,
        worth: Tensor | None = None,
        is_bare: bool = False,
    ):
        self.used, self.num_exits, self.is_bare = used, len(logits) - 1, is_bare
        self.base = replace(base, thresholds=tuple(1.0 if idx in used else None for idx in range(self.num_exits)))
        self.sign = 1.0 if CRITERIA[base.criterion].leaves_at_least else -1.0
        correct, odds, ranks = [], [], [targets.new_zeros(0, len(targets))]
        self.thresholds, cuts = [], []
        for place, (_, answer, score) in enumerate(walk(self.base, logits)):
            confidence = answer.softmax(-1).amax(-1)
            correct.append(answer.argmax(-1) == targets)  # as a policy answers, also where probabilities round to ties
            odds.append(confidence.double().logit(eps=1e-6))
            if score is not None:
                values, rank = rank_scores(self.sign * score)
                thresholds, lowest, highest = self._make_thresholds(values, place)
                cuts.append(choose_cuts(rank, lowest, highest))
                self.thresholds.append(thresholds)
                ranks.append(rank[None])
        self.correct = torch.stack(correct)
        self.worth = _expect(torch.stack(odds, 1), self.correct) if worth is None else worth
        self.ranks, self.cuts = torch.cat(ranks), tuple(cuts)
        self.lowest = torch.tensor([-1 if base.is_memoryless else int(each[0]) for each in cuts], dtype=torch.int64)

    def without_temperatures(self, logits: Sequence[Tensor], targets: Tensor) -> 'Candidates':
        """Return the field's policies alone, on logits as they are; arguments as above."""
        base = replace(self.base, temperatures=())
        # What an exit answers alone, and so how often it is right, does not depend on its temperature.
        worth = self.worth if base.combine is None else None
        return Candidates(base, self.used, logits, targets, worth=worth, is_bare=True)

    def _make_thresholds(self, values: Tensor, place: int) -> tuple[Tensor, int, int]:
        """Return the threshold of every cut of an exit, and the smallest and the largest cut that are allowed.

        The values are its distinct scores [D] times the sign, the most eager first; the place is among the used exits.
        """
        if self.base.criterion == 'patience':
            nobody, everybody = place + 1.0, 1.0
            between = values[:-1]
        else:
            nobody, everybody = (1.0, 0.0) if self.sign > 0 else (0.0, -1.0)
            # Halfway, for a score that a last bit has changed; the upper one where no number lies between.
            middle = (values[:-1] + values[1:]) / 2
            between = torch.where(middle > values[1:], middle, values[:-1])
        highest = int((values >= everybody).sum())
        lowest = int((values >= nobody).any() or self.base.is_memoryless)
        edges = [values.new_tensor([nobody]), between[: max(highest - 1, 0)], values.new_tensor([everybody])]
        return torch.cat(edges)[: highest + 1], min(lowest, highest), highest

    def search(self, costs: StageCosts) -> tuple[Tensor, ...]:
        """Return the policies that were found for costs of one unit.

        Returns:
            Cuts [P, U]; how many leave at each classifier [P, E + 1]; right answers [P]; those expected [P]; mean cost
            as a share of main's cost [P]; which ones are the field's [P].
        """
        shares = costs.relative(self.used)
        held_out = HeldOut(self.ranks, self.correct, self.worth, shares, self.cuts, self.base.is_memoryless)
        field = self._field_cuts()
        if self.is_bare:
            pool = field
        elif self.used:
            pool = torch.cat([field, search(held_out, torch.cat([self.lowest[None], field]))])
        else:
            pool = field.new_zeros(1, 0)
        used_counts, right, expected = held_out.outcome(pool)
        expected = expected - _RELUCTANCE * self.is_bare
        counts = used_counts.new_zeros(len(pool), self.num_exits + 1)
        counts[:, [*self.used, self.num_exits]] = used_counts
        is_field = torch.arange(len(pool)) < len(field)
        return pool, counts, right, expected, held_out.cost(pool, used_counts), is_field

    def _field_cuts(self) -> Tensor:
        """Return the field's policies as cuts [39, U], none where this set does not stand for it."""
        if self.base.criterion == 'patience' or len(self.used) < self.num_exits:
            return torch.zeros(0, len(self.used), dtype=torch.int64)
        cuts = split_geometrically(self.ranks)
        return cuts.clamp(min=self.lowest, max=torch.tensor([int(each[-1]) for each in self.cuts]))

    def to_policy(self, cuts: Tensor) -> ExitPolicy:
        """Return the policy of some cuts [U]."""
        thresholds: list[float | None] = [None] * self.num_exits
        for idx, cut, table in zip(self.used, cuts.tolist(), self.thresholds):
            if cut >= 0:
                thresholds[idx] = abs(float(table[cut]))
        return replace(self.base, thresholds=tuple(thresholds))


def _expect(odds: Tensor, correct: Tensor) -> Tensor:
    """Return the probability that each classifier is right on each sample, [K, N] float32.

    The odds are the log-odds of each classifier's confidence, [N, K] float64; `correct` is [K, N] bool.
    """
    odds = (odds - odds.mean(0)) / odds.std(0, correction=0).clamp(min=1e-6)
    features = torch.cat([odds, torch.ones_like(odds[:, :1])], 1)  # [N, K + 1]
    return torch.stack([_fit_logistic(features, right.double(), own) for own, right in enumerate(correct)]).float()


def _fit_logistic(features: Tensor, targets: Tensor, own: int) -> Tensor:
    """Return the fitted probabilities [N] of a ridge logistic regression; feature `own` is hardly held back."""
    ridge = torch.full_like(features[0], _RIDGE)
    ridge[own], ridge[-1] = 1.0, 0.01
    weights = torch.zeros_like(ridge)
    for _ in range(15):
        probs = (features @ weights).sigmoid()
        slope = features.T @ (targets - probs) - ridge * weights
        curve = (features.T * (probs * (1 - probs))) @ features + ridge.diag()
        step = torch.linalg.solve(curve, slope)
        reach = float((features @ step).abs().max())
        weights = weights + step * min(1.0, 4.0 / max(reach, 1e-12))  # a full step may overshoot
        if reach < 1e-4:
            break
    return (features @ weights).sigmoid()
