"""Which layers get a posterior, which are refused by name, and what wrapping leaves as it was."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

import monteclora
from monteclora import MonteCLoRAConfig, variational_loss
from monteclora.errors import ConfigError
from tests.models import (
    TARGETS,
    batch_for,
    config_for,
    gradients,
    llama,
    perceptron,
    posterior_of,
    relative_difference,
    step,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


class Mixed(nn.Module):
    """Layers that peft's LoRA adapts and MonteCLoRA does not, beside one that both do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.image = nn.Conv2d(3, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.linear(self.table(ids)))
        return self.attention(hidden, hidden, hidden)[0]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that wrapping a model changes."""
    return {
        "modules": dict(model.named_modules()),
        "parameters": dict(model.named_parameters()),
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": set(vars(model)),
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("table", "'table' is a Embedding"),
        ("image", "'image' is a Conv2d"),
        ("attention", "'attention' is a MultiheadAttention"),
        ("norm", "LayerNorm"),  # by peft itself, after it has replaced the layers before it
    ],
)
def test_unsupported_layers_are_refused_by_name_and_the_model_is_left_as_it_was(target: str, refusal: str) -> None:
    torch.manual_seed(0)
    model, ids = Mixed(), torch.arange(6).view(2, 3)
    model.table.weight.requires_grad = False
    before, output = state(model), model(ids)
    with pytest.raises(ConfigError, match=refusal) as caught:
        monteclora.get_peft_model(model, MonteCLoRAConfig(target_modules=["linear", target]))
    assert caught.value.hint
    assert state(model) == before
    assert torch.equal(model(ids), output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped_model = monteclora.get_peft_model(model, MonteCLoRAConfig(target_modules=["linear"]))
    wrapped_model(ids).sum().backward()


def test_a_layer_that_a_user_registered_with_peft_is_told_from_pefts_own() -> None:
    class Registered(Linear):
        pass

    config = config_for(llama, target_modules=["q_proj"])
    config._register_custom_module({nn.Linear: Registered})
    with pytest.raises(ConfigError, match=r"q_proj' is a Linear that peft adapts with .*Registered, .* peft's own"):
        monteclora.get_peft_model(llama(), config)


def test_degrees_of_freedom_that_do_not_fit_leave_the_model_as_it_was() -> None:
    model = perceptron()
    before = state(model)
    with pytest.raises(ConfigError, match="degrees_of_freedom"):
        monteclora.get_peft_model(model, config_for(perceptron, degrees_of_freedom=1))
    assert state(model) == before


def test_an_unknown_target_is_named_with_the_nearest() -> None:
    model = llama()
    with pytest.raises(ConfigError, match=r"'q_porj' \(nearest: .*q_proj") as caught:
        monteclora.get_peft_model(model, config_for(llama, target_modules=["q_porj", "v_proj"]))
    assert "v_proj'" not in caught.value.message
    assert caught.value.hint
    with pytest.raises(ConfigError, match="ninguno") as caught:
        monteclora.get_peft_model(model, config_for(llama, target_modules="ninguno"))
    assert caught.value.hint


def test_an_unknown_target_of_a_second_adapter_is_named_too() -> None:
    model = wrapped(llama)
    with pytest.raises(ConfigError, match="q_porj"):
        model.add_adapter("second", config_for(llama, target_modules=["q_porj", "v_proj"]))
    assert list(model.peft_config) == ["default"]


def test_a_refused_second_adapter_leaves_the_first_alone() -> None:
    torch.manual_seed(0)
    model = monteclora.get_peft_model(Mixed(), MonteCLoRAConfig(target_modules=["linear"]))
    ids = torch.arange(6).view(2, 3)
    output = model.eval()(ids)
    with pytest.raises(ConfigError, match="Embedding"):
        model.add_adapter("second", MonteCLoRAConfig(target_modules=["linear", "table"]))
    assert list(model.peft_config) == ["default"]
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(model(ids), output)
    model.train()(ids).sum().backward()
    gradients(model)
    model.add_adapter("second", MonteCLoRAConfig(target_modules=["linear"]))


def test_target_names_may_be_a_pattern_or_all_linear() -> None:
    for targets, layers in ((r".*\.(q|v)_proj", 4), ("all-linear", 14), (None, 4)):
        model = wrapped(llama, target_modules=targets)
        assert len(posterior_of(model).layers) == layers
        step(model, llama)


def test_wrapping_uses_no_random_numbers_of_its_own() -> None:
    shared: dict[str, Any] = {"r": 4, "target_modules": TARGETS[llama], "task_type": "CAUSAL_LM"}
    states, weights = [], []
    for wrap, config in (
        (monteclora.get_peft_model, MonteCLoRAConfig(**shared)),
        (peft.get_peft_model, LoraConfig(**shared)),
    ):
        base = llama()
        torch.manual_seed(11)
        model = wrap(base, config)
        states.append(torch.get_rng_state())
        weights.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    assert torch.equal(*states)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_relative_scale_is_that_of_each_layers_initial_a() -> None:
    model = monteclora.get_peft_model(llama(), config_for(llama, sample_scale="relative:0.5"))
    posterior = posterior_of(model)
    for layer, scale in zip(posterior.layers, posterior.scale, strict=True):
        weight = model.base_model.model.get_submodule(layer.name).lora_A["default"].weight.detach()
        assert float(scale) == pytest.approx(0.5 * float(weight.square().mean().sqrt()), rel=1e-6)
        assert float(scale) == pytest.approx(0.5 / (3 * layer.in_features) ** 0.5, rel=0.25)


def test_wrapping_without_memory_for_weights() -> None:
    """``check`` sizes a 7B model on the meta device."""
    with torch.device("meta"):
        base = llama()
        model = monteclora.get_peft_model(base, config_for(llama))
    assert posterior_of(model).rho.is_meta
    assert sum(p.numel() for p in posterior_of(model).parameters()) == 6 * 8
    on_cpu = monteclora.get_peft_model(llama(), config_for(llama), low_cpu_mem_usage=True)
    weight = on_cpu.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert weight.is_meta
    scale = posterior_of(on_cpu).scale
    assert scale[0].item() == pytest.approx(0.5 / (3 * 32) ** 0.5, rel=1e-6)


class Elsewhere(nn.Parameter):
    """A parameter of another kind, as sharded models have them."""


@pytest.mark.parametrize("kind", ["kind", "shape", "device"])
def test_means_that_are_elsewhere_until_their_layer_runs_are_added_there(kind: str) -> None:
    """As in sharded and offloaded models; the function is the same."""
    model, expected = wrapped(llama), wrapped(llama)
    module = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"]
    here, there = (
        module.weight,
        {
            "kind": Elsewhere(module.weight.detach()),
            "shape": nn.Parameter(torch.empty(0)),
            "device": nn.Parameter(module.weight.detach().to("meta")),
        }[kind],
    )
    tuner = model.base_model
    assert tuner.means(posterior_of(model)) is not None
    module.weight = there
    assert tuner.means(posterior_of(model)) is None
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.register_forward_pre_hook(lambda *_: setattr(module, "weight", here))
    for one in (model, expected):
        (one(**batch_for(llama)).loss + variational_loss(one)).backward()
    assert not any(part.has_mean for part in posterior_of(model).current.layers)
    assert all(part.has_mean for part in posterior_of(expected).current.layers)
    assert relative_difference(gradients(expected), gradients(model)) < 1e-6


def test_a_layer_that_peft_was_told_to_adapt_in_its_own_way_is_refused() -> None:
    class Own(nn.Module, LoraLayer):
        def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)

    config = MonteCLoRAConfig(target_modules=["lstm"])
    config._register_custom_module({nn.LSTM: Own})
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})
    with pytest.warns(UserWarning, match="Unsupported layer"), pytest.raises(ConfigError, match="has no LoRA layer"):
        monteclora.get_peft_model(model, config)
    assert type(model["lstm"]) is nn.LSTM
