"""Counter-based random numbers against SplitMix64 in Python integers, and against statistics.

The draws are fixed, so the bounds are too: five standard errors, or that quantile of chi-square.
"""

import math

import pytest
import torch
from torch import Tensor

from moebius.kernels.random import gumbel, normal, uniform

MASK = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
KEYS = [0, 1, 17, -1, -(2**40) - 3, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 12345, 10**30, -(10**30)]
COUNTERS = [0, 1, 2, 1000, (1 << 24) + 5, (1 << 50) + 7, 2**63 - 1, -1, -(2**63)]
DRAWS = 1 << 18


def split_mix(state: int) -> int:
    """The next output of SplitMix64 in this state (Steele et al. 2014)."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * MIX_1) & MASK
    z = ((z ^ (z >> 27)) * MIX_2) & MASK
    return z ^ (z >> 31)


def split_mix_inverse(output: int) -> int:
    """The state in which SplitMix64 gives this output: each of its steps can be undone."""
    z = undo_xor_shift(output, 31) * pow(MIX_2, -1, 1 << 64) & MASK
    z = undo_xor_shift(z, 27) * pow(MIX_1, -1, 1 << 64) & MASK
    return (undo_xor_shift(z, 30) - GOLDEN) & MASK


def undo_xor_shift(value: int, bits: int) -> int:
    """The x with `x ^ (x >> bits) == value`."""
    x = value
    for _ in range(64 // bits):
        x = value ^ (x >> bits)
    return x


def uniform_in_python(key: int, counters: list[int], columns: int) -> Tensor:
    """The upper 24 bits as a number, the middle of its interval rounded to fp32 below 1."""
    rows = []
    for counter in counters:
        start = split_mix((split_mix(key & MASK) + counter) & MASK)
        bits = [split_mix((start + column) & MASK) for column in range(columns)]
        rows.append([min(((b >> 40) + 0.5) / 2**24, 1 - 2**-24) for b in bits])
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


def counter_of(key: int, output: int) -> int:
    """The counter for which SplitMix64 gives `output` in column 0."""
    state = split_mix_inverse(split_mix_inverse(output))
    counter = (state - split_mix(key & MASK)) & MASK
    return counter - (1 << 64) if counter >> 63 else counter


def chi_square(counts: Tensor, expected: Tensor | float) -> float:
    """Pearson's statistic; for b bins it has mean b - 1 and variance 2 (b - 1)."""
    return float(((counts.double() - expected) ** 2 / expected).sum())


def largest_correlation(columns_TN: Tensor) -> float:
    """The largest correlation of two columns, in standard errors."""
    correlation = torch.corrcoef(columns_TN.double().T)
    off = correlation - torch.eye(len(correlation), dtype=correlation.dtype)
    return float(off.abs().max()) * math.sqrt(len(columns_TN))


def test_split_mix_of_these_tests_is_the_published_one() -> None:
    """Outputs for seed 1234567, as every implementation lists them; and the inverse is one."""
    states = [(1234567 + i * GOLDEN) & MASK for i in range(3)]
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix(state) for state in states] == outputs
    assert [split_mix_inverse(output) for output in outputs] == states


@pytest.mark.parametrize("key", KEYS)
def test_uniform_equals_split_mix_in_python_integers(key: int) -> None:
    """To the last bit, for negative and huge keys and counters."""
    got = uniform(key, torch.tensor(COUNTERS), 7)
    assert got.dtype == torch.float32
    assert torch.equal(got, uniform_in_python(key, COUNTERS, 7))


def test_uniform_equals_split_mix_for_many_counters() -> None:
    counters = list(range(-500, 1500))
    assert torch.equal(uniform(3, torch.tensor(counters), 3), uniform_in_python(3, counters, 3))


def test_keys_count_modulo_64_bits_and_otherwise_differ() -> None:
    counter = torch.arange(64)
    assert torch.equal(uniform(-1, counter, 4), uniform(2**64 - 1, counter, 4))
    assert torch.equal(uniform(5, counter, 4), uniform(5 + 2**64, counter, 4))
    for key in (4, 6, -5, 5 + 2**63):
        assert not torch.isclose(uniform(5, counter, 4), uniform(key, counter, 4)).all(dim=1).any()


@pytest.mark.parametrize("key", [0, -7])
@pytest.mark.parametrize(
    "bits", [0, (1 << 40) - 1, 1 << 63, 0xFFFFFE << 40, 0xFFFFFF << 40, MASK], ids=hex
)
def test_extreme_bits_stay_strictly_between_0_and_1(key: int, bits: int) -> None:
    """The counters for which SplitMix64 gives the lowest and the highest outputs there are."""
    counter = torch.tensor([counter_of(key, bits)])
    assert split_mix(split_mix((split_mix(key & MASK) + int(counter)) & MASK)) == bits
    got = uniform(key, counter, 1)
    assert 0 < float(got) < 1
    assert float(got) == pytest.approx((bits >> 40) / 2**24, abs=2**-24)
    assert gumbel(key, counter, 1).isfinite().all()
    assert normal(key, counter, 1).isfinite().all()


def test_uniform_draws_lie_strictly_between_0_and_1() -> None:
    draws = uniform(11, torch.arange(DRAWS), 8)
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_uniform_has_the_moments_and_bins_of_a_uniform(key: int) -> None:
    """Mean 1/2, variance 1/12, 64 equal bins of the number and of its lower bits."""
    draws = uniform(key, torch.arange(DRAWS), 1)[:, 0].double()
    assert float(draws.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / DRAWS))
    assert float(draws.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / DRAWS))
    for scale in (2**6, 2**14, 2**22):
        counts = torch.bincount((draws * scale).long() % 64, minlength=64)
        assert chi_square(counts, DRAWS / 64) < 63 + 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("draw", [uniform, gumbel, normal])
def test_a_draw_does_not_depend_on_order_or_cut(draw: object) -> None:
    """Any subset of counters in any order gives the rows that all of them give."""
    assert callable(draw)
    counter = torch.arange(100) * 7919 - 50
    together = draw(9, counter, 5)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(9, counter[order], 5), together[order])
    assert torch.equal(draw(9, counter[order[:13]], 5), together[order[:13]])
    for row in (0, 41, 99):
        assert torch.equal(draw(9, counter[row : row + 1], 5)[0], together[row])
    assert torch.equal(draw(9, counter.repeat(2), 5), together.repeat(2, 1))


def test_fewer_columns_are_the_first_of_more() -> None:
    counter = torch.arange(50)
    assert torch.equal(uniform(4, counter, 3), uniform(4, counter, 10)[:, :3])
    assert torch.equal(gumbel(4, counter, 3), gumbel(4, counter, 10)[:, :3])


def test_no_counter_or_column_gives_an_empty_result() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for draw in (uniform, gumbel, normal):
        assert draw(4, none, 3).shape == (0, 3)
        assert draw(4, torch.arange(3), 0).shape == (3, 0)


@pytest.mark.parametrize("draw", [uniform, gumbel, normal])
def test_keys_columns_and_counters_are_uncorrelated(draw: object) -> None:
    """Neighbouring keys, all columns, and the same column at neighbouring counters."""
    assert callable(draw)
    counter = torch.arange(1 << 16)
    columns = [draw(key, counter, 4) for key in (0, 1, 2, -1, 1 << 32, GOLDEN)]
    columns.append(draw(0, counter + 1, 4))
    columns.append(draw(0, counter + (1 << 24), 4))
    assert largest_correlation(torch.cat(columns, dim=1)) < 5


def test_no_two_draws_repeat_across_keys_counters_and_columns() -> None:
    """Counter + 1 in column 0 must not be the counter itself in column 1, and so on.

    Of n draws from 2^24 numbers about `n^2 / 2^25` pairs are equal by chance.
    """
    draws = torch.cat([uniform(key, torch.arange(64), 64).flatten() for key in range(4)])
    repeated = len(draws) - len(draws.unique())
    assert repeated < 4 * len(draws) ** 2 / 2**25


def test_normal_equals_box_and_muller_in_python() -> None:
    counters, columns = COUNTERS[:6], 3
    got = normal(21, torch.tensor(counters), columns)
    u = uniform_in_python(21, counters, 2 * columns)
    for t in range(len(counters)):
        for c in range(columns):
            radius, angle = float(u[t, c]), float(u[t, columns + c])
            expected = math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
            assert float(got[t, c]) == pytest.approx(expected, abs=2e-6)


def test_normal_has_the_moments_and_bins_of_a_normal() -> None:
    """Mean 0, deviation 1, no skew, kurtosis 3, and 64 bins of equal probability."""
    draws = normal(5, torch.arange(DRAWS // 2), 2).flatten().double()
    assert float(draws.mean()) == pytest.approx(0, abs=5 / math.sqrt(DRAWS))
    assert float(draws.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * DRAWS))
    standard = (draws - draws.mean()) / draws.std()
    assert float((standard**3).mean()) == pytest.approx(0, abs=5 * math.sqrt(6 / DRAWS))
    assert float((standard**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(24 / DRAWS))
    counts = torch.bincount((torch.special.ndtr(draws) * 64).long(), minlength=64)
    assert chi_square(counts, DRAWS / 64) < 63 + 5 * math.sqrt(2 * 63)


def test_gumbel_has_the_moments_of_a_gumbel() -> None:
    """Mean Euler's constant, variance pi^2 / 6."""
    draws = gumbel(6, torch.arange(DRAWS), 1).double()
    assert float(draws.mean()) == pytest.approx(
        0.5772156649, abs=5 * math.pi / math.sqrt(6 * DRAWS)
    )
    # The fourth central moment is 27/5 of the squared variance.
    variance = math.pi**2 / 6
    assert float(draws.var()) == pytest.approx(variance, abs=5 * variance * math.sqrt(4.4 / DRAWS))


@pytest.mark.parametrize("probs", [[0.5, 0.3, 0.15, 0.04, 0.01], [0.25] * 4, [0.999, 0.001]])
def test_argmax_of_log_probabilities_and_gumbel_noise_draws_from_them(probs: list[float]) -> None:
    p = torch.tensor(probs, dtype=torch.float64)
    noise = gumbel(8, torch.arange(DRAWS), len(probs))
    counts = torch.bincount((p.log() + noise).argmax(dim=1), minlength=len(probs))
    freedom = len(probs) - 1
    assert chi_square(counts, p * DRAWS) < freedom + 5 * math.sqrt(2 * freedom)
