import numpy as np
import pytest

from monteclora.reports.figures import TrainingCurve
from monteclora.reports.results import FINISHED, Evaluation, Example, RunReport, Uncertainty
from tests.finished_runs import assets, trained  # noqa: F401


@pytest.fixture(scope="session")
def training() -> dict[str, TrainingCurve]:
    steps = np.arange(1, 81)
    loss = 2.0 * np.exp(-steps / 30)
    return {
        "LoRA": TrainingCurve(steps, loss),
        "MonteCLoRA": TrainingCurve(steps, 1.1 * loss, kl=3 + loss / 10, pi_norm_squared=0.4 - steps / 1000),
    }


@pytest.fixture(scope="session")
def runs(training) -> list[RunReport]:
    """A plain and a Bayesian run on the same 200 examples; the second is the better calibrated one."""
    generator = np.random.default_rng(0)
    logits = 2.0 * generator.normal(size=(200, 4))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([generator.choice(4, p=row) for row in truth])
    sharp = truth**3 / (truth**3).sum(axis=1, keepdims=True)
    spread = generator.gamma(2.0, 0.3, size=60)
    plain = RunReport(
        name="LoRA",
        method="LoRA",
        status=FINISHED,
        evaluation=Evaluation.of(sharp, labels),
        training=training["LoRA"],
        uncertainty={"in-scope": Uncertainty(spread / 2, np.zeros(60))},
        seconds=40.0,
        peak_bytes=1.0e9,
        trained_parameters=1000,
    )
    bayesian = RunReport(
        name="MonteCLoRA",
        method="MonteCLoRA",
        status=FINISHED,
        evaluation=Evaluation.of(truth, labels),
        training=training["MonteCLoRA"],
        uncertainty={
            "in-scope": Uncertainty(spread / 2, spread / 20),
            "out-of-scope": Uncertainty(spread, spread / 10),
        },
        uncertain_examples=[Example("it broke again", "", "login", 0.31, 1.42, 0.25)],
        seconds=50.0,
        peak_bytes=1.1e9,
        trained_parameters=1024,
    )
    return [plain, bayesian]
