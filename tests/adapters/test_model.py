"""A wrapped model through everything that is done to models: copies, averages, several adapters, merging."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import monteclora
from monteclora import MonteCLoRAConfig, posterior_sampling, variational_loss
from monteclora.adapters.active import active_posteriors, one_draw
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.errors import ConfigError
from tests.models import (
    TARGETS,
    TASKS,
    batch_for,
    bert,
    config_for,
    gpt2,
    gradients,
    llama,
    llama_classifier,
    perceptron,
    posterior_of,
    relative_difference,
    stir,
    t5,
    trainable,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def train_step(model: nn.Module, build: Callable[..., nn.Module] = llama, seed: int = 1) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer.zero_grad()
    (model(**batch_for(build, seed=seed)).loss + variational_loss(model)).backward()
    optimizer.step()


# -- paired with plain LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5, llama_classifier])
def test_initial_weights_head_and_generators_are_those_of_plain_lora(build: Callable[..., nn.Module]) -> None:
    shared: dict[str, Any] = {
        "r": 4,
        "target_modules": TARGETS[build],
        "task_type": TASKS[build],
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
    }
    results = []
    for wrap, config in (
        (monteclora.get_peft_model, MonteCLoRAConfig(**shared, noise_seed=77)),
        (peft.get_peft_model, LoraConfig(**shared)),
    ):
        base = build()
        torch.manual_seed(4)
        model = wrap(base, config)
        state = {n: t.clone() for n, t in model.state_dict().items() if "posteriors" not in n}
        results.append((state, torch.get_rng_state(), type(model).__mro__))
    (ours, generator, kinds), (plain, expected, others) = results
    assert torch.equal(generator, expected)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    assert others[0] in kinds, "isinstance checks against peft's classes must hold"


def test_dropout_masks_are_those_of_plain_lora() -> None:
    masks: list[list[Tensor]] = []
    for wrap, config in ((monteclora.get_peft_model, MonteCLoRAConfig), (peft.get_peft_model, LoraConfig)):
        model = wrap(
            bert(hidden_dropout_prob=0.2), config(target_modules=TARGETS[bert], task_type="SEQ_CLS", lora_dropout=0.5)
        ).train()
        seen: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p:
                module.register_forward_hook(lambda m, i, output, seen=seen: seen.append(output.eq(0)))
        torch.manual_seed(6)
        for seed in (1, 2):
            model(**batch_for(bert, seed=seed)).loss.backward()
        masks.append(seen)
    ours, plain = masks
    assert len(ours) == len(plain) > 10
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("noise", ["shared", "per_example"])
def test_without_noise_and_regulariser_training_is_that_of_plain_lora(noise: str) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": TARGETS[llama], "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    quiet = MonteCLoRAConfig(**options, sample_scale=0.0, kl_weight=0.0, coop_weight=0.0, noise=noise)
    results = []
    for wrap, config in ((monteclora.get_peft_model, quiet), (peft.get_peft_model, LoraConfig(**options))):
        base = llama()
        torch.manual_seed(4)
        model = wrap(base, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for seed in range(20):
            optimizer.zero_grad()
            loss = model(**batch_for(llama, seed=seed)).loss
            if isinstance(model, MonteCLoRAModel):
                loss = loss + variational_loss(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, {n: p for n, p in model.named_parameters() if "lora_" in n}))
    (ours, weights), (plain, others) = results
    assert ours == pytest.approx(plain, rel=1e-4)
    # Adam turns rounding of near-zero gradients into steps: the weights agree to a fraction of the way they went
    assert max((weights[name] - others[name]).abs().max() for name in weights) < 2e-3


# -- copies --------------------------------------------------------------------------------------------------------


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make", "when"),
    [
        *itertools.product([by_deepcopy, by_pickle, by_torch_save], ["before", "after a step", "inside a graph"]),
        (by_deepcopy, "checkpointed"),  # transformers' own hook for it cannot be pickled
    ],
)
def test_a_copy_trains_on_its_own(make: Callable[[nn.Module], nn.Module], when: str) -> None:
    model = wrapped(llama)
    if when == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if when != "before":
        train_step(model)
    loss = model(**batch_for(llama)).loss if when == "inside a graph" else None
    twin = make(model)
    if loss is not None:
        loss.backward()
        model.zero_grad()
    assert posterior_of(twin).draws == posterior_of(model).draws
    assert posterior_of(twin) is not posterior_of(model)
    before = trainable(model)
    for seed in (2, 3):
        train_step(twin, seed=seed)
    assert all(torch.equal(before[name], value) for name, value in trainable(model).items()), "the original moved"
    for seed in (2, 3):
        train_step(model, seed=seed)
    after, other = trainable(model), trainable(twin)
    assert all(torch.equal(after[name], other[name]) for name in after), "the copy went another way"


def test_copying_the_inner_model_alone() -> None:
    model = wrapped(llama)
    twin = copy.deepcopy(model.base_model)
    batch = batch_for(llama)
    assert torch.equal(model(**batch).logits, twin(**batch).logits)
    assert posterior_of(model).draws == twin.posterior("default").draws == 1


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(average: str) -> None:
    model = wrapped(llama)
    train_step(model)
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if average == "ema" else {}
    averaged = AveragedModel(model, **options)
    history = []
    for seed in (2, 3):
        averaged.update_parameters(model)
        history.append(trainable(model))
        train_step(model, seed=seed)
    inner = averaged.module
    expected = {name: (history[0][name] + history[1][name]) / 2 for name in history[0]}
    found = trainable(inner)
    assert {"posteriors.default.rho", "posteriors.default.eta"} <= found.keys()
    assert relative_difference(expected, found) < 1e-6
    draws = posterior_of(model).draws
    averaged.train()
    assert not torch.equal(averaged(**batch_for(llama)).logits, averaged(**batch_for(llama)).logits)
    assert posterior_of(model).draws == draws, "the average drew from the model's stream"
    averaged.eval()
    with torch.no_grad():
        assert torch.equal(averaged(**batch_for(llama)).logits, averaged(**batch_for(llama)).logits)
    assert monteclora.predict(inner, {"input_ids": batch_for(llama)["input_ids"]}, num_samples=2).epistemic.gt(0).all()


def test_state_dict_round_trip() -> None:
    model, other = wrapped(llama), wrapped(llama, seed=0)
    train_step(model)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, trainable(other)[name]) for name, value in trainable(model).items())


# -- several adapters ----------------------------------------------------------------------------------------------


def two_adapters() -> Any:
    model = wrapped(llama)
    model.add_adapter("second", config_for(llama, r=2, target_modules=["q_proj"], noise_seed=5, kl_weight=0.5))
    stir(model, seed=7)
    return model.train()


def names_with_gradient(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_second_adapter_waits_until_it_is_chosen() -> None:
    model = two_adapters()
    first, second = posterior_of(model), posterior_of(model, "second")
    assert [layer.rank for layer in second.layers] == [2, 2]
    model(**batch_for(llama))
    assert (first.draws, second.draws) == (1, 0)
    assert not second.rho.requires_grad
    model.set_adapter("second")
    assert active_posteriors(model) == [second]
    (model(**batch_for(llama)).loss + variational_loss(model)).backward()
    assert (first.draws, second.draws) == (1, 1)
    found = gradients(model)
    assert {name for name in found if "posteriors" in name} == {
        "posteriors.second.rho",
        "posteriors.second.eta",
    }
    assert all("second" in name for name in found if "lora_" in name)


def test_two_adapters_active_at_once() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    first, second = posterior_of(model), posterior_of(model, "second")
    (model(**batch_for(llama)).loss + variational_loss(model)).backward()
    assert (first.draws, second.draws) == (1, 1)
    assert {name for name in gradients(model) if "posteriors" in name} == {
        f"posteriors.{name}.{part}" for name in ("default", "second") for part in ("rho", "eta")
    }
    assert len(active_posteriors(model)) == 2
    expected = sum(posterior.regulariser().loss for posterior in (first, second))
    assert variational_loss(model).item() == pytest.approx(expected.item())
    model.eval()
    batch = {"input_ids": batch_for(llama)["input_ids"]}
    with posterior_sampling(model, seed=3), torch.no_grad():
        both = model(**batch).logits
    assert not torch.equal(both, model(**batch).logits)


@pytest.mark.parametrize("kind", ["posterior", "plain"])
def test_an_adapter_that_is_added_in_evaluation_mode_is_in_that_mode(kind: str) -> None:
    """peft makes the layers and the dropout of an added adapter in training mode, whatever the model's."""
    model = wrapped(llama, target_modules=["q_proj"]).eval()
    config = config_for(llama, target_modules=["q_proj", "k_proj"], lora_dropout=0.5, init_lora_weights=False)
    model.add_adapter("second", config if kind == "posterior" else config.plain_lora())
    model.set_adapter("second")
    batch = batch_for(llama)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_deleting_an_adapter_hands_over_to_the_other() -> None:
    model = two_adapters()
    train_step(model)
    second = posterior_of(model, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert list(model.base_model.posteriors) == ["second"]
    assert active_posteriors(model) == [second]
    assert second.rho.requires_grad == any("lora_A.second" in name for name in names_with_gradient(model))
    model.set_adapter("second")
    train_step(model)
    assert second.draws == 1
    model.add_adapter("third", config_for(llama))
    model.set_adapter("third")
    train_step(model)
    assert posterior_of(model, "third").draws == 1


def test_deleting_the_waiting_adapter_leaves_the_active_one_alone() -> None:
    model = two_adapters()
    model.delete_adapter("second")
    train_step(model)
    assert posterior_of(model).draws == 1
    assert active_posteriors(model) == [posterior_of(model)]


def test_a_plain_lora_beside_a_drawn_one() -> None:
    model = wrapped(llama)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("plain")
    assert active_posteriors(model) == []
    assert float(variational_loss(model)) == 0.0
    batch = batch_for(llama)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.base_model.set_adapter(["default", "plain"])
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_loading_a_second_adapter_beside_the_first(tmp_path: Path) -> None:
    source = wrapped(llama, r=3, noise_seed=9)
    train_step(source)
    source.save_pretrained(tmp_path)
    model = wrapped(llama)
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    assert posterior_of(model, "loaded").rho.requires_grad
    model.set_adapter("loaded")
    assert posterior_of(model, "loaded").rho.requires_grad
    assert torch.equal(posterior_of(model, "loaded").rho, posterior_of(source).rho)
    batch = batch_for(llama)
    assert torch.equal(model(**batch).logits, source(**batch).logits), "the same next training draw"
    model.eval()
    source.eval()
    assert torch.equal(model(**batch).logits, source(**batch).logits)


def test_mixed_batches_of_adapters_at_inference() -> None:
    model = two_adapters().eval()
    batch = {"input_ids": batch_for(llama)["input_ids"]}
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(**batch).logits[row], rtol=1e-5, atol=1e-6)


# -- merging and unloading -----------------------------------------------------------------------------------------


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("build", [bert, llama, gpt2, perceptron])
def test_merging_is_that_of_plain_lora_and_can_be_undone(build: Callable[..., nn.Module], safe: bool) -> None:
    options: dict[str, Any] = {"use_rslora": True}
    if build is bert:
        options["lora_bias"] = True
    ours = wrapped(build, **options)
    plain = peft.get_peft_model(
        build(),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[build], task_type=TASKS.get(build), **options),
    )
    stir(plain)
    base = {name: tensor.clone() for name, tensor in ours.state_dict().items() if "base_layer" in name}
    for model in (ours, plain):
        model.merge_adapter(safe_merge=safe)
    merged = {name: tensor for name, tensor in plain.state_dict().items() if "base_layer" in name}
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in merged.items())
    ours.unmerge_adapter()
    for name, tensor in base.items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_merge_and_unload_gives_the_mean_and_takes_every_hook_away(build: Callable[..., nn.Module]) -> None:
    model = wrapped(build)
    model(**batch_for(build))
    model.eval()
    with torch.no_grad():
        mean = model(**batch_for(build)).logits
        base = model.merge_and_unload()
        torch.testing.assert_close(base(**batch_for(build)).logits, mean, rtol=1e-4, atol=1e-5)
    assert type(base) is type(build())
    assert list(base.state_dict()) == list(build().state_dict())
    assert no_hooks(base)
    base.train()(**batch_for(build)).loss.backward() if any(p.requires_grad for p in base.parameters()) else None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        again = monteclora.get_peft_model(base, config_for(build))
    train_step(again, build)
    assert posterior_of(again).draws == 1


def test_unload_gives_the_base_model_back() -> None:
    model = wrapped(llama)
    train_step(model)
    base = model.unload()
    assert no_hooks(base)
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in llama().state_dict().items())
    assert torch.equal(base(**batch_for(llama)).logits, llama()(**batch_for(llama)).logits)


def test_disable_adapter_is_the_base_model() -> None:
    model = wrapped(llama)
    batch = batch_for(llama)
    expected = llama()(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


def test_a_bf16_model_merges_as_plain_lora_does() -> None:
    merged = []
    for wrap, config in ((monteclora.get_peft_model, MonteCLoRAConfig), (peft.get_peft_model, LoraConfig)):
        torch.manual_seed(0)
        model = wrap(llama().to(torch.bfloat16), config(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        base = model.merge_and_unload(safe_merge=True)
        assert base.dtype == torch.bfloat16
        merged.append(base.state_dict())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])


# -- low memory, freezing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable_adapter", [False, True])
def test_low_cpu_mem_usage_keeps_the_learned_posterior(tmp_path: Path, trainable_adapter: bool) -> None:
    model = wrapped(llama)
    train_step(model)
    model.save_pretrained(tmp_path)
    loaded = monteclora.from_pretrained(llama(), tmp_path, is_trainable=trainable_adapter, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    for name in ("rho", "eta", "scale"):
        assert torch.equal(getattr(posterior_of(loaded), name), getattr(posterior_of(model), name))
    assert posterior_of(loaded).rho.requires_grad is trainable_adapter
    batch = batch_for(llama)
    loaded.train()
    if not trainable_adapter:
        model.eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    beside = wrapped(llama)
    beside.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert torch.equal(posterior_of(beside, "second").eta, posterior_of(model).eta)


def test_an_adapter_wrapped_without_memory_can_be_filled(tmp_path: Path) -> None:
    model = wrapped(llama)
    train_step(model)
    model.save_pretrained(tmp_path)
    empty = monteclora.get_peft_model(llama(), config_for(llama), low_cpu_mem_usage=True)
    empty.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=True)
    empty.train()
    batch = batch_for(llama)
    assert torch.equal(empty(**batch).logits, model(**batch).logits)
    train_step(empty)
    train_step(model)
    assert relative_difference(trainable(model), trainable(empty)) == 0.0


def test_freezing_follows_the_adapter() -> None:
    model = wrapped(llama)
    posterior = posterior_of(model)
    model.set_requires_grad("default", False)
    assert not posterior.rho.requires_grad
    model.set_requires_grad(["default"], True)
    assert posterior.eta.requires_grad
    model.set_adapter("default", inference_mode=True)
    assert not posterior.rho.requires_grad
    frozen = monteclora.get_peft_model(llama(), config_for(llama, inference_mode=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_adapter_that_is_not_trained_is_at_its_mean_in_training_mode() -> None:
    model, batch = wrapped(llama), batch_for(llama)
    mean = model.eval()(**batch).logits
    model.train()
    assert not torch.equal(model(**batch).logits, mean)
    model.requires_grad_(False)
    assert torch.equal(model(**batch).logits, mean)  # nor under the draw of the last forward pass
    for part in ("lora_B", "posteriors"):  # whatever of it is trained
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)
        assert not torch.equal(model(**batch).logits, mean)


def test_the_reference_copy_of_a_policy_is_at_its_mean() -> None:
    """As trl makes and calls it: added, copied by name, switched on, trainable, where there are no gradients."""
    model, batch = wrapped(llama), batch_for(llama)
    stir(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    mean = model.eval()(**batch).logits
    model.train()
    with torch.no_grad():
        model.set_adapter("ref")
        assert torch.equal(model(**batch).logits, mean)
        model.set_adapter("default")
        assert not torch.equal(model(**batch).logits, mean)  # a policy that is scored
    model.set_adapter("ref")
    assert not torch.equal(model(**batch).logits, mean)  # trained from now on
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, mean)


def test_a_generation_in_training_mode_has_one_draw() -> None:
    model, other = wrapped(llama), wrapped(llama)
    for one in (model, other):
        stir(one)
    ids = batch_for(llama)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, **options)
        assert posterior_of(model).draws == 1
        # without a cache, a token at a time, under that draw
        with one_draw(other, 0):
            grown = ids
            for _ in range(6):
                grown = torch.cat([grown, other(input_ids=grown).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens, grown)
        mean = model.eval().generate(input_ids=ids, **options)
    assert not torch.equal(mean, tokens)
    assert not hasattr(wrapped(bert).base_model, "generate")


def test_counting_parameters_includes_the_posterior() -> None:
    ours, _ = wrapped(llama).get_nb_trainable_parameters()
    plain, _ = peft.get_peft_model(
        llama(), LoraConfig(r=4, target_modules=TARGETS[llama])
    ).get_nb_trainable_parameters()
    assert ours - plain == 6 * (4 + 4)


def test_mixed_peft_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="mixed") as caught:
        monteclora.get_peft_model(llama(), config_for(llama), mixed=True)
    assert caught.value.hint


def test_wrapping_a_wrapped_model_is_refused_or_right() -> None:
    model = wrapped(llama)
    with pytest.raises(ConfigError) as caught:
        monteclora.get_peft_model(model, config_for(llama))
    assert "add_adapter" in caught.value.hint
    assert posterior_of(model).draws == 0
    train_step(model)


def test_a_model_whose_layers_were_adapted_before_is_refused() -> None:
    """The first wrapper's draws would go on beside the second one's."""
    base = llama()
    first = monteclora.get_peft_model(base, config_for(llama))
    with pytest.raises(ConfigError, match=r"was adapted before: 'model\.layers\.0\.self_attn\.q_proj'"):
        monteclora.get_peft_model(base, config_for(llama))
    with pytest.raises(ConfigError, match="was adapted before"):
        monteclora.get_peft_model(
            peft.get_peft_model(bert(), LoraConfig(target_modules=["query"])).get_base_model(), config_for(bert)
        )
    monteclora.get_peft_model(first.unload(), config_for(llama))
