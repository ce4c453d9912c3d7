"""One draw for each training forward, whatever is called and however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import monteclora
from monteclora import MonteCLoRAConfig, posterior_sampling, variational_loss
from monteclora.adapters.active import one_draw, regularisation, train_posterior_only
from monteclora.errors import ConfigError
from monteclora.methods import get_method
from tests.models import (
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
    stir,
    t5,
    tokens,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_one_draw_for_each_forward_however_deep_the_call(build: Callable[..., nn.Module]) -> None:
    model = wrapped(build)
    posterior = posterior_of(model)
    for count in range(1, 4):
        model(**batch_for(build))
        assert posterior.draws == count
        assert posterior.current.index == count - 1


@pytest.mark.parametrize("part", ["base_model", "base_model.model", "base_model.model.model"])
def test_calling_an_inner_module_draws_once(part: str) -> None:
    model = wrapped(llama)
    posterior, inner = posterior_of(model), model.get_submodule(part)
    outputs = [inner(input_ids=tokens())[0] for _ in range(2)]
    assert posterior.draws == 2
    assert not torch.equal(*outputs)


def block_inputs(model: nn.Module) -> tuple[nn.Module, Tensor, Any]:
    backbone = model.base_model.model.model
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    return backbone.layers[0], hidden, backbone.rotary_emb(hidden, torch.arange(5).unsqueeze(0))


def test_a_block_called_alone_draws_once_and_gets_its_gradient() -> None:
    model = wrapped(llama)
    posterior = posterior_of(model)
    block, hidden, positions = block_inputs(model)
    for count in (1, 2):
        output = block(hidden, position_embeddings=positions)
        assert posterior.draws == count
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    first_block = sum(layer.rank for layer in posterior.layers if ".layers.0." in layer.name)
    assert int((posterior.rho.grad != 0).sum()) == first_block


def test_a_part_of_a_block_draws_for_each_layer_at_first_and_then_once() -> None:
    model = wrapped(llama)
    posterior = posterior_of(model)
    block, hidden, positions = block_inputs(model)
    counts = []
    for _ in range(3):
        before = posterior.draws
        block.self_attn(hidden, position_embeddings=positions, attention_mask=None)
        counts.append(posterior.draws - before)
    assert counts == [2, 1, 1]  # q_proj and v_proj
    model(**batch_for(llama))
    assert posterior.draws == 5


def test_the_mode_of_the_layers_decides_and_not_that_of_the_wrapper() -> None:
    model, twin = wrapped(llama), wrapped(llama)
    model.training = model.base_model.training = False
    assert torch.equal(model(**batch_for(llama)).logits, twin(**batch_for(llama)).logits)
    assert posterior_of(model).draws == 1
    (model(**batch_for(llama)).loss + variational_loss(model)).backward()
    gradients(model)


def test_an_encoder_called_alone_draws_from_the_posterior() -> None:
    model = wrapped(t5).eval()
    encoder = model.get_base_model().get_encoder()
    with torch.no_grad():
        mean = encoder(input_ids=tokens())[0]
        with posterior_sampling(model, seed=1):
            one, two = encoder(input_ids=tokens())[0], encoder(input_ids=tokens())[0]
    assert not torch.equal(mean, one)
    assert not torch.equal(one, two)


def test_a_model_without_the_peft_wrapper_around_it_still_draws() -> None:
    """Libraries call ``get_base_model()``, generation calls the inner model."""
    model = wrapped(llama)
    base = model.get_base_model()
    assert not torch.equal(base(input_ids=tokens()).logits, base(input_ids=tokens()).logits)
    assert posterior_of(model).draws == 2


def test_the_same_number_gives_the_same_draw() -> None:
    first, second = wrapped(llama), wrapped(llama)
    posterior_of(second).draws = 2
    batch = batch_for(llama)
    outputs = [first(**batch).logits for _ in range(3)]
    torch.manual_seed(999)
    assert torch.equal(second(**batch).logits, outputs[2])


def test_another_seed_is_another_stream() -> None:
    outputs = [wrapped(llama, noise_seed=seed)(**batch_for(llama)).logits for seed in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_evaluation_disabling_and_merging_count_no_draws() -> None:
    model = wrapped(llama)
    posterior, batch = posterior_of(model), batch_for(llama)
    model(**batch)
    model.eval()
    model(**batch)
    model.generate(input_ids=tokens(1, 3), max_new_tokens=3, do_sample=False)
    model.train()
    with model.disable_adapter():
        disabled = model(**batch).logits
    model.base_model.disable_adapter_layers()
    model(**batch)
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    merged = model(**batch).logits
    model.unmerge_adapter()
    assert posterior.draws == 1
    assert torch.equal(disabled, llama()(**batch).logits)
    model(**batch)
    assert posterior.draws == 2
    model.eval()
    torch.testing.assert_close(model(**batch).logits, merged, rtol=1e-4, atol=1e-5)


def test_a_switched_off_posterior_is_plain_lora_and_counts_nothing() -> None:
    """The first phase of post-hoc training."""
    model = wrapped(llama)
    posterior, batch = posterior_of(model), batch_for(llama)
    posterior.enabled = False
    training = model(**batch).logits
    assert posterior.draws == 0
    assert float(variational_loss(model)) == 0.0
    model.eval()
    assert torch.equal(model(**batch).logits, training)
    model.train()
    train_posterior_only(model)
    assert not torch.equal(model(**batch).logits, training)
    assert posterior.draws == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_mode_without_gradients(mode: Callable[[], Any]) -> None:
    model = wrapped(llama)
    batch = batch_for(llama)
    with mode():
        first, second = model(**batch).logits, model(**batch).logits
        assert variational_loss(model).isfinite()
    assert not torch.equal(first, second)
    # and training continues from there
    (model(**batch).loss + variational_loss(model)).backward()
    gradients(model)
    assert posterior_of(model).draws == 3


@pytest.mark.parametrize("regulariser", ["expected", "sampled"])
def test_an_inference_mode_forward_before_the_regulariser(regulariser: str) -> None:
    model = wrapped(llama, regulariser=regulariser)
    loss = model(**batch_for(llama)).loss
    (loss + variational_loss(model)).backward()
    expected = gradients(model)
    again = wrapped(llama, regulariser=regulariser)
    with torch.inference_mode():
        again(**batch_for(llama))
    posterior_of(again).draws = 0
    (again(**batch_for(llama)).loss + variational_loss(again)).backward()
    assert relative_difference(expected, gradients(again)) == 0.0


class Fragile(Perceptron):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(hidden)


def fragile() -> tuple[Any, Fragile]:
    torch.manual_seed(0)
    base = Fragile()
    model = monteclora.get_peft_model(base, config_for(perceptron))
    stir(model)
    return model.train(), base


def counts_on(model: nn.Module, x: Tensor) -> bool:
    """Two more forward passes make two more draws, through any of the modules around the layers."""
    posterior = posterior_of(model)
    for call in (model, model.base_model, model.base_model.model):
        before = posterior.draws
        if torch.equal(call(x), call(x)) or posterior.draws != before + 2:
            return False
    return True


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit()])
def test_an_exception_inside_forward(error: BaseException) -> None:
    model, base = fragile()
    x = torch.randn(2, 12)
    base.error = error
    for call in (model, model.base_model, base):
        with pytest.raises(type(error)):
            call(x)
        base.error = None
        assert counts_on(model, x)
        base.error = error


@pytest.mark.parametrize("at", ["base_model", "base_model.model"])
@pytest.mark.parametrize("prepend", [True, False])
def test_an_exception_in_somebody_elses_hook(at: str, prepend: bool) -> None:
    model, _ = fragile()
    x = torch.randn(2, 12)
    module = model.get_submodule(at)

    def fails(*_: Any) -> None:
        raise RuntimeError("hook")

    for register in (module.register_forward_pre_hook, module.register_forward_hook):
        handle = register(fails, prepend=prepend)
        with pytest.raises(RuntimeError, match="hook"):
            module(x)
        with contextlib.suppress(RuntimeError):  # peft goes past some of its own modules
            model(x)
        handle.remove()
        assert counts_on(model, x)


def test_an_exception_in_the_draw_itself() -> None:
    model = wrapped(perceptron, noise="per_example")
    x = torch.randn(2, 12)
    with pytest.raises(ConfigError, match="number of examples") as caught:
        model.base_model.model()
    assert caught.value.hint
    before = posterior_of(model).draws
    assert not torch.equal(model(x), model(x))
    assert posterior_of(model).draws == before + 2


def test_a_layer_that_raises_in_the_backward_pass() -> None:
    model, _ = fragile()
    x = torch.randn(2, 12)
    output = model(x)
    output.register_hook(lambda grad: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        output.sum().backward()
    assert counts_on(model, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_whole_model_inside_a_checkpoint(reentrant: bool) -> None:
    def step(repeated: bool) -> dict[str, Tensor]:
        model = wrapped(perceptron)
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
        output = checkpoint(model, x, use_reentrant=reentrant) if repeated else model(x)
        output.square().sum().backward()
        assert posterior_of(model).draws == 1
        return gradients(model)

    assert relative_difference(step(False), step(True)) < 1e-6


def test_a_training_forward_inside_a_backward_hook_is_not_a_draw() -> None:
    """Whatever runs in a backward pass repeats what came before it."""
    model = wrapped(perceptron)
    x = torch.randn(3, 12)
    seen: list[Tensor] = []
    output = model(x)
    output.register_hook(lambda grad: seen.append(model(x)) or grad)
    output.sum().backward()
    assert posterior_of(model).draws == 1
    assert torch.equal(seen[0], output)


def test_sampling_blocks_nest_and_leave_nothing_behind() -> None:
    model = wrapped(llama).eval()
    posterior, ids = posterior_of(model), tokens()

    @torch.no_grad()
    def logits() -> Tensor:
        return model(input_ids=ids).logits

    mean = logits()
    with posterior_sampling(model, seed=1):
        one, two = logits(), logits()
        with posterior_sampling(model, seed=2, first=7):
            inner = logits()
        three = logits()
        with pytest.raises(ZeroDivisionError), posterior_sampling(model, seed=3):
            raise ZeroDivisionError
        four = logits()
    assert torch.equal(logits(), mean)
    assert posterior.predictive is None
    assert posterior.draws == 0
    with posterior_sampling(model, seed=1):
        again = [logits() for _ in range(4)]
    assert all(torch.equal(x, y) for x, y in zip([one, two, three, four], again, strict=True))
    with posterior_sampling(model, seed=2, first=7):
        assert torch.equal(logits(), inner)
    assert len({float(x.sum()) for x in [mean, one, two, three, four, inner]}) == 6


def test_sampling_once_for_a_whole_generation() -> None:
    model = wrapped(llama).eval()
    ids = tokens(2, 4)
    with posterior_sampling(model, seed=1, resample=False), torch.no_grad():
        first = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, first)
        cached = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        plain = model.generate(
            input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False
        )
    assert torch.equal(cached, plain)
    with posterior_sampling(model, seed=1), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, first)


@pytest.mark.parametrize(("resample", "draws"), [(True, [0, 1, 2]), (False, [0])])
def test_no_draw_is_made_in_vain(monkeypatch: pytest.MonkeyPatch, resample: bool, draws: list[int]) -> None:
    model, made = wrapped(llama).eval(), []
    posterior = posterior_of(model)
    sample = posterior.sample
    monkeypatch.setattr(
        posterior, "sample", lambda seed, first, *more: made.append(first) or sample(seed, first, *more)
    )
    with posterior_sampling(model, resample=resample), torch.no_grad():
        for _ in range(3):
            model(input_ids=tokens())
    assert made == draws


def test_training_inside_a_sampling_block_uses_training_draws() -> None:
    model, twin = wrapped(llama), wrapped(llama)
    with posterior_sampling(model, seed=1):
        inside = model(**batch_for(llama)).logits
    assert torch.equal(inside, twin(**batch_for(llama)).logits)


def test_sampling_needs_an_adapter() -> None:
    for use in (lambda m: posterior_sampling(m).__enter__(), variational_loss):
        with pytest.raises(ConfigError, match="no MonteCLoRA adapter") as caught:
            use(llama())
        assert "get_peft_model" in caught.value.hint


def test_a_single_adapted_layer() -> None:
    model = monteclora.get_peft_model(
        llama(), MonteCLoRAConfig(target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    )
    stir(model)
    for count in (1, 2):
        (model(**batch_for(llama)).loss + variational_loss(model)).backward()
        assert posterior_of(model).draws == count


def test_evaluating_between_steps_changes_nothing_in_training() -> None:
    def train(evaluate: bool) -> dict[str, Tensor]:
        model = wrapped(llama, lora_dropout=0.1, noise="per_example", regulariser="sampled")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        for number in range(3):
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(**batch_for(llama, seed=50))
                    with posterior_sampling(model, seed=number):
                        model(**batch_for(llama, seed=51))
                monteclora.predict(model, {"input_ids": tokens()}, num_samples=3)
                model.train()
            optimizer.zero_grad()
            (model(**batch_for(llama, seed=number)).loss + variational_loss(model)).backward()
            optimizer.step()
        return dict(model.named_parameters())

    plain, evaluated = train(False), train(True)
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_sampling_a_merged_or_disabled_adapter_is_refused() -> None:
    """Every draw would be the mean, and the uncertainty exactly zero."""
    model = wrapped(llama).eval()
    with model.disable_adapter(), pytest.raises(ConfigError, match="merged or disabled"):
        monteclora.predict(model, {"input_ids": tokens()}, num_samples=2)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged or disabled") as caught:
        monteclora.predict(model, {"input_ids": tokens()}, num_samples=2)
    assert "unmerge_adapter" in caught.value.hint
    model.unmerge_adapter()
    assert monteclora.predict(model, {"input_ids": tokens()}, num_samples=2).epistemic.min() > 0


def test_several_draws_on_a_batch_that_they_do_not_divide_are_refused() -> None:
    model = wrapped(llama).eval()
    for rows in (4, 3, 6):  # of a batch of three different rows each would be under a draw of its own
        with (
            posterior_sampling(model, num_samples=3),
            pytest.raises(ConfigError, match="3 draws at once met") as caught,
        ):
            model(input_ids=tokens(rows=rows))
        assert "Repeat the batch" in caught.value.hint
    with posterior_sampling(model, num_samples=3):
        model(input_ids=tokens(rows=2).repeat(3, 1))


def test_an_adapter_made_active_in_some_layers_alone_is_drawn() -> None:
    model = wrapped(llama)
    model.add_adapter("other", config_for(llama, noise_seed=5))
    stir(model)
    for name, module in model.named_modules():
        if name.endswith("layers.1.self_attn.q_proj"):
            module.set_adapter("other")
    for count in (1, 2):
        model(**batch_for(llama))
        assert posterior_of(model, "other").draws == posterior_of(model).draws == count


def test_rows_of_several_adapters_are_drawn_each_from_its_own() -> None:
    model = wrapped(llama).eval()
    model.add_adapter("other", config_for(llama, noise_seed=5))
    stir(model)
    model.eval()
    ids = tokens(rows=2)
    with torch.no_grad():
        with posterior_sampling(model, seed=3):
            mixed = [model(input_ids=ids, adapter_names=["default", "other"]).logits for _ in range(2)]
        for row, name in enumerate(["default", "other"]):
            model.set_adapter(name)
            model.eval()
            with posterior_sampling(model, seed=3):
                for draw in range(2):
                    torch.testing.assert_close(model(input_ids=ids).logits[row], mixed[draw][row])


def test_a_disabled_adapter_freezes_its_posterior_and_has_no_loss() -> None:
    """Else data-parallel training would wait for gradients that never come."""
    model = wrapped(llama)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with model.disable_adapter():
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        loss = variational_loss(model)
        assert not loss.requires_grad
        assert float(loss) == 0.0
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert float(variational_loss(model).detach()) > 0


def test_a_layer_that_is_never_called_is_refused() -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "last": nn.Linear(16, 4)})
    with pytest.raises(ConfigError, match=r"'attention.out_proj' is never called"):
        monteclora.get_peft_model(base, MonteCLoRAConfig(target_modules=["out_proj", "last"], r=2))


@pytest.mark.parametrize("value", [1e3, -1e3, 1e30])
def test_a_posterior_that_diverged_has_a_finite_loss(value: float) -> None:
    model = wrapped(llama)
    with torch.no_grad():
        posterior_of(model).rho.fill_(value)
        posterior_of(model).eta.fill_(value)
    loss = model(**batch_for(llama)).loss + variational_loss(model)
    loss.backward()
    assert loss.isfinite()
    assert loss > 1e3
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_per_sample_gradients_by_torch_func_work_at_the_mean_and_are_refused_under_draws() -> None:
    model = wrapped(perceptron)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    x = torch.randn(5, 12)
    with pytest.raises(ConfigError, match=r"transform of torch\.func"):
        per_sample(parameters, x)
    model.eval()
    found = per_sample(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(found[name].sum(0), parameter.grad)


def test_an_exported_model_has_no_frozen_draw() -> None:
    model, x = wrapped(perceptron), torch.randn(5, 12)
    model(x)
    for export in (lambda: torch.export.export(model, (x,)), lambda: torch.jit.trace(model, (x,), check_trace=False)):
        with pytest.raises(ConfigError, match="constant of the model"):
            export()
        with posterior_sampling(model.eval()), pytest.raises(ConfigError, match=r"constant of|compiled"):
            export()
        model.train()
    model.eval()
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    with posterior_sampling(model, resample=False):
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_merging_where_draws_are_asked_for_is_refused(name: str) -> None:
    model, batch = wrapped(llama).eval(), batch_for(llama)
    mean = model(**batch).logits
    with posterior_sampling(model), pytest.raises(ConfigError, match="would merge the mean"):
        getattr(model, name)()
    assert torch.equal(model(**batch).logits, mean)
    assert monteclora.predict(model, batch, num_samples=2).epistemic.max() > 0


def test_an_input_without_a_batch_is_drawn_too() -> None:
    model, x = wrapped(perceptron).eval(), torch.randn(3, 12)
    with posterior_sampling(model, resample=False):
        torch.testing.assert_close(torch.stack([model(row) for row in x]), model(x))
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    with posterior_sampling(model, num_samples=2), pytest.raises(ConfigError, match="2 draws at once"):
        model(x[0])


# -- which rows are whose --------------------------------------------------------------------------------------------


def test_every_tensor_of_a_batch_must_be_repeated_for_several_draws() -> None:
    """A mask alone says nothing: each of three different texts would silently get another draw."""
    model = wrapped(llama).eval()
    ids, mask = tokens(rows=3, length=8), torch.ones(3, 8, dtype=torch.long)
    for args, kwargs in (((ids,), {"attention_mask": mask}), ((), {"input_ids": ids[:1].repeat(3, 1), "labels": ids})):
        with (
            posterior_sampling(model, num_samples=3),
            pytest.raises(ConfigError, match="3 draws at once met a batch of 3 rows"),
        ):
            model(*args, **kwargs)
    with posterior_sampling(model, num_samples=3), torch.no_grad():
        model(ids[:1].repeat(3, 1), attention_mask=mask)


def test_positions_of_as_many_tokens_as_rows_are_no_rows() -> None:
    class Positioned(Perceptron):
        def forward(self, x: Tensor, cache_position: Tensor) -> Tensor:
            return super().forward(x + cache_position[:, None])

    model = monteclora.get_peft_model(Positioned(), config_for(perceptron)).eval()
    x = torch.randn(1, 6, 12).repeat(6, 1, 1)
    with posterior_sampling(model, num_samples=3):
        assert model(x, cache_position=torch.arange(6)).shape == (6, 6, 5)


class Branching(Perceptron):
    """Calls its second layer in some passes only, and mixes up the rows for it."""

    def forward(self, x: Tensor, deep: bool) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden.roll(1, 0)) if deep else hidden


@pytest.mark.parametrize("per_example", [False, True])
def test_a_layer_that_did_not_run_at_first_is_checked_when_it_does(per_example: bool) -> None:
    torch.manual_seed(0)
    noise = "per_example" if per_example else "shared"
    model = monteclora.get_peft_model(Branching(), config_for(perceptron, noise=noise)).train(per_example)
    x = torch.randn(2, 12).repeat(3, 1)
    with posterior_sampling(model, num_samples=3):
        for _ in range(2):
            model(x, deep=False)
        with pytest.raises(ConfigError, match=r"layer 'second' \(its input is not ordered"):
            model(x, deep=True)


def test_rows_are_looked_for_once_where_every_layer_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(llama).eval()
    calls = []
    base = model.get_base_model()
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    with posterior_sampling(model, num_samples=3), torch.no_grad():
        for _ in range(3):
            model(input_ids=tokens(rows=1).repeat(3, 1))
    assert len(calls) == 3 + 3  # as it is, and with the first and the last row marked


def test_looking_for_rows_leaves_the_global_generators_alone() -> None:
    class Noisy(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            return super().forward(x)

    model = monteclora.get_peft_model(Noisy(), config_for(perceptron, noise="per_example"))
    torch.manual_seed(4)
    model(torch.ones(2, 12))
    found = torch.rand(1)
    torch.manual_seed(4)
    torch.rand(3)
    assert torch.equal(found, torch.rand(1))


def test_an_error_of_the_models_own_is_not_taken_for_a_transform() -> None:
    class Failing(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("my own vmap failed")

    model = monteclora.get_peft_model(Failing(), config_for(perceptron, noise="per_example"))
    with pytest.raises(RuntimeError, match="my own vmap failed"):
        model(torch.ones(2, 12))


# -- late draws ------------------------------------------------------------------------------------------------------


def test_modules_are_hooked_once_for_layers_that_are_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(perceptron)
    tuner, calls = model.base_model, []
    hook = tuner.hook_everything
    monkeypatch.setattr(tuner, "hook_everything", lambda: calls.append(1) or hook())
    for _ in range(3):
        model.get_base_model().first(torch.randn(2, 12))
    assert len(calls) == 1
    assert posterior_of(model).draws == 3
    model.add_adapter("other", config_for(perceptron))
    model.get_base_model().first(torch.randn(2, 12))
    assert len(calls) == 2


def test_recomputation_asks_for_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(llama)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    asked = []
    monkeypatch.setattr(model.base_model.scope, "draw_late", lambda posterior: asked.append(posterior))
    model(**batch_for(llama), use_cache=False).loss.backward()
    assert not asked
    assert not posterior_of(model).drawn
    gradients(model)


def test_per_example_noise_of_an_adapter_in_some_layers_alone_is_refused_with_the_reason() -> None:
    model = wrapped(llama)
    model.add_adapter("other", config_for(llama, noise="per_example"))
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.set_adapter("other")
    with pytest.raises(ConfigError, match="active in some layers alone") as caught:
        model(**batch_for(llama))
    assert "set_adapter" in caught.value.hint
    with pytest.raises(ConfigError, match="outside a forward pass"):
        layer(torch.randn(2, 32))
    # one that is not trained stays at its mean
    for name, parameter in model.named_parameters():
        if ".other" in name:
            parameter.requires_grad_(False)
    model(**batch_for(llama))
    assert posterior_of(model, "other").draws == 0


def test_a_draw_in_common_counts_as_training_of_what_is_trainable() -> None:
    model = wrapped(llama)
    model.add_adapter("other", config_for(llama))
    model.set_adapter("other")
    other = posterior_of(model, "other")
    assert not other.trained
    with one_draw(model), torch.no_grad():
        model(**batch_for(llama))
    assert not other.trained
    assert not model.base_model.is_trainable(posterior_of(model))
    assert model.base_model.is_trainable(other)
    assert not other.trained, "asking changes nothing"
    with one_draw(model):
        model(**batch_for(llama))
    assert other.trained


# -- disabled adapters -----------------------------------------------------------------------------------------------


def test_what_is_set_while_adapters_are_disabled_holds_when_they_are_enabled() -> None:
    model = wrapped(llama)
    model.add_adapter("other", config_for(llama))
    tuner, first, other = model.base_model, posterior_of(model), posterior_of(model, "other")

    def trainable() -> tuple[bool, bool]:
        return first.rho.requires_grad, other.rho.requires_grad

    assert trainable() == (True, False)
    tuner.disable_adapter_layers()
    tuner.disable_adapter_layers()
    model.set_adapter("other")
    assert trainable() == (False, False)
    tuner.enable_adapter_layers()
    assert trainable() == (False, True)
    tuner.disable_adapter_layers()
    model.set_requires_grad("other", False)
    model.set_requires_grad("other", True)
    model.set_requires_grad("default", True)
    assert trainable() == (False, False)
    assert float(variational_loss(model)) == 0.0
    tuner.enable_adapter_layers()
    assert trainable() == (True, True)
    tuner.disable_adapter_layers()
    model.delete_adapter("other")
    model.add_adapter("third", config_for(llama))
    tuner.enable_adapter_layers()
    assert first.rho.requires_grad
    assert not posterior_of(model, "third").rho.requires_grad
    assert not tuner.disabled


def test_every_trainer_leaves_disabled_adapters_out_of_its_loss() -> None:
    model = wrapped(llama)
    method = get_method("monteclora")
    assert method.added_loss(model).loss.item() == variational_loss(model).item() > 0
    with model.disable_adapter():
        assert regularisation(model) is None
        assert method.added_loss(model) is None
