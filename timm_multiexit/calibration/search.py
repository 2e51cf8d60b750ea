"""The search for thresholds on held-out samples: many policies at once, by the order of the scores alone.

A policy is here one cut per exit: how many of the exit's distinct scores leave, from the most eager one on; 0 where
the exit runs and nobody leaves, -1 where it is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_multiexit.calibration.stage_costs import StageCosts

_NUM_CUTS = 100  # candidates per exit; twice as many gained nothing on fresh samples

_NUM_PRICES = 40
_MAX_SWEEPS = 12
_MAX_ELEMENTS = 4_000_000  # of one [policies, samples] tensor; more policies are done in parts


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out samples as a search sees them: N samples, E exits and main.

    Attributes:
        ranks: [E, N] int64, the place of each score among the distinct scores of its exit; 0 is the most eager.
        correct: [E + 1, N] bool, whether each classifier answers right, main last.
        worth: [E + 1, N] float32, the probability of that: what the search looks at.
        costs: What leaving costs, of the E exits; the whole backbone costs 1.
        cuts: What the search tries, one rising int64 tensor [M] per exit.
        may_skip: Whether exits may be left out; not where that changes the scores of later ones.
    """

    ranks: Tensor
    correct: Tensor
    worth: Tensor
    costs: StageCosts
    cuts: tuple[Tensor, ...]
    may_skip: bool = True

    def outcome(self, policies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what policies [P, E] give.

        Returns:
            How many leave at each classifier [P, E + 1] and right answers [P], int64; and how many of those are
            expected by `worth` [P], float64.
        """
        parts = [self._outcome(part) for part in policies.split(self.part_size)]
        counts, right, expected = (torch.cat(part) for part in zip(*parts))
        return counts, right, expected

    def _outcome(self, policies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = torch.ones(len(policies), self.ranks.shape[1], dtype=torch.bool)  # [P, N]
        sums = []
        for idx, (correct, worth) in enumerate(zip(self.correct, self.worth)):
            leaves = here
            if idx < len(self.ranks):
                leaves = here & (self.ranks[idx] < policies[:, idx, None])
                here = here & ~leaves
            # One product is several times faster than sums; counts are exact up to 2^24 samples.
            sums.append(leaves.float() @ torch.stack([torch.ones_like(worth), correct.float(), worth], 1))  # [P, 3]
        counts, right, expected = torch.stack(sums).double().unbind(-1)  # [E + 1, P] each
        return counts.T.long(), right.sum(0).long(), expected.sum(0)

    def cost(self, policies: Tensor, counts: Tensor) -> Tensor:
        """Return the mean cost per sample, [P] float64, of policies [P, E] that leave with `counts` [P, E + 1]."""
        return self.costs.averages(policies >= 0, counts)

    @property
    def part_size(self) -> int:
        """How many policies are looked at together."""
        return max(1, _MAX_ELEMENTS // self.ranks.shape[1])

    def bins(self) -> list[Tensor]:
        """Return the first cut of each exit at which a sample leaves, [N] int64; M for none of them."""
        return [torch.bucketize(ranks, cuts, right=True) for ranks, cuts in zip(self.ranks, self.cuts)]

    def reached(self, policies: Tensor) -> list[Tensor]:
        """Return who reaches each exit under policies [P, E], one [P, N] bool tensor per exit."""
        reached = [torch.ones(len(policies), self.ranks.shape[1], dtype=torch.bool)]
        for idx in range(len(self.ranks) - 1):
            reached.append(reached[-1] & (self.ranks[idx] >= policies[:, idx, None]))
        return reached


def choose_cuts(ranks: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the cuts to try at an exit: the smallest and the largest allowed and quantiles between, [M] int64, rising.

    >>> choose_cuts(torch.tensor([2, 0, 1, 1]), lowest=1, highest=3)
    tensor([1, 2, 3])
    """
    places = torch.linspace(0, len(ranks) - 1, min(_NUM_CUTS, len(ranks)), dtype=torch.float64).round().long()
    cuts = ranks.sort().values[places] + 1
    return torch.cat([cuts, torch.tensor([lowest, highest])]).clamp(lowest, highest).unique()


def search(held_out: HeldOut, starts: Tensor) -> Tensor:
    """Return policies with good trade-offs, [P, E] int64, the `starts` [S, E] among them.

    For a range of prices of cost, coordinate ascent in the expected right answers less what they cost, first from the
    first start and the best one, then from the best of all that was found; in the end every policy that differs from
    a good one at one exit is looked at, to fill the gaps that a price cannot reach.
    """
    prices = torch.cat([torch.zeros(1), torch.logspace(-2.5, 1, _NUM_PRICES)])
    pool, begin = starts, starts[:1].expand(len(prices), -1)
    for _ in range(2):
        begin = torch.cat([begin, _best(held_out, pool, prices)])
        found = ascend(held_out, begin, prices.repeat(len(begin) // len(prices)))
        pool, begin = torch.cat([pool, found]).unique(dim=0), begin[:0]
    counts, _, expected = held_out.outcome(pool)
    good = pool[front(expected, held_out.cost(pool, counts))]
    others, expected, cost = neighbours(held_out, good)
    return torch.cat([starts, good, others[front(expected, cost)]]).unique(dim=0)


def _best(held_out: HeldOut, pool: Tensor, prices: Tensor) -> Tensor:
    """Return the policy of `pool` that is best at each price [L], [L, E]."""
    counts, _, expected = held_out.outcome(pool)
    net = expected / held_out.ranks.shape[1] - prices[:, None] * held_out.cost(pool, counts)
    return pool[net.argmax(1)]


def front(right: Tensor, cost: Tensor) -> Tensor:
    """Return the places of those that nothing as cheap equals in right answers, cheapest first.

    >>> front(torch.tensor([5, 7, 6, 7]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([0, 1])
    """
    order = right.argsort(descending=True, stable=True)
    order = order[cost[order].argsort(stable=True)]
    best = right[order].cummax(0).values
    return order[torch.cat([torch.ones(1, dtype=torch.bool), best[1:] > best[:-1]])]


def ascend(held_out: HeldOut, policies: Tensor, prices: Tensor) -> Tensor:
    """Return policies that no other cut of a single exit betters, [P, E] int64, starting from these.

    A price, [P] float32, is how many right answers one unit of cost is worth.
    """
    bins, parts = held_out.bins(), []
    for part, price in zip(policies.split(held_out.part_size), prices.split(held_out.part_size)):
        part, active = part.clone(), torch.arange(len(part))
        for _ in range(_MAX_SWEEPS):
            before = part[active]
            part[active] = after = _sweep(held_out, bins, before, price[active, None])
            active = active[(after != before).any(1)]
            if len(active) == 0:
                break
        parts.append(part)
    return torch.cat(parts)


def _sweep(held_out: HeldOut, bins: Sequence[Tensor], policies: Tensor, prices: Tensor) -> Tensor:
    """Take the best cut of each exit in turn, deep to shallow, the others held; prices [P, 1].

    Who reaches an exit leaves there or continues to an outcome that is known, so one cumulative sum of the difference,
    over samples by their scores, says what every cut is worth.
    """
    reached, chosen = held_out.reached(policies), []
    onward = held_out.worth[-1] - prices * held_out.costs.total  # [P, N], what staying is worth
    for idx in reversed(range(len(bins))):
        leaving = held_out.worth[idx] - prices * held_out.costs.paths[idx]  # [P, N]
        fee = prices * held_out.costs.heads[idx]  # [P, 1]
        gains = _sum_bins((leaving - onward) * reached[idx], bins[idx], len(held_out.cuts[idx]))  # [P, M]
        gain, best = (gains - fee * reached[idx].sum(1, keepdim=True)).max(1, keepdim=True)  # [P, 1]
        cut = held_out.cuts[idx][best]
        if held_out.may_skip:
            cut = torch.where(gain > 0, cut, -1)
        onward = torch.where(held_out.ranks[idx] < cut, leaving, onward) - fee * (cut >= 0)
        chosen.append(cut)
    return torch.cat(chosen[::-1], 1)


def _sum_bins(values: Tensor, bins: Tensor, num_cuts: int) -> Tensor:
    """Return the sum of the values [P, N] of those who leave at each cut, [P, M]."""
    sums = values.new_zeros(len(values), num_cuts + 1)
    return sums.scatter_add_(1, bins.expand_as(values), values).cumsum(1)[:, :num_cuts]


def neighbours(held_out: HeldOut, policies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all policies that differ from one of these [P, E] at one exit, found as in `ascend`.

    The policies are [Q, E]; with them come expected right answers [Q] and mean cost per sample [Q], float64.
    """
    parts = [_neighbours(held_out, part) for part in policies.split(held_out.part_size)]
    others, expected, cost = (torch.cat(part) for part in zip(*parts))
    return others, expected, cost


def _neighbours(held_out: HeldOut, policies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bins, reached, found = held_out.bins(), held_out.reached(policies), []
    onward = held_out.worth[-1].expand(len(policies), -1)  # [P, N], right answers of staying
    spent = torch.full_like(onward, held_out.costs.total)  # [P, N], its cost
    for idx, cuts in reversed(list(enumerate(held_out.cuts))):
        path, head, cut = held_out.costs.paths[idx], held_out.costs.heads[idx], policies[:, idx, None]
        skipped, others = policies.clone(), policies.repeat_interleave(len(cuts), 0)
        skipped[:, idx], others[:, idx] = -1, cuts.repeat(len(policies))
        counts, _, expected = held_out.outcome(skipped)
        cost = held_out.cost(skipped, counts)
        more = _sum_bins((held_out.worth[idx] - onward) * reached[idx], bins[idx], len(cuts))  # [P, M]
        saved = _sum_bins((spent - path) * reached[idx], bins[idx], len(cuts))  # [P, M]
        dearer = (head * reached[idx].sum(1, keepdim=True) - saved) / onward.shape[1]
        found.append((others, (expected[:, None] + more).flatten(), (cost[:, None] + dearer).flatten()))
        if held_out.may_skip:
            found.append((skipped, expected, cost))
        leaves = held_out.ranks[idx] < cut
        onward = torch.where(leaves, held_out.worth[idx], onward)
        spent = torch.where(leaves, path, spent) + head * (cut >= 0)
    others, expected, cost = (torch.cat(part) for part in zip(*found))
    return others, expected, cost
