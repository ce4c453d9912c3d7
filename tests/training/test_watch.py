"""What the training loss says of a phase, for ``training.back_off``."""

from __future__ import annotations

import math

import numpy as np
import pytest

from monteclora.training.watch import LossWatch

STEPS, WARMUP, CLASSES = 150, 9, 12
WATCH = LossWatch(STEPS, WARMUP, math.log(CLASSES))


def judged(losses: np.ndarray, watch: LossWatch = WATCH, luck: np.ndarray | None = None) -> tuple[int, str] | None:
    """The step at which something is found wrong, and what; None for never."""
    numbers: dict[str, float] = {}
    lucks = np.zeros_like(losses) if luck is None else luck
    for step, (loss, by_labels) in enumerate(zip(losses.tolist(), lucks.tolist(), strict=True), start=1):
        watch.see(numbers, loss, by_labels)
        if reason := watch.verdict(numbers, step):
            return step, reason
    return None


def noise(seed: int, size: float) -> np.ndarray:
    return size * np.random.default_rng(seed).standard_normal(STEPS)


STEP = np.arange(STEPS)


@pytest.mark.parametrize("size", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_however_noisily_is_let_go_on(seed: int, size: float) -> None:
    falling = 0.5 + 2.0 * np.exp(-STEP / 30)
    assert judged(falling + noise(seed, size)) is None
    slow = 2.9 - 0.1 * STEP / STEPS  # a language model that has little to learn
    assert judged(slow + noise(seed, size), LossWatch(STEPS, WARMUP, None)) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_rise_from_a_plateau_is_seen_within_a_few_steps(seed: int) -> None:
    fallen = 0.5 + 2.0 * np.exp(-STEP / 20) + np.where(STEP >= 100, 2.0, 0.0)
    found = judged(fallen + noise(seed, 0.2))
    assert found is not None
    assert 101 < found[0] <= 115
    assert "rose from 0." in found[1]


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_only_rises_is_seen_as_soon_as_it_is_judged(seed: int) -> None:
    found = judged(2.5 + np.minimum(STEP, 20) * 0.1 + noise(seed, 0.1), LossWatch(STEPS, WARMUP, None))
    assert found is not None
    assert found[0] <= 25


@pytest.mark.parametrize("seed", range(20))
def test_a_rise_that_ends_at_the_class_frequencies_is_seen_after_a_quarter_of_the_steps(seed: int) -> None:
    fallen = math.log(CLASSES) + 0.01 + 0.6 * np.exp(-(((STEP - 15) / 6) ** 2))
    found = judged(fallen + noise(seed, 0.1))
    assert found is not None
    assert found[0] <= math.ceil(WARMUP + (STEPS - WARMUP) / 4) + 25
    assert "frequencies of the classes" in found[1] or "rose" in found[1]


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_only_comes_down_to_the_class_frequencies_is_let_go_on(seed: int) -> None:
    """MRPC at a good rate: learning starts after a third of the steps, and half the rate would be the wrong way."""
    late = math.log(2) * (1 + 0.1 * np.exp(-STEP / 10) - np.maximum(STEP - 60, 0) / 900)
    assert judged(late + noise(seed, 0.04), LossWatch(STEPS, WARMUP, math.log(2))) is None
    never = math.log(2) * (1 + 0.1 * np.exp(-STEP / 10))
    found = judged(never + noise(seed, 0.04), LossWatch(STEPS, WARMUP, math.log(2)))
    assert found is not None
    assert found[0] >= 0.7 * STEPS, "before that it cannot be told from the other"


@pytest.mark.parametrize("steps", [STEPS, 10 * STEPS])
@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_stays_at_the_class_frequencies_is_given_up(seed: int, steps: int) -> None:
    stays = np.full(steps, math.log(2)) + 0.04 * np.random.default_rng(seed).standard_normal(steps)
    found = judged(stays, LossWatch(steps, WARMUP, math.log(2)))
    assert found is not None
    assert found[0] <= 0.9 * steps
    assert "frequencies of the classes" in found[1]


@pytest.mark.parametrize("steps", [375, 3000])
def test_of_many_noisy_losses_one_is_low_and_nothing_was_lost(steps: int) -> None:
    """A long run of a task that is learned late, in small batches: before it is given up, it is let go on."""
    watch, early = LossWatch(steps, WARMUP, 0.62), int(0.69 * steps)
    losses = 0.62 + 0.15 * np.random.default_rng(0).standard_normal((60, early))
    assert sum(judged(each, watch) is not None for each in losses) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_the_start_of_a_model_that_does_not_know_the_frequencies_is_no_rise(seed: int) -> None:
    """CoLA in batches of 8: log 2 whatever the labels, then the frequencies, whose loss the labels explain."""
    share = 0.29
    of_class = -np.log([1 - share, share])
    labels = np.random.default_rng(seed).random((STEPS // 2, 8)) < share
    by_frequencies = of_class[labels.astype(int)].mean(-1)
    mean = float(of_class @ [1 - share, share])
    known = 1 / (1 + np.exp(-(np.arange(STEPS // 2) - 20) / 3))
    losses = known * by_frequencies + (1 - known) * math.log(2)
    assert judged(losses, LossWatch(STEPS, WARMUP, mean), by_frequencies - mean) is None


@pytest.mark.parametrize("seed", range(20))
def test_slow_progress_is_not_taken_for_none(seed: int) -> None:
    """Three per cent better than the frequencies at a quarter of the steps: as MRPC, which is learned late."""
    slow = math.log(2) * (1 + 0.05 * np.exp(-STEP / 8) - 0.08 * STEP / 100)
    assert judged(slow + noise(seed, 0.03), LossWatch(STEPS, WARMUP, math.log(2))) is None


@pytest.mark.parametrize("seed", range(20))
def test_what_was_learned_and_lost_is_seen_however_noisy_the_losses_are(seed: int) -> None:
    fallen = np.where(STEP < 25, math.log(CLASSES) - 0.4 * STEP / 25, math.log(CLASSES) + 0.05)
    found = judged(fallen + noise(seed, 0.2))
    assert found is not None, "neither as a rise nor as the loss of the frequencies"
    assert found[0] <= 90  # twenty steps after step 25 without noise, and later where it hides the loss for a while


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_just_below_that_of_the_frequencies_is_let_go_on(seed: int) -> None:
    slow = math.log(CLASSES) - 0.5 * np.minimum(STEP / 37, 1.0)
    assert judged(slow + noise(seed, 0.3)) is None


def test_good_is_a_loss_at_its_lowest_that_has_fallen() -> None:
    numbers: dict[str, float] = {}
    good = []
    for loss in (
        np.concatenate([np.full(30, 2.5), np.linspace(2.5, 1.0, 40), np.linspace(1.0, 1.8, 10)]) + noise(0, 0.05)[:80]
    ):
        WATCH.see(numbers, float(loss))
        good.append(WATCH.is_good(numbers))
    assert not any(good[:30])
    assert all(good[45:70])
    assert not any(good[78:])
