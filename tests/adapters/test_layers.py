"""Which layers are drawn, in which dtypes and shapes, and which are refused by name."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import monteclora
from monteclora import MonteCLoRAConfig, variational_loss
from monteclora.errors import ConfigError
from monteclora.posterior import dirichlet
from tests.models import (
    TARGETS,
    TASKS,
    Perceptron,
    batch_for,
    bert,
    config_for,
    gpt2,
    gradients,
    llama,
    perceptron,
    posterior_of,
    relative_difference,
    same_global_generators,
    stir,
    t5,
    tokens,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def quantised(bits: int) -> nn.Module:
    """A Llama whose linear layers are bitsandbytes' (their CPU kernels want widths of 64)."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=128)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        weight = linear.weight.data.clone()
        if bits == 4:
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def step(model: nn.Module, build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """One objective backward; every trainable tensor must get a finite gradient."""
    (model(**batch_for(build)).loss + variational_loss(model)).backward()
    found = gradients(model)
    assert all(grad.isfinite().all() for grad in found.values())
    return found


def draws_differ(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_training_draws_and_evaluation_uses_the_mean(build: Callable[..., nn.Module]) -> None:
    model = wrapped(build)
    batch = batch_for(build)
    assert draws_differ(model, batch)
    found = step(model, build)
    assert found["posteriors.0.rho"].ne(0).all()
    model.eval()
    assert not draws_differ(model, batch)


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_the_mean_is_bitwise_a_plain_lora(build: Callable[..., nn.Module]) -> None:
    ours = wrapped(build).eval()
    plain = peft.get_peft_model(
        build(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[build], task_type=TASKS[build])
    ).eval()
    stir(plain)
    with torch.no_grad():
        assert torch.equal(ours(**batch_for(build)).logits, plain(**batch_for(build)).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_really_draw(bits: int) -> None:
    model = monteclora.get_peft_model(quantised(bits), config_for(llama))
    stir(model)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert draws_differ(model, batch_for(llama))
    found = step(model, llama)
    assert found["posteriors.0.rho"].ne(0).all()
    assert found["posteriors.0.eta"].ne(0).all()


@pytest.mark.parametrize("order", ["train first", "evaluate first"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_keep_their_gradients_after_an_evaluation(bits: int, order: str) -> None:
    found = []
    for evaluate in (False, True):
        torch.manual_seed(3)
        model = monteclora.get_peft_model(quantised(bits), config_for(llama))
        stir(model)
        if order == "train first":
            model.train()
        if evaluate:
            with torch.no_grad():
                model.eval()(**batch_for(llama))
        found.append(step(model.train(), llama))
    assert len(found[0]) > 10
    for name, gradient in found[0].items():
        if order == "train first" or bits == 8:
            assert torch.equal(gradient, found[1][name]), name
        else:  # the scales were rounded when the weights were repacked
            torch.testing.assert_close(found[1][name], gradient, rtol=0.2, atol=0.1 * float(gradient.abs().max()))


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_mean_and_merge_are_those_of_plain_lora(bits: int) -> None:
    outputs = []
    for wrap in (
        lambda base: monteclora.get_peft_model(base, config_for(llama)),
        lambda base: peft.get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[llama], task_type="CAUSAL_LM")
        ),
    ):
        torch.manual_seed(3)
        model = wrap(quantised(bits))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            model.eval()
            mean = model(**batch_for(llama)).logits
            model.merge_adapter()
            outputs.append((mean, model(**batch_for(llama)).logits))
    (ours, ours_merged), (plain, plain_merged) = outputs
    assert torch.equal(ours, plain)
    assert torch.equal(ours_merged, plain_merged)


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


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_options(dropout: float, bias: bool, rslora: bool) -> None:
    options: dict[str, Any] = {"lora_dropout": dropout, "lora_bias": bias, "use_rslora": rslora}
    patterns = {"rank_pattern": {"value": 2, "dense": 6}, "alpha_pattern": {"query": 3}}
    model = wrapped(bert, **options, **patterns)
    posterior = posterior_of(model)
    assert {layer.rank for layer in posterior.layers} == {2, 4, 6}
    assert posterior.rho.numel() == sum(layer.rank for layer in posterior.layers)
    step(model, bert)
    # the drawn forward, with the noise off, is peft's own
    plain = peft.get_peft_model(
        bert(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[bert], task_type="SEQ_CLS", **options, **patterns)
    ).train()
    stir(plain)
    quiet = wrapped(bert, sample_scale=0.0, **options, **patterns)
    torch.manual_seed(5)
    ours = quiet(**batch_for(bert)).logits
    torch.manual_seed(5)
    torch.testing.assert_close(ours, plain(**batch_for(bert)).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("components", "rank"), [(1, 1), (1, 4), (24, 1), (24, 4), (64, 4), (256, 2)])
@pytest.mark.parametrize("law", ["exact", "laplace"])
def test_any_number_of_components_and_rank_trains(components: int, rank: int, law: str) -> None:
    """peft: NaN parameters after one step at N = 24, a Cholesky error at N = 64."""
    model = wrapped(llama, num_samples=components, r=rank, dirichlet=law)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(3):
        optimizer.zero_grad()
        loss = model(**batch_for(llama, seed=number)).loss + variational_loss(model)
        loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_posterior_adds_rank_plus_components_numbers_a_layer_and_no_buffer_of_the_size_of_a() -> None:
    """peft: buffer_size x N x n x r floats a layer, even for inference."""
    small, large = wrapped(llama, num_samples=2), wrapped(llama, num_samples=256)
    for model, components in ((small, 2), (large, 256)):
        posterior = posterior_of(model)
        assert sum(p.numel() for p in posterior.parameters()) == 6 * (4 + components)
        model(**batch_for(llama))
        noise = sum(layer.matrix.numel() for layer in posterior.current.layers)
        assert noise == sum(layer.rank * layer.in_features for layer in posterior.layers)
    assert sum(b.numel() for b in posterior_of(small).buffers()) == sum(
        b.numel() for b in posterior_of(large).buffers()
    )
    assert sum(b.numel() for b in posterior_of(large).buffers()) < 200


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("base", "autocast_adapter"), list(itertools.product(DTYPES, [True, False])))
def test_base_and_adapter_dtypes(base: torch.dtype, autocast_adapter: bool) -> None:
    model = monteclora.get_peft_model(
        llama().to(base), config_for(llama), autocast_adapter_dtype=autocast_adapter
    ).train()
    stir(model)
    expected = torch.float32 if autocast_adapter else base
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {weight.dtype for weight in weights} == {expected}
    posterior = posterior_of(model)
    assert {posterior.rho.dtype, posterior.eta.dtype, posterior.scale.dtype} == {torch.float32}
    assert draws_differ(model, batch_for(llama))
    output = model(**batch_for(llama))
    assert output.logits.dtype == base
    found = step(model, llama)
    assert all(found[name].dtype == p.dtype for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_whole_model_keeps_rho_and_eta_in_float32_or_wider(dtype: torch.dtype) -> None:
    model = wrapped(llama).to(dtype)
    posterior = posterior_of(model)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {posterior.rho.dtype, posterior.eta.dtype} == {wanted}
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == dtype
    step(model, llama)


def test_a_low_default_dtype_does_not_reach_the_posterior() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = wrapped(llama)
        assert model.dtype == torch.bfloat16
        posterior = posterior_of(model)
        assert {posterior.rho.dtype, posterior.eta.dtype, posterior.scale.dtype} == {torch.float32}
        step(model, llama)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_autocast_is_close_to_full_precision(build: Callable[..., nn.Module], noise: str) -> None:
    exact, mixed = wrapped(build, noise=noise), wrapped(build, noise=noise)
    expected, batch = step(exact, build), batch_for(build)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed(**batch).loss
    (loss + variational_loss(mixed)).backward()
    found = gradients(mixed)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-4, name


def test_autocast_runs_the_adapter_in_the_low_dtype() -> None:
    seen = []
    model = wrapped(llama)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch_for(llama))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("shape", [(12,), (4, 12), (3, 4, 12), (2, 3, 4, 12)])
def test_inputs_of_one_to_four_dimensions(shape: tuple[int, ...]) -> None:
    model = wrapped(perceptron)
    x = torch.randn(shape, requires_grad=True)
    output = model(x)
    assert output.shape == (*shape[:-1], 5)
    (output.square().sum() + variational_loss(model)).backward()
    assert x.grad is not None
    assert x.grad.ne(0).any()
    gradients(model)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_drawn_weights_have_the_published_variance(covariance: str) -> None:
    """eps enters once, and the mean is lora_A itself: Var(A_ij) = eps^2 E||pi||^2 exp(2 rho_i)."""
    model = wrapped(perceptron, sample_scale=0.3, covariance=covariance, r=3)
    posterior, layer = posterior_of(model), model.base_model.model.first
    with torch.no_grad():
        # B = I and no base layer: the output is A x, and x runs through the unit vectors
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.lora_B["default"].weight.copy_(torch.eye(10, 3))
        layer.scaling["default"] = 1.0
        mu = layer.lora_A["default"].weight
        total, square, count = torch.zeros(3, 12), torch.zeros(3, 12), 1500
        for _ in range(count):
            posterior.draw()
            noise = layer(torch.eye(12))[:, :3].t() - mu
            total += noise
            square += noise.square()
    squared_norm = dirichlet.moments(posterior.eta[0]).squared_norm
    expected = 0.09 * squared_norm * (2 * posterior.rho[:3]).exp()
    # columns share Sigma and pi: a row's mean square varies by about 100 % from draw to draw, so that 13 % are five
    # standard errors
    measured = (square / count).mean(1)
    assert ((measured / expected - 1).abs() < 0.13).all()
    assert ((total / count).abs() < 5 * (expected / count).sqrt().unsqueeze(1)).all()


def test_lora_a_is_the_same_parameter_for_ever_and_learns() -> None:
    """The authors' snapshot replaces it in every forward pass, so that it is never trained."""
    model = wrapped(llama)
    weights = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, llama)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter is weights[name]
            assert torch.equal(parameter, before[name]), "the forward pass changed the mean"
    optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in weights.items())


@pytest.mark.parametrize("part", ["rho", "eta", "lora_A"])
def test_a_broken_posterior_is_not_hidden(part: str) -> None:
    """peft replaces NaN noise by the mean, with a warning that scrolls by."""
    model = wrapped(perceptron)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name).fill_(float("nan"))
    assert model(torch.randn(2, 12)).isnan().all()


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


def test_training_forwards_leave_the_global_generator_alone() -> None:
    model = wrapped(llama, noise="per_example")
    with same_global_generators():
        model(**batch_for(llama)).loss.backward()


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


def test_modules_to_save_train_beside_the_adapter() -> None:
    model = wrapped(bert, target_modules=["query"], modules_to_save=["classifier"])
    found = step(model, bert)
    assert any("classifier.modules_to_save" in name for name in found)


def test_repeated_layers_share_one_draw() -> None:
    """A layer that is called twice in one forward pass (as in ALBERT) has one A."""

    class Twice(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.first(x), self.first(x)])

    torch.manual_seed(0)
    model = monteclora.get_peft_model(Twice(), config_for(perceptron, target_modules=["first"]))
    stir(model)
    once, again = model(torch.randn(3, 12))
    assert torch.equal(once, again)
    assert posterior_of(model).draws == 1


def test_unused_and_skipped_layers() -> None:
    """LayerDrop and MoE skip layers at random; their part of rho has no gradient then, and nothing fails."""

    class Skipping(Perceptron):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return hidden[..., :5] if self.skip else self.second(hidden)

    torch.manual_seed(0)
    base = Skipping()
    model = monteclora.get_peft_model(base, config_for(perceptron, kl_weight=0.0, coop_weight=0.0))
    stir(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(6):
        base.skip = number % 2 == 1
        optimizer.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        rho = posterior_of(model).rho.grad
        assert rho[:4].ne(0).all()
        assert rho[4:].eq(0).all() if base.skip else rho[4:].ne(0).all()
        optimizer.step()


def test_encoder_decoder_draws_once_for_both_stacks() -> None:
    model = wrapped(t5)
    step(model, t5)
    assert posterior_of(model).draws == 1
    names = {layer.name.split(".")[0] for layer in posterior_of(model).layers}
    assert names == {"encoder", "decoder"}
    model.eval()
    generated = model.generate(input_ids=tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 2


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
