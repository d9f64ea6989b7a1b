"""Mixtures: shares hold exactly, and each corpus is read in order, whatever the phases."""

import itertools
import random

import numpy as np
import pytest

from moebius.data.build import corpus_weights, mixture_turns
from moebius.data.config import CorpusConfig, DataConfig, MixturePhase
from moebius.data.corpus import Corpora
from moebius.data.mixture import Turns

ROUND = Turns.ROUND


def random_phases(seed: int) -> list[tuple[int, list[float]]]:
    """Phases of a few samples to some rounds; some end inside a round, some have no sample."""
    rng = random.Random(seed)
    corpora = rng.randint(1, 5)
    first, phases = 0, []
    for _ in range(rng.randint(1, 4)):
        weights = [rng.choice((0.0, 1e-9, 0.3, 1.0, 2.0, 77.7)) for _ in range(corpora)]
        weights[rng.randrange(corpora)] = 1.0
        phases.append((first, weights))
        first += rng.choice((0, 1, 7, 5000, ROUND, ROUND + 1, 3 * ROUND - 1))
    return phases


def end_of(phases: list[tuple[int, list[float]]]) -> int:
    return phases[-1][0] + 2 * ROUND


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([1], [10_000]),
        ([1, 1], [5000, 5000]),
        ([1, 2], [3333, 6667]),
        ([0.7, 0.2, 0.1], [7000, 2000, 1000]),
        ([7e9, 2e9, 1e9], [7000, 2000, 1000]),
        ([1, 0, 3], [2500, 0, 7500]),
        ([1, 1, 1], None),
        ([1e-12, 1], [1, 9999]),
        ([1e-12, 0, 5e-12, 1], [1, 0, 1, 9998]),
    ],
)
def test_shares_hold_exactly_in_each_whole_round(
    weights: list[float], quotas: list[int] | None
) -> None:
    """A corpus with any weight has a turn, one without has none."""
    turns = Turns([(0, weights)], seed=3)
    for number in range(2):
        corpora = [turns.turn(number * ROUND + place)[0] for place in range(ROUND)]
        found = np.bincount(corpora, minlength=len(weights)).tolist()
        assert sum(found) == ROUND
        exact = [ROUND * weight / sum(weights) for weight in weights]
        raised = sum(0 < share < 1 for share in exact)  # at the cost of the largest
        assert all(abs(a - b) < 1 + raised for a, b in zip(exact, found, strict=True))
        assert quotas is None or found == quotas
        assert turns.weights(number * ROUND) * ROUND == pytest.approx(found)


def test_shares_hold_in_parts_of_a_round_too() -> None:
    """About: turns are mixed, not one corpus after the other."""
    turns = Turns([(0, [1, 3])], seed=0)
    for first in range(0, 2 * ROUND, 1000):
        part = [turns.turn(first + place)[0] for place in range(1000)]
        assert abs(sum(part) - 750) < 70  # five sigma
    longest = max(
        len(list(group)) for _, group in itertools.groupby(turns.turn(n)[0] for n in range(ROUND))
    )
    assert longest < 60


@pytest.mark.parametrize("seed", range(6))
def test_samples_of_each_corpus_come_in_order_without_gaps(seed: int) -> None:
    """Also across rounds and phases; and `counts` tells how many there were."""
    phases = random_phases(seed)
    turns = Turns(phases, seed)
    corpora = len(phases[0][1])
    seen = [0] * corpora
    checked = {0, 1, end_of(phases), *(first + step for first, _ in phases for step in (-1, 0, 1))}
    checked |= set(random.Random(seed).sample(range(end_of(phases)), 20))
    for position in range(end_of(phases) + 1):
        if position in checked:
            assert turns.counts(position).tolist() == seen
        corpus, number = turns.turn(position)
        assert number == seen[corpus]
        seen[corpus] += 1


@pytest.mark.parametrize("seed", range(6))
def test_each_phase_has_its_own_shares(seed: int) -> None:
    """In each whole round that is counted from the phase's first sample on."""
    phases = random_phases(seed)
    turns = Turns(phases, seed)
    ends = [first for first, _ in phases[1:]] + [end_of(phases)]
    for (first, weights), end in zip(phases, ends, strict=True):
        for start in range(first, end - ROUND + 1, ROUND):
            taken = turns.counts(start + ROUND) - turns.counts(start)
            wanted = np.array(weights) / sum(weights) * ROUND
            assert (np.abs(taken - wanted) < 1 + (wanted < 1).sum()).all()
            assert ((taken > 0) == (wanted > 0)).all()
            assert turns.weights(start).tolist() == (taken / ROUND).tolist()


def test_turns_depend_on_seed_and_position_alone() -> None:
    phases = [(0, [1.0, 2.0]), (12_345, [2.0, 1.0])]
    turns = Turns(phases, 5)
    in_order = [turns.turn(position) for position in range(40_000)]
    for position in random.Random(0).sample(range(40_000), 50):
        assert Turns(phases, 5).turn(position) == turns.turn(position) == in_order[position]
    other = Turns(phases, 6)
    same = sum(other.turn(n)[0] == turns.turn(n)[0] for n in range(ROUND)) / ROUND
    assert abs(same - 5 / 9) < 0.05  # as by chance


def test_rounds_have_orders_of_their_own() -> None:
    turns = Turns([(0, [1.0, 1.0])], 5)
    orders = [tuple(turns.turn(n * ROUND + p)[0] for p in range(200)) for n in range(5)]
    assert len(set(orders)) == 5


def test_turns_are_fixed_for_all_time() -> None:
    """Runs resume by them: these values were computed once and may not change."""
    turns = Turns([(0, [1.0, 2.0, 1.0])], 1234)
    assert [turns.turn(n)[0] for n in range(16)] == [2, 1, 2, 0, 0, 0, 1, 2, 0, 2, 2, 1, 0, 1, 2, 1]
    assert turns.turn(10**12 + 5) == (2, 250_000_000_003)


def test_counts_of_a_far_position_take_no_time() -> None:
    turns = Turns([(0, [1.0, 3.0]), (10**13, [3.0, 1.0])], 0)
    assert turns.counts(4 * 10**12).tolist() == [10**12, 3 * 10**12]
    corpus, number = turns.turn(10**15)
    assert number == turns.counts(10**15)[corpus]


# As it is configured.


def mixture_of(*phases: tuple[int, dict[str, float]]) -> DataConfig:
    return DataConfig(
        dir="data",
        corpora={name: CorpusConfig() for name in ("code", "text")},
        mixture=tuple(
            MixturePhase(from_tokens=first, weights=weights) for first, weights in phases
        ),
        sequence_length=32,
    )


def test_a_phase_begins_with_the_first_sample_after_its_tokens(corpora: Corpora) -> None:
    both = Corpora({"code": corpora.first, "text": corpora.first}, {})
    config = mixture_of((0, {"code": 1.0}), (3201, {"text": 2.0, "code": 2.0}))
    turns = mixture_turns(config, both, seed=0)
    assert turns is not None
    assert turns.counts(101).tolist() == [101, 0]
    assert turns.counts(101 + ROUND).tolist() == [101 + ROUND // 2, ROUND // 2]
    assert corpus_weights(turns, config, 100) == {"code": 1.0, "text": 0.0}
    assert corpus_weights(turns, config, 101) == {"code": 0.5, "text": 0.5}


def test_without_phases_shares_are_those_of_the_tokens(corpora: Corpora) -> None:
    both = Corpora({"code": corpora.first, "text": corpora.first}, {})
    turns = mixture_turns(mixture_of(), both, seed=0)
    assert turns is not None
    assert turns.counts(ROUND).tolist() == [ROUND // 2, ROUND // 2]
    single = DataConfig(dir="data")
    assert mixture_turns(single, corpora, seed=0) is None
    assert corpus_weights(None, single, 7) == {"": 1.0}
