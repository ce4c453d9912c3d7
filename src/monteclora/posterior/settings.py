"""The options of the method: the one place where they are declared, with their defaults and their ranges.

``MonteCLoRAConfig`` has these fields beside a LoRA's, the ``method`` section of a recipe too. This file does not import
torch: recipes are checked before it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

__all__ = ["Approximation", "Covariance", "Estimator", "Fidelity", "Noise", "PosteriorSettings"]

Covariance = Literal["diagonal", "full"]
Approximation = Literal["exact", "laplace"]
Estimator = Literal["expected", "sampled"]
Noise = Literal["shared", "per_example"]
Fidelity = Literal["default", "paper"]

_CHOICES: dict[str, Any] = {
    "covariance": Covariance,
    "dirichlet": Approximation,
    "regulariser": Estimator,
    "noise": Noise,
    "fidelity": Fidelity,
}
# what an option that was not given stands for
_DECIDED_BY_FIDELITY: dict[Fidelity, dict[str, Any]] = {
    "default": {"sample_scale": "relative:0.3", "regulariser": "expected", "normalised": True},
    "paper": {"sample_scale": 5e-3, "regulariser": "sampled", "normalised": False},
}
_RELATIVE = "relative:"


@dataclass
class PosteriorSettings:
    """The method's options, as they are given; :meth:`resolved` has the value of each.

    Attributes:
        num_components: N, the number of mixture components; it costs neither time nor memory.
        sample_scale: eps. A number is absolute; ``"relative:c"`` is c times the root mean square of each layer's
            initial A, which transfers between ranks and widths. None is ``"relative:0.3"``, or the authors' recommended
            5e-3 with ``fidelity="paper"``.
        kl_weight: weight of the KL terms in the loss.
        coop_weight: weight of the cooperative loss ``||pi||^2``; 0 turns it off.
        covariance: ``"diagonal"`` (the published code) or ``"full"`` (the paper's text) Sigma.
        dirichlet: ``"exact"`` or ``"laplace"`` law of the mixture weights.
        regulariser: ``"expected"`` takes KL_z and ``||pi||^2`` in closed form, ``"sampled"`` those of the draw. None
            is ``"expected"``, or ``"sampled"`` with ``fidelity="paper"``.
        noise: one draw ``"shared"`` by the batch, or signs of its own for each example, ``"per_example"`` (flipout).
        alpha_prior: concentration of the Dirichlet prior; eta starts at its logarithm.
        degrees_of_freedom: nu of the Wishart law, at least every layer's rank; None is each layer's rank.
        normalised: whether ``E[Sigma] = V`` at every rank. None is True, or False with ``fidelity="paper"``.
        fidelity: ``"paper"`` switches the three options above that can be None to the published values and nothing
            else.
    """

    num_components: int = 4
    sample_scale: float | str | None = None
    kl_weight: float = 1e-5
    coop_weight: float = 1.0
    covariance: Covariance = "diagonal"
    dirichlet: Approximation = "exact"
    regulariser: Estimator | None = None
    noise: Noise = "shared"
    alpha_prior: float = 1.0
    degrees_of_freedom: float | None = None
    normalised: bool | None = None
    fidelity: Fidelity = "default"

    def given(self) -> dict[str, Any]:
        """The options alone, without what a subclass adds; None for those that ``fidelity`` decides."""
        return {f.name: getattr(self, f.name) for f in fields(PosteriorSettings)}

    def resolved(self) -> PosteriorSettings:
        """The options with a value for each that was not given."""
        decided = _DECIDED_BY_FIDELITY[self.fidelity]
        return PosteriorSettings(
            **{k: decided[k] if v is None and k in decided else v for k, v in self.given().items()}
        )

    def settled(self, earlier: PosteriorSettings) -> PosteriorSettings:
        """These options, with the values of ``earlier`` given where :meth:`resolved` now has others.

        A stored adapter keeps the values it was trained with when a later version changes a default.
        """
        now = self.resolved()
        differing = {k: v for k, v in earlier.given().items() if getattr(now, k) != v}
        return replace(PosteriorSettings(**self.given()), **differing)

    def scale(self) -> tuple[bool, float]:
        """Whether eps is relative to each layer's initial A, and its number."""
        text = self.resolved().sample_scale
        relative = isinstance(text, str) and text.startswith(_RELATIVE)
        return relative, float(str(text).removeprefix(_RELATIVE))

    def option_problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values: pairs of option and message."""
        found = [(name, problem) for name, problem in self._problems() if problem]
        return [(name, f"is {getattr(self, name)!r}, {problem}") for name, problem in found]

    def _problems(self) -> list[tuple[str, str | None]]:
        found = [(name, _one_of(getattr(self, name), kind)) for name, kind in _CHOICES.items()]
        if self.regulariser is None:
            found = [(name, problem) for name, problem in found if name != "regulariser"]
        if not is_whole(self.num_components) or self.num_components < 1:
            found.append(("num_components", "expected a whole number of at least 1"))
        for name in ("kl_weight", "coop_weight"):
            found.append((name, _number(getattr(self, name), zero=True)))
        found.append(("alpha_prior", _number(self.alpha_prior, zero=False)))
        if self.degrees_of_freedom is not None:
            found.append(("degrees_of_freedom", _number(self.degrees_of_freedom, zero=False)))
        if self.normalised is not None and not isinstance(self.normalised, bool):
            found.append(("normalised", "expected True or False"))
        if self.sample_scale is not None:
            found.append(("sample_scale", _sample_scale(self.sample_scale)))
        return found


def is_whole(value: object) -> bool:
    """Whether ``value`` is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(value: object, choices: Any) -> str | None:
    allowed = get_args(choices)
    return None if value in allowed else f"expected {' or '.join(allowed)}"


def _number(value: object, *, zero: bool) -> str | None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and 0 <= float(value) < math.inf and (zero or value != 0):  # type: ignore[arg-type]
        return None
    return f"expected a finite number {'of at least' if zero else 'above'} 0"


def _sample_scale(value: object) -> str | None:
    text = value.removeprefix(_RELATIVE) if isinstance(value, str) else value
    try:
        number = math.nan if isinstance(text, bool) else float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if 0.0 <= number < math.inf:
        return None
    return "expected a number of at least 0, or 'relative:' and one, such as relative:0.3"
