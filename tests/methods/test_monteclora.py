from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch

from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.errors import ConfigError
from monteclora.methods import get_method
from monteclora.methods.lora import LoRAFields
from monteclora.methods.monteclora import MonteCLoRAOptions
from tests.methods.common import options, wrap


def test_options_are_those_of_the_configuration() -> None:
    """Same names, same defaults, same choices; the configuration has the noise seed besides."""
    ours = {f.name: f for f in fields(MonteCLoRAOptions)}
    lora = {f.name for f in fields(LoRAFields)}
    theirs = {f.name: f for f in fields(MonteCLoRAConfig)}
    own = set(MonteCLoRAConfig().method_fields()) - {"noise_seed"}
    assert set(ours) - lora == own
    hints = get_type_hints(MonteCLoRAConfig), get_type_hints(MonteCLoRAOptions)
    for name in own:
        assert ours[name].default == theirs[name].default, name
        assert set(get_args(hints[0][name])) == set(get_args(hints[1][name])), name


def test_options_reach_the_configuration() -> None:
    values = {
        "num_components": 7,
        "sample_scale": "relative:0.1",
        "kl_weight": 0.5,
        "coop_weight": 0.25,
        "covariance": "full",
        "dirichlet": "laplace",
        "regulariser": "sampled",
        "noise": "per_example",
        "alpha_prior": 2.0,
        "degrees_of_freedom": 9.0,
        "normalised": False,
    }
    config = wrap(get_method("monteclora"), **values).peft_config["default"]
    assert {name: getattr(config, name) for name in values} == values


def test_the_defaults_that_fidelity_decides_are_written_out() -> None:
    method = get_method("monteclora")
    plain, paper = options(method).resolved(), options(method, fidelity="paper").resolved()
    assert (plain.regulariser, plain.normalised) == ("expected", True)
    assert (paper.sample_scale, paper.regulariser, paper.normalised) == (5e-3, "sampled", False)
    chosen = options(method, fidelity="paper", normalised=True, sample_scale=0.5).resolved()
    assert (chosen.sample_scale, chosen.normalised) == (0.5, True)


@pytest.mark.parametrize(
    "values", [{"num_components": 0}, {"sample_scale": "relative:x"}, {"kl_weight": -1}, {"alpha_prior": 0}]
)
def test_what_the_configuration_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"recipe: {next(iter(values))} is"):
        options(get_method("monteclora"), **values)


def test_the_seed_is_that_of_the_adapter_and_of_the_noise() -> None:
    method = get_method("monteclora")
    one, other = (wrap(method, seed=seed) for seed in (1, 2))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert [m.peft_config["default"].noise_seed for m in (one, other)] == [1, 2]
