"""How many tokens to draft: numbers in, a number out, no model in sight."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple

LENGTHS = (1, 2, 4, 8, 16)  # few, because a step is compiled for each: it takes one token more
RECENT = 16  # measurements that count, of each kind
PLAIN = ""  # the source of no draft
ENOUGH = 3  # measurements, for a round's time to be believed
MEMORY = 0.9  # what a round's acceptance is still worth a round later
WORTHWHILE = 1.03  # the gain that a draft must promise
ALLOWANCE = 1.8  # plain steps that may be lost to finding out, at the start...
SLACK = 0.02  # ...and the share of all time that may be, afterwards
PROBE_EVERY = 12  # tokens, at least, between two rounds that promise nothing
REFRESH_EVERY = 48  # rounds after which the plain step is measured again
REFRESH = 3  # steps that this takes


class Kind(NamedTuple):
    """Drafts that are accepted alike: a source and, perhaps, how sure it is.

    Attributes:
        source: what the costs depend on.
        certainty: what the acceptance depends on besides.
        acceptance: of each token, as a first guess.
        slope: what a drafted token costs, in plain steps, as a first guess.
    """

    source: str
    certainty: Hashable = None
    acceptance: float = 0.6
    slope: float = 0.2


class Costs:
    """Seconds of plain steps and of rounds: the lower quartile of the latest measurements.

    What else a machine does only ever adds to a measurement, so the low ones compare best. The
    first of every kind is left out: it includes what is done once in a process.
    """

    def __init__(self) -> None:
        self._measured: defaultdict[tuple[str, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT)
        )
        self._warm: set[tuple[str, int]] = set()
        self._lines: dict[tuple[str, int], list[tuple[int, float]]] = {}

    def add(self, source: str, length: int, seconds: float) -> None:
        """Note what a round with `length` drafted tokens of `source` took."""
        key = (source, length)
        if key in self._warm:
            self._measured[key].append(seconds)
            self._lines.clear()
        self._warm.add(key)

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, once enough have been measured."""
        line = self._line(PLAIN, ENOUGH)
        return line[0][1] if line else None

    def round(self, kind: Kind, length: int, enough: int = ENOUGH) -> float:
        """Seconds of a round that drafts `length` tokens and verifies them.

        Lengths measured less than `enough` times lie on the line between their neighbours, the
        plain step being the one of length 0; beyond the longest, the line goes on.
        """
        plain = self.plain
        assert plain is not None
        known = self._line(kind.source, enough)
        n0, t0 = 0, plain
        for n1, t1 in known:
            if length <= n1:
                return t0 + (t1 - t0) * (length - n0) / (n1 - n0)
            n0, t0 = n1, t1
        slope = kind.slope * plain
        if len(known) > 1:
            slope = (t0 - known[-2][1]) / (n0 - known[-2][0])
        return t0 + slope * (length - n0)

    def _line(self, source: str, enough: int) -> list[tuple[int, float]]:
        """Lengths, and seconds of a round; a shorter round takes no more than a longer one."""
        if (source, enough) not in self._lines:
            line: list[tuple[int, float]] = []
            for (name, n), seconds in sorted(self._measured.items(), reverse=True):
                if name == source and len(seconds) >= enough:
                    line.append((n, min([_low(seconds), *(t for _, t in line[-1:])])))
            self._lines[source, enough] = line[::-1]
        return self._lines[source, enough]


def _low(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


class Pace:
    """Chooses the next draft: of which kind, and how long; or none, a plain step.

    A draft of `n` tokens, each accepted with the probability `a`, gives
    `(1 - a**(n + 1)) / (1 - a)` tokens (arXiv 2211.17192, equation 1) in the time of a round. The
    length that promises most tokens a second is taken, if that is more than plain steps give.
    Where nothing promises anything a round is tried now and then. All of it keeps accounts: what
    rounds have lost, all in all, against plain steps, must stay within `ALLOWANCE` plain steps
    and the share `SLACK` of the time, else no round is made.
    """

    def __init__(self, longest: int = LENGTHS[-1], costs: Costs | None = None) -> None:
        self.lengths = (*(n for n in LENGTHS if n < longest), longest)
        self.costs = costs or Costs()
        self._accepted: defaultdict[tuple[str, Hashable], float] = defaultdict(float)
        self._tried: defaultdict[tuple[str, Hashable], float] = defaultdict(float)
        self._lost = 0.0  # plain steps' worth of time
        self._tokens = 0.0
        self._since_probe = PROBE_EVERY
        self._rounds = 0  # since plain steps were measured
        self._refresh = 0  # plain steps to measure now

    def acceptance(self, kind: Kind) -> float:
        """The probability that a drafted token is accepted, by the latest rounds."""
        weight = 3.0
        key = kind[:2]
        accepted = self._accepted[key] + weight * kind.acceptance
        return accepted / (self._tried[key] + weight)

    def choose(self, kinds: Sequence[Kind], longest: int) -> tuple[Kind, int] | None:
        """Of which kind to draft now and how many tokens, at most `longest`; None: none."""
        plain = self.costs.plain
        lengths = [n for n in self.lengths if n <= longest]
        if plain is None or self._refresh or not lengths or not kinds:
            return None

        def gain(choice: tuple[Kind, int]) -> float:
            kind, n = choice
            a = min(self.acceptance(kind), 0.99)
            return (1 - a ** (n + 1)) / (1 - a) * plain / self.costs.round(kind, n)

        best = max(product(kinds, lengths), key=gain)
        if gain(best) < WORTHWHILE and self._since_probe < PROBE_EVERY:
            return None
        at_risk = self.costs.round(*best) / plain - 1
        return best if self._lost + at_risk <= ALLOWANCE + SLACK * self._tokens else None

    def plain_step(self, seconds: float, in_time: bool = True) -> None:
        """A plain step has taken so long.

        One that wasn't begun `in_time`, while the one before it was computed, is longer: that is
        what waiting for a draft costs.
        """
        plain = self.costs.plain
        if in_time:
            self.costs.add(PLAIN, 0, seconds)
            self._rounds = 0
            self._refresh = max(self._refresh - 1, 0)
        elif plain is not None:
            self._lost += min(max(seconds / plain - 1, 0.0), 1.0)
        self._tokens += 1
        self._since_probe += 1

    def round(self, kind: Kind, length: int, accepted: int, seconds: float) -> None:
        """A round in which `accepted` of `length` drafted tokens held has taken so long."""
        key = kind[:2]
        self._accepted[key] = MEMORY * self._accepted[key] + accepted
        self._tried[key] = MEMORY * self._tried[key] + min(accepted + 1, length)
        self._tokens += accepted + 1
        self._since_probe = 0
        self._rounds += 1
        if self._rounds >= REFRESH_EVERY:
            self._refresh = REFRESH
        self.costs.add(kind.source, length, seconds)
        plain = self.costs.plain
        if plain is not None:
            usual = self.costs.round(kind, length)
            spent = min(self.costs.round(kind, length, enough=1), 3 * usual)
            lost = spent / plain - (accepted + 1)
            self._lost = max(self._lost + lost, -ALLOWANCE)
