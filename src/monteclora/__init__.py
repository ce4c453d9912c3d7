"""Bayesian low-rank adaptation of language models.

The public names are loaded when they are first used: importing the package alone loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from monteclora.system.version import VERSION

if TYPE_CHECKING:
    from monteclora.adapters.active import posterior_sampling, variational_loss
    from monteclora.adapters.config import MonteCLoRAConfig
    from monteclora.adapters.export import export_merged, export_samples
    from monteclora.adapters.gguf import export_gguf
    from monteclora.adapters.wrapping import from_pretrained, get_peft_model
    from monteclora.evaluation.generation import generate
    from monteclora.evaluation.run import evaluate
    from monteclora.evaluation.text import load
    from monteclora.prediction.predictive import PredictiveDistribution, predict
    from monteclora.runs.publishing import export_adapter, push_to_hub
    from monteclora.runs.result import RunResult
    from monteclora.studies.study import StudyResult, study
    from monteclora.training.groups import separate_posterior
    from monteclora.training.run import train
    from monteclora.training.trainer import MonteCLoRATrainer, MonteCLoRATrainerMixin

_HOME = {
    "MonteCLoRAConfig": "adapters.config",
    "MonteCLoRATrainer": "training.trainer",
    "MonteCLoRATrainerMixin": "training.trainer",
    "PredictiveDistribution": "prediction.predictive",
    "RunResult": "runs.result",
    "StudyResult": "studies.study",
    "evaluate": "evaluation.run",
    "export_adapter": "runs.publishing",
    "export_gguf": "adapters.gguf",
    "export_merged": "adapters.export",
    "export_samples": "adapters.export",
    "from_pretrained": "adapters.wrapping",
    "generate": "evaluation.generation",
    "get_peft_model": "adapters.wrapping",
    "load": "evaluation.text",
    "posterior_sampling": "adapters.active",
    "predict": "prediction.predictive",
    "push_to_hub": "runs.publishing",
    "separate_posterior": "training.groups",
    "study": "studies.study",
    "train": "training.run",
    "variational_loss": "adapters.active",
}

__version__ = VERSION

__all__ = [
    "MonteCLoRAConfig",
    "MonteCLoRATrainer",
    "MonteCLoRATrainerMixin",
    "PredictiveDistribution",
    "RunResult",
    "StudyResult",
    "evaluate",
    "export_adapter",
    "export_gguf",
    "export_merged",
    "export_samples",
    "from_pretrained",
    "generate",
    "get_peft_model",
    "load",
    "posterior_sampling",
    "predict",
    "push_to_hub",
    "separate_posterior",
    "study",
    "train",
    "variational_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"monteclora.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'monteclora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
