"""Private names of peft, transformers and torch's modules: what each is taken for, so that a release that changes one
fails here, by name. Functions of torch are in tests/posterior/test_torch_private.py."""

from __future__ import annotations

import inspect

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import nn

from tests.models import TARGETS, llama, perceptron


def plain() -> tuple[nn.Module, Linear]:
    model = peft.get_peft_model(perceptron(), LoraConfig(r=2, target_modules=TARGETS[perceptron]))
    return model, model.base_model.model.first


def test_the_dictionaries_of_a_torch_module() -> None:
    linear = nn.Linear(2, 3)
    outer = nn.Sequential(linear)
    assert outer._modules["0"] is linear
    assert linear._parameters["weight"] is linear.weight
    assert linear._parameters.get("other") is None


def test_what_a_lora_layer_knows_of_its_adapters() -> None:
    model, layer = plain()
    assert layer._active_adapter in ("default", ["default"])
    assert layer._disable_adapters is False
    with model.disable_adapter():
        assert layer._disable_adapters is True


def test_a_lora_layer_casts_its_input() -> None:
    _, layer = plain()
    assert layer._cast_input_dtype(torch.ones(2, dtype=torch.bfloat16), torch.float32).dtype == torch.float32


def test_the_tuner_is_prepared_before_its_first_layer() -> None:
    seen = []

    class Tuner(LoraModel):
        def _pre_injection_hook(self, model: nn.Module, config: peft.PeftConfig, adapter_name: str) -> None:
            seen.append((adapter_name, any(isinstance(module, Linear) for module in model.modules())))

    Tuner(perceptron(), {"one": LoraConfig(target_modules=["first"])}, "one")
    assert seen == [("one", False)]


def test_merging_asks_whether_it_may_and_unloading_goes_through_one_method() -> None:
    asked = []

    class Tuner(LoraModel):
        def _check_merge_allowed(self) -> None:
            asked.append("merge")
            super()._check_merge_allowed()

        def _unload_and_optionally_merge(self, *args: object, **kwargs: object) -> nn.Module:
            asked.append("unload")
            return super()._unload_and_optionally_merge(*args, **kwargs)

    for use in ("merge_and_unload", "unload"):
        getattr(Tuner(perceptron(), {"one": LoraConfig(target_modules=["first"])}, "one"), use)()
    assert asked == ["unload", "merge", "unload"]


def test_the_loss_of_pefts_own_monteclora() -> None:
    assert callable(LoraModel._get_monteclora_loss)
    assert all(
        parameter.default is not parameter.empty
        for name, parameter in inspect.signature(LoraModel._get_monteclora_loss).parameters.items()
        if name != "self"
    )


def test_the_checkpointing_function_of_blocks() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    block = model.model.layers[0]
    assert block.gradient_checkpointing
    assert callable(block._gradient_checkpointing_func)


def test_the_map_from_earlier_names_is_the_one_that_peft_reads() -> None:
    assert '"_checkpoint_conversion_mapping"' in inspect.getsource(PeftModel.from_pretrained)
