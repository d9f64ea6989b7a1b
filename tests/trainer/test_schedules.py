"""Learning-rate schedules at the points that define them."""

import itertools

import pytest

from moebius.trainer.schedules import CosineSchedule, WSDSchedule, lr_ratio


def test_cosine_rises_linearly_and_falls_to_its_floor() -> None:
    schedule = CosineSchedule(warmup_steps=10, min_ratio=0.1)
    ratios = [lr_ratio(schedule, step, 110) for step in range(111)]
    assert ratios[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert ratios[10] == pytest.approx(1.0)
    assert ratios[60] == pytest.approx(0.55)
    assert ratios[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(ratios[10:]))


def test_wsd_is_constant_until_the_decay_and_linear_in_it() -> None:
    schedule = WSDSchedule(warmup_steps=5, decay_fraction=0.2, min_ratio=0.0)
    ratios = [lr_ratio(schedule, step, 100) for step in range(101)]
    assert ratios[4] == 1.0
    assert set(ratios[5:81]) == {1.0}
    assert ratios[90] == pytest.approx(0.5)
    assert ratios[100] == 0.0


@pytest.mark.parametrize("schedule", [CosineSchedule(), WSDSchedule()])
def test_without_warmup_the_first_step_is_at_the_peak(
    schedule: CosineSchedule | WSDSchedule,
) -> None:
    assert lr_ratio(schedule, 0, 10) == 1.0
