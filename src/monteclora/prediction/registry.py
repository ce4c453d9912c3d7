"""Every sampler and calibrator by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monteclora.adapters.sampler import Posterior
from monteclora.config import nearest
from monteclora.errors import ConfigError
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.ensemble import ENSEMBLE, Ensemble
from monteclora.prediction.laplace import LAPLACE, Laplace
from monteclora.prediction.mc_dropout import MCDropout
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.prediction.temperature import Temperature

__all__ = ["CALIBRATORS", "NO_CALIBRATOR", "SAMPLERS", "SamplerKind", "check_calibrator", "get_sampler"]

NO_CALIBRATOR = "none"


@dataclass(frozen=True)
class SamplerKind:
    """A way to predict.

    Attributes:
        name: as the command line writes it.
        description: one line.
        build: from the number of draws and the seed.
        needs_posterior: whether it draws from a method's own posterior.
        needs_several_runs: whether its draws are runs, so that no run has it alone.
        takes_layers: whether it can be restricted to the last blocks of a model; it then has a field ``layers``.
        needs_fit: whether something must be fitted to the training rows first, and attached to the model.
    """

    name: str
    description: str
    build: Callable[[int, int], Sampler]
    needs_posterior: bool = False
    needs_several_runs: bool = False
    takes_layers: bool = False
    needs_fit: bool = False


SAMPLERS: Mapping[str, SamplerKind] = {
    kind.name: kind
    for kind in (
        SamplerKind("mean", "the point estimate: one forward pass", lambda num_samples, seed: MEAN),
        SamplerKind(
            "posterior",
            "draws from the posterior of a MonteCLoRA adapter",
            Posterior,
            needs_posterior=True,
            takes_layers=True,
        ),
        SamplerKind("mc_dropout", "draws of the dropout masks of training", MCDropout),
        SamplerKind(
            LAPLACE, "draws from a Laplace approximation of the adapter's weights, linearised", Laplace, needs_fit=True
        ),
        SamplerKind(ENSEMBLE, "several runs, each a draw", Ensemble, needs_several_runs=True),
    )
}
CALIBRATORS: Mapping[str, type[Calibrator]] = {"temperature": Temperature}


def get_sampler(name: str) -> SamplerKind:
    """The sampler of that name. Raises ConfigError that names the nearest one."""
    _check("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def check_calibrator(name: str) -> None:
    """Raises ConfigError where there is no calibrator of that name."""
    _check("calibrator", name, (NO_CALIBRATOR, *CALIBRATORS))


def _check(what: str, name: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if name not in known:
        near = nearest(name, known)
        hint = f"Did you mean {near}?" if near else f"Choose one of {', '.join(known)}."
        raise ConfigError(f"there is no {what} {name!r}", hint)
