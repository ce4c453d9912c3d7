"""The choice of the novelty score: on one half, reported on the other."""

from __future__ import annotations

import novelty
import numpy as np
import pytest

from monteclora.metrics.ood import auroc


def record(seed: int, scores: dict[str, tuple[float, float]]) -> dict:
    both = {**scores, novelty.DEFAULT: (0.7, 0.8), novelty.EARLIER: (0.6, 0.9)}
    about = {"all": 0.5, "keystrokes": 1.0}
    return {
        "method": "lora",
        "seed": seed,
        "scores": {n: {"halves": list(halves), "divisions": [list(halves)] * 2, **about} for n, halves in both.items()},
    }


def test_the_first_half_chooses_and_the_second_is_reported() -> None:
    """Over all runs, among all scores and among those without a pass of their own."""
    scores = {"near, pretrained": (0.9, 0.71), "near, tuned": (0.8, 0.52), "worse on it": (0.7, 0.99)}
    found = novelty.report([record(0, scores), record(1, {**scores, "worse on it": (0.85, 0.99)})])
    assert "on the choosing half, any: near, pretrained" in found
    assert "on the choosing half, without a pass of its own: near, tuned" in found
    assert "chosen anew among any score: 0.710" in found
    assert "chosen anew among scores without a pass of their own: 0.520" in found
    assert "2 random divisions, the default: 0.800" in found
    assert "| near, tuned | 0.800 | 0.520 (0.520, 0.520) | 0.500 | 100 % |" in found


def test_sums_are_of_scores_standardised_by_validation_rows() -> None:
    generator = np.random.default_rng(0)
    names = ("energy", "maximum logit", "entropy", "nearest row, x", novelty.NEW, novelty.PAIRS)
    found = {
        name: {each: generator.normal(size=rows) for each in names}
        for name, rows in (("validation", 30), ("test", 40), ("outside", 20), ("keystrokes", 10))
    }
    before = {name: dict(scores) for name, scores in found.items()}
    novelty.combined(found)

    def of(name: str, each: str) -> np.ndarray:
        held_out = before["validation"][each]
        return (before[name][each] - held_out.mean()) / held_out.std()

    name = f"entropy + 2 x nearest row, x + {novelty.NEW} + 0.5 x {novelty.PAIRS}"
    for each, scores in found.items():
        expected = of(each, "entropy") + 2 * of(each, "nearest row, x") + of(each, novelty.NEW)
        np.testing.assert_allclose(scores[name], expected + 0.5 * of(each, novelty.PAIRS))
    halved = novelty.divisions({"test": [str(i) for i in range(40)], "outside": [str(i) for i in range(20)]}, 2)
    told = dict(novelty.measures(found, halved))[name]
    for number, half in enumerate(halved):
        assert sorted(np.concatenate(half["test"])) == list(range(40))
        by_half = [
            auroc(found["test"][name][half["test"][i]], found["outside"][name][half["outside"][i]]) for i in (0, 1)
        ]
        assert [told["halves"], *told["divisions"]][number] == pytest.approx(by_half, abs=1e-4)
