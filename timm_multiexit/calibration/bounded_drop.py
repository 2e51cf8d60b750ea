"""Risk control: how far a policy may be from main, with a probability that is guaranteed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timm_multiexit.calibration.meter import PolicyMeter
from timm_multiexit.policies.leaving import walk
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy


def find_path(policies: Sequence[ExitPolicy], logits: Sequence[Tensor]) -> list[ExitPolicy]:
    """Return a path from careful to cheap: policies before the first of these, then these.

    The most accurate policy on some samples may leave early already. Before it come those by which only the surest
    eighth, two eighths, ... of the samples leave that leave by it at each exit.

    The policies come dearest first, the logits are of the samples that they were found on.
    """
    policies = [policy for policy in policies if policy.used]
    if not policies or policies[0].criterion == 'patience':
        return policies
    sign = 1 if CRITERIA[policies[0].criterion].leaves_at_least else -1
    scores = [
        (idx, sign * score[policies[0].leaves(idx, score)])
        for idx, _, score in walk(policies[0], logits)
        if score is not None
    ]
    path = []
    for eighths in range(1, 8):
        thresholds = list(policies[0].thresholds)
        for idx, leaving in scores:
            if len(leaving):
                thresholds[idx] = sign * float(leaving.double().quantile(1 - eighths / 8))
        path.append(replace(policies[0], thresholds=tuple(thresholds)))
    return path + policies


def measure_drops(
    path: Sequence[ExitPolicy], chosen_on: PolicyMeter, tested_on: PolicyMeter
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each policy its losses on the tested samples and on those it was chosen on, for `last_safe`."""
    for policy in path:
        main = ExitPolicy(thresholds=(None,) * len(policy.thresholds))
        tested, past = (drop_losses(meter.is_right(policy), meter.is_right(main)) for meter in (tested_on, chosen_on))
        yield tested, past


_BOLDNESS = 0.9  # share of the largest bet; at 1 a single loss could end the game


def p_value(losses: Tensor, limit: float, *, past: Tensor, delta: float = 0.1) -> float:
    """Return a p-value of the claim that the mean loss is `limit` or more; small where it is less.

    A gambler starts with a wealth of 1 and stakes on each sample that its loss is below the limit: the wealth is
    multiplied by 1 + bet * (limit - loss), where the bet, from 0 to 0.9 / (1 - limit), was chosen before the sample
    was seen. The wealth never gets negative, and if the mean is the limit or more it falls in expectation at every
    step, whatever the bets: a nonnegative supermartingale. By Ville's inequality it then ever reaches 1 / p with
    probability p at most, so 1 / (largest wealth) is a p-value. The bets matter for power alone; they are those of
    the source, for the variance of all losses seen before.

    Args:
        losses: [N] float tensor in [0, 1], independent samples of one distribution, in an order that does not depend
            on them.
        limit: The mean loss that is claimed, in (0, 1).
        past: [M] float tensor, losses that were seen before and are independent of `losses`; they shape the bets.
        delta: Level the bets aim at, in (0, 1).

    Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2023, arXiv 2010.09686,
        section 4 (capital process, one-sided) and equation 26 (bets); ours start from `past` instead of 1/4 and 1/2.

    >>> zeros = torch.zeros(5)
    >>> round(p_value(zeros, limit=0.5, past=torch.tensor([0.0, 1.0])), 4)  # (1 + 0.9 / 0.5 * 0.5) ** -5
    0.0404
    """
    num, losses, past = len(losses), losses.double(), past.double()
    seen = torch.cat([past, losses])
    count = torch.arange(len(past), len(seen), dtype=torch.float64)  # before each sample
    sums, squares = (torch.cat([each.new_zeros(1), each.cumsum(0)])[len(past) : -1] for each in (seen, seen**2))
    # One loss of each kind is added, so that equal losses have a variance too.
    mean = (sums + 1) / (count + 2)
    variance = (squares + 1) / (count + 2) - mean**2
    bets = (2 * math.log(1 / delta) / (num * variance)).sqrt().clamp(max=_BOLDNESS / (1 - limit))
    wealth = torch.log1p(bets * (limit - losses)).cumsum(0)
    return math.exp(-max(0.0, float(wealth.max())))


def drop_losses(correct: Tensor, reference: Tensor) -> Tensor:
    """Return losses in [0, 1] whose mean is (1 + drop in accuracy) / 2, of whether policy and main are right [N]."""
    return (1 + reference.double() - correct.double()) / 2


def last_safe(drops: Iterable[tuple[Tensor, Tensor]], max_drop: float, delta: float) -> int:
    """Return the place of the last policy on a path up to which every one passes the test; -1 if the first fails.

    The policies are tested one after the other, each at the full level `delta`, until the first failure. A wrong
    answer needs the first policy on the path whose true drop is above `max_drop` to pass, which happens with
    probability `delta` at most: so with probability 1 - delta over the tested samples, the drop of the returned
    policy is `max_drop` at most. This holds for any path that was chosen without the tested samples.

    Args:
        drops: For each policy the losses (`drop_losses`) of the tested samples [N], in random order, and of others
            [M] that the path was chosen on.
        max_drop: How much less accurate than main the policy may be, a share in (0, 1).
        delta: Probability that it is worse, in (0, 1).

    Source: fixed sequence testing in Angelopoulos et al., Learn then Test, 2021, arXiv 2110.01052, section 2.3; a path
        of good trade-offs from one part of the data and the tests on the other: Laufer-Goldshtein et al., Pareto
        Testing, 2022, arXiv 2210.07913.
    """
    place = -1
    for idx, (losses, past) in enumerate(drops):
        if p_value(losses, (1 + max_drop) / 2, past=past, delta=delta) > delta:
            break
        place = idx
    return place
