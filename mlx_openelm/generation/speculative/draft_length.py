"""Chooses how many tokens to draft, from measured times and acceptance rates."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

LENGTHS = (1, 2, 4, 8, 16)  # few, because a step is compiled for each: it takes one token more
RECENT = 8  # measurements that count, of each kind
PLAIN, WAITING = "plain", "waiting"  # sources of no draft
ENOUGH = 3  # measurements, for a round's time to be believed
MEMORY = 0.9  # what a round's acceptance is still worth a round later
WORTHWHILE = 1.03  # the gain that a draft must promise
ALLOWANCE = 1.1  # plain steps that may be lost to finding out, at the start...
RISK = 2.5  # ...or to what promises a gain; twice that to what promises to double the speed...
SLACK = 0.01  # ...and the share of all time that may be, afterwards
BUILT = 1.0  # plain steps that a round may be said to have lost which was slow to be built
CREDIT = 10.0  # plain steps gained that may be lost again
LOOK_EVERY = 8  # tokens after which plain steps may change what is chosen
PROBE_EVERY = 12  # tokens, at least, between two rounds that promise nothing
REFRESH_EVERY = 8  # rounds after which the plain step is measured again; more where much is gained
FORGET_EVERY = 24  # measurements after which the other lengths each lose their oldest one
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

    What else a machine does only ever adds to a measurement, so the low ones compare best.

    Attributes:
        accepted, tried: drafted tokens by kind, the latest with the most weight.
        owed: plain steps that rounds have lost, in all texts, beyond what they may.
    """

    def __init__(self) -> None:
        self._measured: defaultdict[tuple[str, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT)
        )
        self.accepted: defaultdict[tuple[str, Hashable], float] = defaultdict(float)
        self.tried: defaultdict[tuple[str, Hashable], float] = defaultdict(float)
        self.owed = 0.0
        self._added = 0
        self._lines: dict[str, list[tuple[int, float]]] = {}

    def add(self, source: str, length: int, seconds: float) -> None:
        """Note what a round with `length` drafted tokens of `source` took."""
        key = (source, length)
        self._measured[key].append(seconds)
        self._lines.pop(source, None)
        self._added += 1
        if self._added >= FORGET_EVERY:
            self._added = 0
            for other, measured in self._measured.items():
                if other != key and other[0] == source and measured:
                    measured.popleft()

    @property
    def known(self) -> bool:
        """Whether enough plain steps have been measured."""
        return len(self._measured[PLAIN, 0]) >= ENOUGH

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, once enough have been measured."""
        line = self._line(PLAIN)
        return line[0][1] if line else None

    @property
    def waiting(self) -> float | None:
        """Seconds of a plain step that wasn't begun in time, once enough have been measured."""
        line = self._line(WAITING)
        return line[0][1] if line else None

    def round(self, kind: Kind, length: int) -> float:
        """Seconds of a round that drafts `length` tokens and verifies them.

        Lengths not measured often enough lie on the line between their neighbours, the
        plain step being the one of length 0; beyond the longest, the line goes on.
        """
        plain = self.plain
        assert plain is not None
        known = self._line(kind.source)
        n0, t0 = 0, plain
        for n1, t1 in known:
            if length <= n1:
                return t0 + (t1 - t0) * (length - n0) / (n1 - n0)
            n0, t0 = n1, t1
        slope = kind.slope * plain
        if len(known) > 1:
            slope = (t0 - known[-2][1]) / (n0 - known[-2][0])
        return t0 + slope * (length - n0)

    def _line(self, source: str) -> list[tuple[int, float]]:
        """Lengths, and seconds of a round; a shorter round takes no more than a longer one."""
        if source not in self._lines:
            line: list[tuple[int, float]] = []
            for (name, n), seconds in sorted(self._measured.items(), reverse=True):
                if name == source and len(seconds) >= ENOUGH:
                    line.append((n, min([_low(seconds), *(t for _, t in line[-1:])])))
            self._lines[source] = line[::-1]
        return self._lines[source]


def _low(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


class Pace:
    """Chooses the next draft: of which kind, and how long; or none, a plain step.

    A draft of `n` tokens, each accepted with the probability `a`, gives
    `(1 - a**(n + 1)) / (1 - a)` tokens (arXiv 2211.17192, equation 1) in the time of a round. The
    length that promises most tokens a second is taken, if that is more than plain steps give.
    Where nothing promises anything a round is tried now and then. All of it keeps accounts: what
    rounds have lost, all in all, against plain steps, must stay within `ALLOWANCE` (or `RISK`)
    plain steps and the share `SLACK` of the time, else no round is made. Rounds that promise
    nothing have to make good what was lost in earlier texts, too. Plain steps are measured
    between rounds: a machine's speed changes, and the less is gained the sooner that turns it.
    """

    def __init__(self, longest: int = LENGTHS[-1], costs: Costs | None = None) -> None:
        self.lengths = (*(n for n in LENGTHS if n < longest), longest)
        self.costs = costs or Costs()
        self._promised: dict[Kind, list[tuple[int, float, float]]] = {}
        self._outdated = 0.0
        self._lost = 0.0  # plain steps' worth of time
        self._owed = self.costs.owed  # from before this text
        self._tokens = 0.0
        self._since_probe = 0
        self._gain = 1.0  # what the latest draft promised
        self._rounds = 0  # since plain steps were measured
        self._refresh = 0  # plain steps to measure now

    def acceptance(self, kind: Kind) -> float:
        """The probability that a drafted token is accepted, by the latest rounds."""
        weight = 3.0
        key = kind[:2]
        accepted = self.costs.accepted[key] + weight * kind.acceptance
        return accepted / (self.costs.tried[key] + weight)

    def choose(self, kinds: Sequence[Kind], longest: int) -> tuple[Kind, int] | None:
        """Of which kind to draft now and how many tokens, at most `longest`; None: none."""
        if self._refresh or longest < 1 or not self.costs.known:
            return None
        left = SLACK * self._tokens - self._lost
        best, most = None, WORTHWHILE if self._since_probe < PROBE_EVERY else 0.0
        for kind in kinds:
            for n, steps, gain in self._promises(kind):
                allowed = left + self._risk(gain)
                # At worst it gives one token.
                if gain > most and n <= longest and steps - 1 <= allowed:
                    best, most = (kind, n), gain
        if best:
            self._gain = max(most, 1.0)
        return best

    def _risk(self, gain: float) -> float:
        """Plain steps that may be lost to what promises such a gain."""
        if gain <= WORTHWHILE:
            return ALLOWANCE - self._owed
        return RISK if gain < 2 else 2 * RISK

    def _promises(self, kind: Kind) -> list[tuple[int, float, float]]:
        """Of each length: what it costs in plain steps, and the tokens it gives for each."""
        if self._tokens >= self._outdated:
            self._promised.clear()
            self._outdated = self._tokens + LOOK_EVERY
        if kind not in self._promised:
            plain = self.costs.plain
            assert plain is not None
            a = min(self.acceptance(kind), 0.99)
            self._promised[kind] = [
                (n, steps, (1 - a ** (n + 1)) / (1 - a) / steps)
                for n in self.lengths
                for steps in [self.costs.round(kind, n) / plain]
            ]
        return self._promised[kind]

    def plain_step(self, seconds: float, in_time: bool = True, built: bool = False) -> None:
        """A plain step has taken so long.

        One that wasn't begun `in_time`, while the one before it was computed, is longer: that is
        what waiting for a draft costs. `built`: a step was traced meanwhile, or run uncompiled,
        which won't be necessary the next time.
        """
        if not built:
            self.costs.add(PLAIN if in_time else WAITING, 0, seconds)
        if in_time:
            self._rounds = 0
            self._refresh = max(self._refresh - 1, 0)
        elif (plain := self.costs.plain) and (waiting := self.costs.waiting):
            self._lost += max(waiting / plain - 1, 0.0)
        self._tokens += 1
        self._since_probe += 1
        self._settle()

    def round(
        self, kind: Kind, length: int, accepted: int, seconds: float, built: bool = False
    ) -> None:
        """A round in which `accepted` of `length` drafted tokens held has taken so long."""
        key = kind[:2]
        self.costs.accepted[key] = MEMORY * self.costs.accepted[key] + accepted
        self.costs.tried[key] = MEMORY * self.costs.tried[key] + min(accepted + 1, length)
        self._tokens += accepted + 1
        self._since_probe = 0
        self._outdated = 0.0
        self._rounds += 1
        if self._rounds >= REFRESH_EVERY * self._gain**2:
            self._refresh = REFRESH
        if not built:
            self.costs.add(kind.source, length, seconds)
        plain = self.costs.plain
        if plain is not None:
            # What a draft model takes to catch up counts, an interruption from outside doesn't.
            spent = seconds if built else min(seconds, 4 * self.costs.round(kind, length))
            lost = spent / plain - (accepted + 1)
            self._lost = max(self._lost + (min(lost, BUILT) if built else lost), -CREDIT)
        self._settle()

    def _settle(self) -> None:
        self.costs.owed = max(self._owed + self._lost - SLACK * self._tokens, 0.0)
