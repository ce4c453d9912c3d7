"""Flipout: every example has noise of its own with the law of shared noise; the gradient's noise falls with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import monteclora
from monteclora import MonteCLoRAConfig
from monteclora.adapters.rows import row_order
from monteclora.errors import ConfigError
from tests.models import (
    Perceptron,
    batch_for,
    bert,
    config_for,
    gradients,
    llama,
    perceptron,
    posterior_of,
    relative_difference,
    stir,
    t5,
    wrapped,
)

BATCH = 16


def one_layer(noise: str, seed: int = 0, scale: float = 0.3) -> Any:
    """A single linear layer, so that everything about it can be written down."""
    torch.manual_seed(1)
    model = monteclora.get_peft_model(
        nn.Sequential(nn.Linear(12, 6, bias=False)),
        MonteCLoRAConfig(r=3, lora_alpha=3, target_modules=["0"], sample_scale=scale, noise=noise, noise_seed=seed),
    )
    stir(model)
    return model.train()


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    """1500 training forwards of three examples, of which the first two are the same; shape (1500, 3, 6)."""
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))[[0, 0, 1]]
    models = {
        "shared": one_layer("shared"),
        "each": one_layer("per_example", seed=1),
        "wider": one_layer("per_example", seed=2, scale=0.5),
    }
    with torch.no_grad():
        return {name: torch.stack([model(x) for _ in range(1500)]) for name, model in models.items()}


def test_the_law_of_each_example_is_that_of_shared_noise(outputs: dict[str, Tensor]) -> None:
    for example in range(3):
        for unit in range(3):
            shared, each, wider = (outputs[name][:, example, unit] for name in ("shared", "each", "wider"))
            assert stats.ks_2samp(shared, each).pvalue > 1e-4
            assert stats.ks_2samp(shared, wider).pvalue < 1e-4, "the comparison has no power"


def correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(0), other - other.mean(0)
    return float((one * other).sum() / (one.norm() * other.norm()))


def test_examples_are_decorrelated(outputs: dict[str, Tensor]) -> None:
    shared, each = outputs["shared"], outputs["each"]
    assert correlation(shared[:, 0], shared[:, 1]) == pytest.approx(1.0)
    assert abs(correlation(each[:, 0], each[:, 1])) < 5 / 1500**0.5


def test_tokens_of_an_example_share_its_noise() -> None:
    x = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(3)).expand(2, 4, 12)
    output = one_layer("per_example")(x)
    torch.testing.assert_close(output, output[:, :1].expand_as(output))
    assert not torch.equal(output[0], output[1])


def test_gradient_noise_falls_with_the_batch_size() -> None:
    """One example sixteen times: the noise of the gradient does not fall when it is shared, else by sixteen."""

    def variance(noise: str) -> float:
        model = one_layer(noise)
        x = torch.randn(1, 12, generator=torch.Generator().manual_seed(5)).repeat(BATCH, 1)
        target = torch.randn(1, 6, generator=torch.Generator().manual_seed(6))
        weight = model.base_model.model[0].lora_B["default"].weight
        found = [torch.autograd.grad((model(x) * target).sum(1).mean(), weight)[0] for _ in range(500)]
        return float(torch.stack(found).var(0).sum())

    ratio = variance("shared") / variance("per_example")
    assert 0.7 * BATCH < ratio < 1.4 * BATCH


@pytest.mark.parametrize("build", [bert, llama, t5])
def test_gradients_are_those_of_one_adapter_for_each_example(build: Callable[..., nn.Module]) -> None:
    """In a whole model: run each example alone, with A = mu + Delta o (s u^T) put in place of lora_A."""
    model, reference = wrapped(build, noise="per_example"), wrapped(build, sample_scale=0.0)
    batch = batch_for(build, rows=3)
    loss = model(**batch).logits.square().sum()
    loss.backward()
    draw = posterior_of(model).current
    total: dict[str, Tensor] = {}
    outputs = 0.0
    for example in range(3):
        reference.zero_grad()
        saved = {}
        for layer, part in zip(posterior_of(model).layers, draw.layers, strict=True):
            weight = reference.base_model.model.get_submodule(layer.name).lora_A["default"].weight
            saved[weight] = weight.detach().clone()
            with torch.no_grad():
                weight += part.matrix * torch.outer(part.sign_out[example], part.sign_in[example])
        value = reference(**{k: v[example : example + 1] for k, v in batch.items()}).logits.square().sum()
        value.backward()
        outputs = outputs + value.item()
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None and "posteriors" not in name:
                total[name] = total.get(name, 0.0) + parameter.grad
        with torch.no_grad():
            for weight, old in saved.items():
                weight.copy_(old)
    assert loss.item() == pytest.approx(outputs, rel=1e-5)
    found = {name: gradient for name, gradient in gradients(model).items() if name in total}
    assert relative_difference(found, total) < 1e-4


def test_models_that_regroup_their_examples_are_refused() -> None:
    class Regrouping(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[1:])

    model = monteclora.get_peft_model(Regrouping(), config_for(perceptron, noise="per_example"))
    with pytest.raises(
        ConfigError, match=r"4 examples .* in layer 'first' \(its input has the shape \(3, 12\)\)"
    ) as caught:
        model(torch.randn(4, 12))
    assert "noise='shared'" in caught.value.hint
    # and the model goes on
    model.eval()(torch.randn(4, 12))
    shared = wrapped(perceptron)
    shared(torch.randn(4, 12))


def test_the_batch_size_comes_from_whatever_the_model_is_called_with() -> None:
    model = wrapped(llama, noise="per_example")
    backbone = model.base_model.model.model
    embeddings = backbone.embed_tokens(torch.arange(2, 8).view(2, 3))
    for call in (
        lambda: model(input_ids=torch.arange(2, 8).view(2, 3)),
        lambda: model(torch.arange(2, 8).view(2, 3)),
        lambda: model(inputs_embeds=embeddings),
        lambda: backbone(inputs_embeds=embeddings),
        lambda: model(position_ids=torch.arange(3).unsqueeze(0), input_ids=torch.arange(2, 8).view(2, 3)),
    ):
        call()
        assert posterior_of(model).current.layers[0].sign_in.shape == (2, 32)


def test_rows_of_one_vector_each_are_told_apart_whatever_they_are() -> None:
    """In a single random direction a marked row happens to stay where it is, in one of a hundred batches."""
    model = wrapped(perceptron)
    generator = torch.Generator().manual_seed(0)
    layers = model.base_model.hooked_layers["default"]
    for _ in range(200):
        assert row_order(model, (torch.randn(2, 12, generator=generator),), {}, layers, 2).disorder is None
