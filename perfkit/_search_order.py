"""Which chain recipe="auto" tries next: what was measured so far tells where to look."""

from __future__ import annotations

from collections.abc import Iterable

from perfkit._chain import Chain
from perfkit._recipe import Stage
from perfkit._report import Candidate

UNKNOWN = 1.0
"""The ratio expected of a recipe that nothing is known of yet: it changes nothing."""

SIMPLER_WITHIN = 0.98
"""A shorter chain is preferred if it reaches this share of the best ratio: the difference is not worth a recipe."""


class Agenda:
    """The chains that were not tried yet.

    A compiler takes seconds where other chains take a fraction of one, and often is what pays: chains with it and those
    without take turns by the time that each kind has used. Of a kind, single recipes come first, kernels before what
    comes earlier in a chain: the sooner a fast one is found, the less time goes to those far behind it. Then come the
    pairs of the best of them with each other one: what two give together may be far from what each gives, as with
    integers and the kernels for them, and chains of three would keep such a pair waiting. Then comes the chain that
    what was measured promises most of: the ratio of the largest part of it that was tried, times those of the rest by
    themselves; the lower one where there are two such parts. One recipe more has to be worth it, and what a chain is
    more than one recipe ahead of promises too much: gains overlap. A chain with a part that came to nothing comes last.
    """

    def __init__(self, chains: Iterable[Chain]):
        self.waiting = list(chains)
        self._ratios: dict[frozenset[str], float] = {}
        self._used_s = {True: 0.0, False: 0.0}

    def next(self) -> Chain:
        """Take one of those waiting."""
        turns = sorted(self._used_s, key=self._used_s.__getitem__)
        kind = next(turn for turn in turns if any(_compiles(chain) == turn for chain in self.waiting))
        chain = min((chain for chain in self.waiting if _compiles(chain) == kind), key=self._rank)
        self.waiting.remove(chain)
        return chain

    def tried(self, chain: Chain, candidate: Candidate, ratio: float | None) -> None:
        """Learn what became of a chain.

        Args:
            ratio: about how much faster than the original it is; None where it was not timed.
        """
        if ratio is not None:
            self._ratios[_parts(chain)] = ratio
        elif len(chain) > 1 or candidate.fidelity or candidate.outcome == "failed":
            self._ratios[_parts(chain)] = 0.0
        # else one recipe had no effect: with another it may have one
        self._used_s[_compiles(chain)] += candidate.seconds

    def _rank(self, chain: Chain) -> tuple:
        parts = _parts(chain)
        promise = self.expected(parts) * SIMPLER_WITHIN ** len(chain)
        beside_best = len(parts) == 2 and bool(parts & self._best_single())
        leaps = len(parts) - max(map(len, self._known(parts)), default=0) > 1
        return (
            len(chain) > 1,
            not promise,
            not beside_best,
            leaps,
            -promise,
            len(chain),
            -max(recipe.stage for recipe in chain),
            str(chain),
        )

    def expected(self, parts: frozenset[str]) -> float:
        """The ratio that recipes, by how they are written, promise together."""
        known = self._known(parts)
        if not known:
            return UNKNOWN
        most = max(map(len, known))
        return min(self._ratios[tried] * self._alone(parts - tried) for tried in known if len(tried) == most)

    def _best_single(self) -> frozenset[str]:
        singles = {tried: ratio for tried, ratio in self._ratios.items() if len(tried) == 1}
        return max(singles, key=singles.__getitem__, default=frozenset())

    def _known(self, parts: frozenset[str]) -> list[frozenset[str]]:
        """What was tried of them."""
        return [tried for tried in self._ratios if tried < parts]

    def _alone(self, parts: frozenset[str]) -> float:
        ratio = 1.0
        for part in parts:
            ratio *= self._ratios.get(frozenset({part}), UNKNOWN)
        return ratio


def _compiles(chain: Chain) -> bool:
    return any(recipe.stage == Stage.COMPILE for recipe in chain)


def _parts(chain: Chain) -> frozenset[str]:
    return frozenset(map(str, chain))
