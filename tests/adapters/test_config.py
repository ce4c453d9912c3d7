"""The configuration: a plain LoRA's on disk, checked field by field, and what ``fidelity`` switches."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

import monteclora
from monteclora import MonteCLoRAConfig
from monteclora.errors import CheckpointError, ConfigError
from tests.models import TARGETS, batch_for, config_for, llama, perceptron, posterior_of, wrapped

WRONG: list[tuple[str, Any, str]] = [
    ("num_components", 0, "at least 1"),
    ("num_components", 2.5, "whole number"),
    ("num_components", True, "whole number"),
    ("sample_scale", -1.0, "at least 0"),
    ("sample_scale", float("nan"), "at least 0"),
    ("sample_scale", float("inf"), "at least 0"),
    ("sample_scale", "relative:-1", "at least 0"),
    ("sample_scale", "relativ:0.3", "relative:"),
    ("sample_scale", "relative:", "relative:"),
    ("sample_scale", True, "number"),
    ("sample_scale", [1.0], "number"),
    ("kl_weight", -1e-5, "at least 0"),
    ("kl_weight", float("inf"), "finite"),
    ("kl_weight", "1e-5", "finite"),
    ("coop_weight", float("nan"), "finite"),
    ("covariance", "banded", "diagonal or full"),
    ("dirichlet", "gumbel", "exact or laplace"),
    ("regulariser", "both", "expected or sampled"),
    ("noise", "per_token", "shared or per_example"),
    ("noise", ["shared"], "shared or per_example"),
    ("alpha_prior", 0.0, "above 0"),
    ("alpha_prior", None, "above 0"),
    ("degrees_of_freedom", -3, "above 0"),
    ("fidelity", "papr", "default or paper"),
    ("r", 0, "at least 1"),
    ("r", 2.0, "whole number"),
    ("lora_alpha", float("nan"), "finite"),
    ("lora_alpha", "x", "finite"),
    ("bias", "some", "none, all or lora_only"),
    ("lora_dropout", 1.5, "below 1"),
    ("lora_dropout", -0.1, "at least 0"),
    ("normalised", "yes", "True or False"),
    ("noise_seed", 1.5, "whole number"),
    ("noise_seed", None, "whole number"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG, ids=lambda v: str(v))
def test_a_wrong_field_is_named_with_what_was_expected_and_a_remedy(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MonteCLoRAConfig(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name} is {value!r}")
    assert expected in text
    assert "\n" not in text
    assert caught.value.hint.endswith(".")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
        ({"init_lora_weights": "mica"}, "mica"),
    ],
)
def test_variants_with_a_forward_of_their_own_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        MonteCLoRAConfig(target_modules=["q_proj"], **options)
    assert caught.value.hint


def test_degrees_of_freedom_below_a_rank_name_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"degrees_of_freedom is 3 but layer '.*down_proj' has rank 6") as caught:
        wrapped(llama, degrees_of_freedom=3, r=2, rank_pattern={"down_proj": 6})
    assert caught.value.hint


def test_fidelity_switches_three_defaults_and_nothing_else() -> None:
    default, paper = MonteCLoRAConfig(), MonteCLoRAConfig(fidelity="paper")
    assert {name for name in vars(default) if getattr(default, name) != getattr(paper, name)} == {"fidelity"}
    default, paper = default.resolved(), paper.resolved()
    changed = {name for name in vars(default) if getattr(default, name) != getattr(paper, name)}
    assert changed == {"fidelity", "normalised", "regulariser", "sample_scale"}
    assert (default.normalised, default.regulariser, default.sample_scale) == (True, "expected", "relative:0.3")
    assert (paper.normalised, paper.regulariser, paper.sample_scale) == (False, "sampled", 5e-3)


def test_what_is_given_wins_over_fidelity() -> None:
    paper = MonteCLoRAConfig(fidelity="paper", normalised=True, regulariser="expected", sample_scale="relative:0.3")
    assert {**paper.resolved().given(), "fidelity": "default"} == MonteCLoRAConfig().resolved().given()


def test_fidelity_can_be_chosen_afterwards() -> None:
    paper = dataclasses.replace(MonteCLoRAConfig(r=4), fidelity="paper")
    assert paper.resolved() == MonteCLoRAConfig(fidelity="paper").resolved()
    chosen = dataclasses.replace(MonteCLoRAConfig(normalised=True), fidelity="paper").resolved()
    assert (chosen.normalised, chosen.regulariser) == (True, "sampled")


def test_paper_noise_is_the_default_noise_times_the_root_of_nu() -> None:
    def layers(fidelity: str) -> Any:
        model = wrapped(llama, fidelity=fidelity, sample_scale=0.1, rank_pattern={"down_proj": 7})
        model(**batch_for(llama))
        return posterior_of(model).layers, [part.matrix for part in posterior_of(model).draw().layers]

    shapes, default = layers("default")
    _, paper = layers("paper")
    for shape, ours, published in zip(shapes, default, paper, strict=True):
        torch.testing.assert_close(published, shape.rank**0.5 * ours, rtol=1e-5, atol=0.0)
    assert {shape.rank for shape in shapes} == {4, 7}


def test_saved_configuration_equals_that_of_plain_lora(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[llama],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
    }
    monteclora.get_peft_model(llama(), MonteCLoRAConfig(**shared)).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(llama(), LoraConfig(**shared)).save_pretrained(tmp_path / "plain")
    ours, plain = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "plain"))
    for document in (ours, plain):
        document["target_modules"] = sorted(document["target_modules"])
    assert ours == plain


def test_round_trip_through_a_saved_adapter(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_components": 3,
        "sample_scale": 0.02,
        "kl_weight": 2e-3,
        "coop_weight": 0.0,
        "covariance": "full",
        "dirichlet": "laplace",
        "regulariser": "sampled",
        "noise": "per_example",
        "alpha_prior": 2.0,
        "degrees_of_freedom": 9.0,
        "normalised": False,
        "fidelity": "paper",
        "noise_seed": 123,
        "use_rslora": True,
    }
    model = wrapped(llama, **options)
    model.save_pretrained(tmp_path)
    loaded = monteclora.from_pretrained(llama(), tmp_path)
    before, after = model.peft_config["default"], loaded.peft_config["default"]
    assert type(after) is MonteCLoRAConfig
    assert {name: getattr(after, name) for name in options} == options
    assert after.method_fields() == before.method_fields()
    assert posterior_of(loaded).settings == posterior_of(model).settings


def test_a_configuration_round_trips_by_itself(tmp_path: Path) -> None:
    config = MonteCLoRAConfig(
        r=4, target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 2}, num_components=3, fidelity="paper"
    )
    assert MonteCLoRAConfig(**config.to_dict()) == config
    config.save_pretrained(tmp_path)
    for reader in (MonteCLoRAConfig, peft.PeftConfig):
        found = reader.from_pretrained(tmp_path)
        assert type(found) is MonteCLoRAConfig
        assert found == config
    assert found != dataclasses.replace(config, kl_weight=1.0)


def test_a_configuration_is_read_from_a_saved_adapter(tmp_path: Path) -> None:
    model = wrapped(llama, num_components=3, noise_seed=5, sample_scale=None)
    model.save_pretrained(tmp_path)
    found = MonteCLoRAConfig.from_pretrained(tmp_path)
    assert (found.num_components, found.noise_seed, found.sample_scale) == (3, 5, None)
    found.inference_mode = False
    assert found == model.peft_config["default"] == MonteCLoRAConfig(**model.peft_config["default"].to_dict())


@pytest.mark.parametrize("text", [None, "{", '{"foo": 1}'], ids=str)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as caught:
        MonteCLoRAConfig.from_pretrained(tmp_path)
    assert caught.value.hint


def test_copies() -> None:
    config = config_for(llama, num_components=3)
    for copied in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert copied.resolved() == config.resolved()


def test_one_configuration_wraps_several_models() -> None:
    config = config_for(llama)
    first = monteclora.get_peft_model(llama(), config)
    second = monteclora.get_peft_model(llama(), config)
    assert posterior_of(first) is not posterior_of(second)


def test_peft_alone_refuses_the_configuration() -> None:
    with pytest.raises(ConfigError, match="plain LoRA") as caught:
        peft.get_peft_model(llama(), config_for(llama))
    assert "monteclora.get_peft_model" in caught.value.hint
    model = peft.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("second", config_for(llama))
    with pytest.raises(ValueError, match="'MONTECLORA' is not compatible with the `PeftMixedModel`"):
        peft.PeftMixedModel(llama(), config_for(llama))


def test_the_name_of_another_base_model_is_replaced_with_a_warning() -> None:
    config = config_for(llama, base_model_name_or_path="someone/other")
    with pytest.warns(UserWarning, match="renamed from 'someone/other'"):
        model = monteclora.get_peft_model(llama(), config)
    assert model.peft_config["default"].base_model_name_or_path is None
    assert config.base_model_name_or_path == "someone/other"


def test_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="LoraConfig") as caught:
        monteclora.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert "peft.get_peft_model" in caught.value.hint


def test_injection_by_peft_alone_is_refused_before_the_model_is_changed() -> None:
    model = perceptron()
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"can only make a plain LoRA.*monteclora\.get_peft_model"):
        peft.inject_adapter_in_model(MonteCLoRAConfig(target_modules=["first"]), model)
    assert dict(model.named_modules()) == before
