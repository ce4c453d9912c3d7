"""Alternating timings, and what they say.

All that is compared runs in one process, in turns: every round runs each once, in rotating order and every other round
backwards, so that a drift of the machine's speed meets all alike and none has always the same predecessor. Ratios are
taken round by round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

_FEWEST, _MOST = 7, 61
_WARMUP_ROUNDS, _WARMUP_SECONDS = 2, 3.0


def elapsed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds that one step takes: by device events on a GPU, where launching it is not running it."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def alternate(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 90.0,
    rounds: int | None = None,
    before: Callable[[], object] = gc.collect,
) -> dict[str, list[float]]:
    """Time the steps in turns.

    Args:
        steps: by label.
        device: where they run.
        seconds: for how long, within 7 to 61 rounds after the warm-up.
        rounds: how many rounds, whatever they take.
        before: called before every round, untimed. Garbage is collected there and never inside a step.

    Returns:
        Seconds of every round, by label.
    """
    labels = list(steps)
    times: dict[str, list[float]] = {label: [] for label in labels}

    def run(number: int) -> dict[str, float]:
        before()
        shift = number % len(labels)
        order = labels[shift:] + labels[:shift]
        return {label: elapsed(steps[label], device) for label in (order[::-1] if number % 2 else order)}

    enabled = gc.isenabled()
    gc.disable()
    try:
        begin, warmed, duration = time.perf_counter(), 0, 0.0
        while warmed < _WARMUP_ROUNDS or (rounds is None and time.perf_counter() - begin < _WARMUP_SECONDS):
            duration = sum(run(warmed).values())
            warmed += 1
        for number in range(rounds or max(_FEWEST, min(_MOST, round(seconds / max(duration, 1e-6))))):
            for label, value in run(number).items():
                times[label].append(value)
    finally:
        if enabled:
            gc.enable()
    return times


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval of a statistic.

    Args:
        values: shape (K, ...), K independent observations.
        statistic: maps resampled values, shape (draws, K, ...), to shape (draws,).
        level: of the interval.
        draws: number of resamples.
    """
    indices = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(statistic(values[indices]), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(times: Mapping[str, Sequence[float]], references: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Medians and minima in milliseconds and their ratios.

    Args:
        times: seconds of every round, by label.
        references: what each label is compared with; labels without one have no ratios.

    Returns:
        For each label ``median_ms``, ``min_ms``, ``rounds``, and with a reference ``ratio`` (median of the ratios of
        each round), its 95 % bootstrap interval ``ratio_low`` to ``ratio_high``, and ``min_ratio``.
    """
    found = {}
    for label, values in times.items():
        row = {"median_ms": 1e3 * statistics.median(values), "min_ms": 1e3 * min(values), "rounds": len(values)}
        reference = times.get(references.get(label, ""))
        if reference is not None:
            ratios = np.array(values) / np.array(reference)
            low, high = bootstrap(ratios, lambda sample: np.median(sample, axis=1))
            row |= {"ratio": float(np.median(ratios)), "ratio_low": low, "ratio_high": high}
            row["min_ratio"] = min(values) / min(reference)
        found[label] = row
    return found
