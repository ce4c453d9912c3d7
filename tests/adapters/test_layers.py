"""Which layers are drawn, in which dtypes and shapes, and by which way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import monteclora
from monteclora import variational_loss
from monteclora.adapters.layers import DrawnLinear
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
    same_global_generators,
    step,
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


@contextmanager
def peft_forward(model: nn.Module) -> Iterator[list[nn.Module]]:
    """peft's own forward pass in all layers, which are given."""
    layers = [module for module in model.modules() if type(module) is DrawnLinear]
    for layer in layers:
        layer.__class__ = Linear
    try:
        yield layers
    finally:
        for layer in layers:
            layer.__class__ = DrawnLinear


@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize("way", ["drawn", "mean", "sampled", "switched off", "low dtype", "autocast", "dropout"])
def test_the_short_way_is_bitwise_pefts(way: str, noise: str) -> None:
    model = wrapped(llama, lora_dropout=0.3 if way == "dropout" else 0.0, noise=noise)
    if way == "low dtype":
        model.to(torch.bfloat16)
    posterior, batch = posterior_of(model), batch_for(llama)
    model.train(way not in ("mean", "sampled"))
    posterior.enabled = way != "switched off"

    def outcome() -> list[Tensor]:
        torch.manual_seed(3)
        posterior.draws = 5
        model.zero_grad()
        sampling = monteclora.posterior_sampling(model, seed=2) if way == "sampled" else nullcontext()
        with sampling, torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            output = model(**batch)
        output.loss.backward()
        return [output.logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    short = outcome()
    with peft_forward(model) as layers:
        assert len(layers) == len(posterior.layers)
        long = outcome()
    assert len(short) == len(long) > 8
    assert all(map(torch.equal, short, long))


def test_whatever_else_is_asked_of_a_layer_goes_pefts_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    forward = Linear.forward

    def noted(self: Linear, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", noted)
    model, batch = wrapped(llama), batch_for(llama)
    model(**batch)
    model.eval()(**batch)
    assert not asked
    mean = model(**batch).logits
    count = len(posterior_of(model).layers)
    names = ["default", "__base__", "default"]
    mixed = model(**batch, adapter_names=names).logits
    assert len(asked) == count
    torch.testing.assert_close(mixed[::2], mean[::2])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(**batch).logits[1])
    assert len(asked) == 2 * count
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, mean)
    assert len(asked) == 3 * count
    model.unmerge_adapter()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS[llama], task_type=TASKS[llama]))
    model.base_model.set_adapter(["default", "plain"])
    model.train()(**batch).loss.backward()
    assert len(asked) == 4 * count
    model.set_adapter("plain")
    model(**batch)
    assert len(asked) == 5 * count
    model.set_adapter("default")
    model(**batch)
    assert len(asked) == 5 * count


def draws_differ(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_training_draws_and_evaluation_uses_the_mean(build: Callable[..., nn.Module]) -> None:
    model = wrapped(build)
    batch = batch_for(build)
    assert draws_differ(model, batch)
    found = step(model, build)
    assert found["posteriors.default.rho"].ne(0).all()
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
    assert found["posteriors.default.rho"].ne(0).all()
    assert found["posteriors.default.eta"].ne(0).all()


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
    model = wrapped(llama, num_components=components, r=rank, dirichlet=law)
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
    small, large = wrapped(llama, num_components=2), wrapped(llama, num_components=256)
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
    squared_norm = dirichlet.mean_squared_norm(posterior.eta[0])
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


def test_training_forwards_leave_the_global_generator_alone() -> None:
    model = wrapped(llama, noise="per_example")
    with same_global_generators():
        model(**batch_for(llama)).loss.backward()


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
