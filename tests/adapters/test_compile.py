"""torch.compile: no break in our layer, no graph beyond plain LoRA's, and the gradients of the uncompiled model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

from monteclora import posterior_sampling, variational_loss
from monteclora.errors import ConfigError
from tests.models import (
    TARGETS,
    batch_for,
    bert,
    gradients,
    llama,
    perceptron,
    posterior_of,
    relative_difference,
    wrapped,
)

BACKEND = "aot_eager"  # traces and differentiates as the default one does, without a C++ compiler
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_blocks(model: nn.Module, backend: str = BACKEND) -> None:
    """Each decoder block apart, as accelerate and TRL do; ``fullgraph`` raises at any break."""
    blocks = [m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "BertLayer")]
    assert blocks
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)


def steps(
    model: nn.Module, call: Callable[..., Any], build: Callable[..., nn.Module] = llama, count: int = 3
) -> list[dict[str, Tensor]]:
    """The gradients of a few steps; the number of graphs must stay what it is after the first one."""
    found, number = [], None
    options = {} if build is bert else {"use_cache": False}
    for seed in range(count):
        model.zero_grad()
        loss = call(**batch_for(build, seed=seed), **options).loss
        if hasattr(model, "posteriors"):
            loss = loss + variational_loss(model)
        loss.backward()
        found.append(gradients(model))
        number = graphs() if number is None else number
        assert graphs() == number, "compiled again after the first step"
    return found


def agree(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(relative_difference(x, y) < TOLERANCE for x, y in zip(one, other, strict=True))


def test_blocks_compile_whole_and_as_often_as_plain_lora() -> None:
    base = {"num_hidden_layers": 10}  # more than the compiler's limit of variants of one function
    plain = peft.get_peft_model(llama(**base), LoraConfig(r=4, target_modules=TARGETS[llama])).train()
    compile_blocks(plain)
    steps(plain, plain, count=2)
    expected = graphs()
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = wrapped(llama, base=base), wrapped(llama, base=base)
    compile_blocks(compiled)
    assert agree(steps(eager, eager, count=2), steps(compiled, compiled, count=2))
    assert graphs() == expected
    assert not counters["graph_break"]
    assert posterior_of(compiled).draws == 2


def compiled_layers(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model, and its twin in which each LoRA layer is compiled by itself."""
    eager, compiled = wrapped(perceptron, **options), wrapped(perceptron, **options)
    for layer in (compiled.base_model.model.first, compiled.base_model.model.second):
        layer.compile(backend=BACKEND, fullgraph=True)
    return eager, compiled


@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({}, False),
        ({}, True),
        ({"noise": "per_example", "lora_bias": True}, False),
        ({"covariance": "full", "lora_dropout": 0.5}, False),
    ],
    ids=str,
)
def test_a_compiled_layer_in_training(options: dict[str, Any], autocast: bool) -> None:
    eager, compiled = compiled_layers(**options)
    number = None
    for seed in range(3):
        found = []
        for model in (eager, compiled):
            model.zero_grad()
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(torch.randn(4, 3, 12))
            output.float().square().sum().backward()
            found.append(gradients(model))
        assert relative_difference(*found) < (5e-2 if autocast else TOLERANCE)
        number = graphs() if number is None else number
        assert graphs() == number, "compiled again after the first step"
    assert not counters["graph_break"]


def test_a_compiled_layer_in_evaluation_and_under_posterior_draws() -> None:
    eager, compiled = compiled_layers()
    x = torch.randn(2, 12).repeat(3, 1)
    for model in (eager, compiled):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
        for count in (1, 3):
            with (
                posterior_sampling(compiled, seed=1, num_samples=count),
                posterior_sampling(eager, seed=1, num_samples=count),
            ):
                for _ in range(2):
                    torch.testing.assert_close(compiled(x), eager(x))
                assert not torch.equal(compiled(x), compiled(x))


def test_compiled_blocks_of_a_posterior_that_is_switched_off() -> None:
    """The first phase of post-hoc training: no draw is asked for, which would break every block's graph."""
    eager, compiled = wrapped(llama), wrapped(llama)
    for model in (eager, compiled):
        posterior_of(model).enabled = False
        posterior_of(model).requires_grad_(False)
    compile_blocks(compiled)
    assert agree(steps(eager, eager, count=2), steps(compiled, compiled, count=2))
    assert not counters["graph_break"]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_block_called_alone_does_not_pass_the_mean_off_as_a_draw(fullgraph: bool) -> None:
    model = wrapped(llama).eval()
    backbone = model.get_base_model().model
    hidden = torch.randn(2, 5, 32)
    positions = backbone.rotary_emb(hidden, torch.arange(5).unsqueeze(0))
    block = backbone.layers[0]
    block.compile(backend=BACKEND, fullgraph=fullgraph)
    with torch.no_grad():
        block(hidden, position_embeddings=positions)
        with posterior_sampling(model, seed=1):
            drawn = [model(**batch_for(llama), use_cache=False).logits for _ in range(2)]
            assert not torch.equal(*drawn)
            refusal = torch._dynamo.exc.Unsupported if fullgraph else ConfigError
            with pytest.raises(refusal, match=r"a compiled block .*outside"):
                block(hidden, position_embeddings=positions)
        with posterior_sampling(model, seed=1, resample=False):
            once = [block(hidden, position_embeddings=positions)[0] for _ in range(2)]
        assert torch.equal(*once)
        assert not torch.equal(once[0], block(hidden, position_embeddings=positions)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_blocks_with_activation_checkpointing(reentrant: bool) -> None:
    eager, compiled = wrapped(llama), wrapped(llama)
    for model in (eager, compiled):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    compile_blocks(compiled)

    def two_forwards(model: nn.Module) -> Callable[..., Any]:
        def call(**batch: Tensor) -> Any:
            first, second = model(**batch), model(**{**batch, "input_ids": batch["input_ids"].flip(1)})
            first.loss = first.loss + second.loss
            return first

        return call

    assert agree(steps(eager, two_forwards(eager)), steps(compiled, two_forwards(compiled)))
    assert not counters["graph_break"]
    assert counters["stats"]["calls_captured"] > 0


@pytest.mark.parametrize("build", [llama, pytest.param(bert, marks=pytest.mark.slow)])
def test_the_whole_model_compiled(build: Callable[..., nn.Module]) -> None:
    # BERT settles the type of its problem in the first step, and would be compiled again for it
    base = {"problem_type": "single_label_classification"} if build is bert else {}
    eager, compiled = wrapped(build, base=base), wrapped(build, base=base)
    assert agree(steps(eager, eager, build), steps(compiled, torch.compile(compiled, backend=BACKEND), build))
    assert posterior_of(compiled).draws == 3
    breaks = [reason for reason in counters["graph_break"] if "DrawScope._draw" not in reason]
    assert not breaks, "the draw itself is made outside, and nothing else breaks the graph"


def test_the_whole_model_is_one_graph() -> None:
    """As with plain LoRA: the draw is made by the outermost hook, before the graph begins."""
    eager, compiled = wrapped(llama), wrapped(llama)
    assert agree(steps(eager, eager), steps(compiled, torch.compile(compiled, backend=BACKEND, fullgraph=True)))
    assert posterior_of(compiled).draws == 3


@pytest.mark.slow
def test_the_model_compiled_in_place_trains() -> None:
    eager, compiled = wrapped(llama), wrapped(llama)
    compiled.compile(backend=BACKEND)
    for model in (eager, compiled):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(3):
            optimizer.zero_grad()
            (model(**batch_for(llama, seed=seed), use_cache=False).loss + variational_loss(model)).backward()
            optimizer.step()
    ours, theirs = dict(compiled.named_parameters()), dict(eager.named_parameters())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_default_backend() -> None:
    eager, compiled = wrapped(llama), wrapped(llama)
    compile_blocks(compiled, backend="inductor")
    assert agree(steps(eager, eager), steps(compiled, compiled))
