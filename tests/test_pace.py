"""The length of drafts, with made-up costs and acceptance: numbers only, and no clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from statistics import mean

import pytest

from mlx_openelm.generation.speculative.draft_length import (
    ENOUGH,
    LENGTHS,
    PLAIN,
    Costs,
    Kind,
    Pace,
)

KIND = Kind("model")
COSTS = [(0.2, 0.2), (0.1, 0.05), (0.5, 0.3)]  # of verifying, and of each drafted token


class Simulation:
    """Generation in which a plain step takes `plain`, not begun in time 1.08 times that.

    Args:
        acceptance: of a drafted token, by how many tokens there are.
        verifying, drafting: what a round takes beyond 1, and a drafted token more.
        noise: standard deviation of the logarithm of what is measured.
    """

    def __init__(
        self,
        acceptance: Callable[[int], float],
        verifying: float,
        drafting: float,
        noise: float = 0.0,
        seed: int = 0,
        costs: Costs | None = None,
    ) -> None:
        self.acceptance, self.verifying, self.drafting = acceptance, verifying, drafting
        self.noise, self.random = noise, random.Random(seed)
        self.pace, self.plain = Pace(costs=costs), 1.0
        self.tokens, self.time, self.in_time = 0, 0.0, True
        self.rounds: list[tuple[int, int]] = []  # tokens there were, tokens drafted
        self.plain_steps: list[int] = []  # tokens there were

    def run(self, tokens: int) -> Simulation:
        end = self.tokens + tokens
        while self.tokens < end:
            choice = self.pace.choose([KIND], min(16, end - self.tokens - 1))
            if choice is None:
                seconds = self.plain * (1.0 if self.in_time else 1.08)
                self.pace.plain_step(self.measured(seconds), self.in_time)
                self.plain_steps.append(self.tokens)
                made, self.in_time = 1, True
            else:
                kind, length = choice
                accepted = 0
                while accepted < length and self.random.random() < self.acceptance(self.tokens):
                    accepted += 1
                seconds = 1 + self.verifying + self.drafting * length
                self.pace.round(kind, length, accepted, self.measured(seconds))
                self.rounds.append((self.tokens, length))
                made, self.in_time = accepted + 1, False
            self.tokens += made
            self.time += seconds
        return self

    def measured(self, seconds: float) -> float:
        return seconds * self.random.lognormvariate(0, self.noise)

    @property
    def ratio(self) -> float:
        """Time over that of plain steps."""
        return self.time / self.tokens


def best(a: float, verifying: float, drafting: float) -> float:
    """The least ratio that any fixed length gives, plain steps included."""
    tokens = {n: (1 - a ** (n + 1)) / (1 - a) for n in LENGTHS}
    return min(1.0, *((1 + verifying + drafting * n) / tokens[n] for n in LENGTHS))


@pytest.mark.parametrize(("verifying", "drafting"), COSTS)
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_no_text_takes_5_percent_more_than_without_drafts(
    acceptance: float, verifying: float, drafting: float
) -> None:
    for seed in range(8):
        for tokens in (128, 400):
            simulation = Simulation(lambda _: acceptance, verifying, drafting, seed=seed)
            assert simulation.run(tokens).ratio <= 1.05


@pytest.mark.parametrize(("verifying", "drafting"), COSTS)
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_the_length_comes_close_to_the_best_there_is(
    acceptance: float, verifying: float, drafting: float
) -> None:
    ratios = [
        Simulation(lambda _: acceptance, verifying, drafting, seed=seed).run(600).ratio
        for seed in range(10)
    ]
    least = best(acceptance, verifying, drafting)
    assert mean(ratios) < least + 0.08


def test_a_plain_step_that_has_become_cheaper_is_noticed_soon() -> None:
    simulation = Simulation(lambda _: 0.7, 0.2, 0.2).run(300)
    assert simulation.ratio < 0.95
    tokens, before = simulation.tokens, simulation.time
    simulation.plain = 0.5
    simulation.run(256)
    assert (simulation.time - before) / (0.5 * (simulation.tokens - tokens)) < 1.1


@pytest.mark.parametrize("acceptance", [0.0, 0.8])
def test_noise_of_the_measurements_costs_little(acceptance: float) -> None:
    ratios = [
        Simulation(lambda _: acceptance, 0.2, 0.2, noise=0.2, seed=seed).run(400).ratio
        for seed in range(40)
    ]
    assert mean(ratios) < best(acceptance, 0.2, 0.2) + 0.12
    assert max(ratios) < 1.12


def test_drafts_that_lose_are_tried_again_seldom_and_taken_up_when_they_win() -> None:
    simulation = Simulation(lambda token: 0.0 if token < 600 else 0.95, 0.2, 0.1).run(600)
    tried = len(simulation.rounds)
    assert 4 <= tried <= 40
    simulation.run(300)
    later = [(token, length) for token, length in simulation.rounds if token >= 600]
    assert any(length >= 8 for token, length in later if token < 700)
    assert simulation.ratio < 0.9


def test_what_was_measured_before_saves_trying() -> None:
    costs = Costs()
    first = Simulation(lambda _: 0.5, 0.8, 0.5, costs=costs).run(128)
    second = Simulation(lambda _: 0.5, 0.8, 0.5, costs=costs).run(128)
    assert len(second.rounds) < len(first.rounds)
    assert second.ratio < 1.05


def test_texts_that_lose_are_tried_in_turns_and_keep_nothing_from_one_that_wins() -> None:
    costs = Costs()
    texts = [Simulation(lambda _: 0.3, 0.9, 0.5, costs=costs, seed=n).run(128) for n in range(12)]
    assert mean(text.ratio for text in texts[1:]) < 1.02
    assert sum(bool(text.rounds) for text in texts[1:]) > 1
    pace = Pace(costs=costs)
    repeats = Kind("lookup", 8, 0.95, 0.05)
    assert pace.choose([KIND, repeats], 16) == (repeats, 16)


def test_steps_that_are_built_in_a_round_count_neither_as_its_cost_nor_in_full_as_lost() -> None:
    def after(rounds: int, built: bool) -> Pace:
        pace = Pace()
        for _ in range(9):
            pace.plain_step(1.0)
        for _ in range(rounds):
            pace.round(sure, 4, 4, 20.0, built)
        return pace

    sure = Kind("lookup", 8, 0.95, 0.05)
    pace = after(2, built=True)
    assert pace.costs.round(sure, 4) < 2
    assert pace.choose([sure], 16) is not None
    assert after(6, built=True).choose([sure], 16) is None
    assert after(3, built=False).costs.round(sure, 4) == 20


def test_nothing_is_drafted_before_plain_steps_are_measured() -> None:
    pace = Pace()
    pace.plain_step(9.0, built=True)  # doesn't count
    for _ in range(ENOUGH):
        assert pace.choose([KIND], 16) is None
        pace.plain_step(0.01)
    assert pace.costs.plain == 0.01
    assert pace.choose([KIND], 16) is not None
    assert pace.choose([], 16) is None
    assert pace.choose([KIND], 0) is None


@pytest.mark.parametrize(("acceptance", "seldom"), [(0.6, 200), (0.9, 2000)])
def test_plain_steps_are_measured_again_the_sooner_the_less_is_gained(
    acceptance: float, seldom: int
) -> None:
    simulation = Simulation(lambda _: acceptance, 0.1, 0.05).run(4000)
    begun = [n for n in simulation.plain_steps if n > 50]
    gaps = [b - a for a, b in itertools.pairwise(begun)]
    assert simulation.ratio < 0.75
    assert 8 < max(gaps) < seldom


@pytest.mark.parametrize(("longest", "lengths"), [(16, LENGTHS), (3, (1, 2, 3)), (1, (1,))])
def test_drafts_are_never_longer_than_asked_for(longest: int, lengths: tuple[int, ...]) -> None:
    assert Pace(longest).lengths == lengths


def test_the_kind_that_promises_most_is_taken() -> None:
    pace = Pace()
    for _ in range(9):
        pace.plain_step(0.01)
    sure, vague = Kind("lookup", 8, 0.95, 0.05), Kind("lookup", 2, 0.2, 0.05)
    assert pace.choose([vague, sure, KIND], 16) == (sure, 16)
    for _ in range(12):
        pace.round(sure, 16, 0, 0.02)
    assert pace.acceptance(sure) < 0.3


def test_costs_lie_on_the_line_between_what_was_measured() -> None:
    costs = Costs()
    for _ in range(5):
        costs.add(PLAIN, 0, 1.0)
        costs.add("model", 4, 3.0)
        costs.add("model", 8, 4.0)
    assert costs.plain == 1.0
    assert [costs.round(KIND, n) for n in (2, 4, 6, 8, 16)] == [2.0, 3.0, 3.5, 4.0, 6.0]
    assert costs.round(Kind("other", slope=0.5), 2) == 2.0
    costs.add("model", 4, 900.0)  # an interruption
    assert costs.round(KIND, 4) == 3.0
    for _ in range(9):
        costs.add("model", 2, 9.0)  # longer than a longer one: can't be
    assert costs.round(KIND, 2) == 3.0


def test_rounds_that_cost_several_plain_steps_are_taken_where_they_win() -> None:
    costs = Costs()
    texts = [Simulation(lambda _: 0.97, 0.85, 0.2, costs=costs, seed=n).run(128) for n in range(8)]
    assert max(text.ratio for text in texts[1:]) < 0.6
