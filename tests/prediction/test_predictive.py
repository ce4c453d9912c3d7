"""``predict``: posterior draws of labels and next tokens, split into what data and what weights leave open."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2ForSequenceClassification

import monteclora
from monteclora import MonteCLoRAConfig, PredictiveDistribution, posterior_sampling, predict
from monteclora.errors import ConfigError
from tests.models import (
    END,
    PAD,
    TARGETS,
    VOCABULARY,
    Perceptron,
    batch_for,
    bert,
    config_for,
    gpt2,
    llama,
    llama_classifier,
    perceptron,
    posterior_of,
    same_global_generators,
    stir,
    t5,
    tokens,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
BUILDS = [bert, llama, gpt2, llama_classifier]


def inputs(build: Callable[..., nn.Module], rows: int = 3, length: int = 6) -> dict[str, Tensor]:
    return {key: value for key, value in batch_for(build, rows, length).items() if key != "labels"}


# -- the split -----------------------------------------------------------------------------------------------------


def distribution(draws: int = 16, batch: int = 50, classes: int = 7, spread: float = 3.0) -> PredictiveDistribution:
    logits = spread * torch.randn(draws, batch, classes, generator=torch.Generator().manual_seed(draws))
    return PredictiveDistribution(logits.softmax(-1))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("classes", [2, 7, 50_000])
def test_total_is_aleatoric_plus_epistemic(spread: float, classes: int) -> None:
    found = distribution(spread=spread, classes=classes, batch=4)
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic, rtol=0, atol=1e-6)
    assert found.epistemic.ge(0).all()
    assert found.aleatoric.ge(0).all()
    bound = torch.log(torch.tensor(float(classes), dtype=torch.float64))
    assert found.total.le(bound + 1e-6).all()
    assert all(part.isfinite().all() for part in (found.total, found.aleatoric, found.epistemic))
    assert {part.dtype for part in (found.total, found.aleatoric, found.epistemic)} == {torch.float64}
    torch.testing.assert_close(found.mean, found.probs.mean(0))


def test_entropies_are_the_textbook_ones() -> None:
    certain, open_ = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    disagree = PredictiveDistribution(torch.stack([certain, certain.flip(-1)]))
    assert disagree.total.item() == pytest.approx(log2.item())
    assert disagree.epistemic.item() == pytest.approx(log2.item())
    assert disagree.aleatoric.item() == 0.0
    agree = PredictiveDistribution(torch.stack([open_, open_]))
    assert agree.epistemic.item() == 0.0
    assert agree.aleatoric.item() == pytest.approx(log2.item())


def test_draws_that_agree_have_exactly_no_epistemic_part() -> None:
    one = distribution(draws=1, batch=1000, classes=11)
    same = PredictiveDistribution(one.probs.expand(7, -1, -1))
    assert one.epistemic.eq(0).all()
    assert same.epistemic.eq(0).all()


@pytest.mark.parametrize("build", BUILDS)
def test_without_noise_the_epistemic_part_is_exactly_zero(build: Callable[..., nn.Module]) -> None:
    found = predict(wrapped(build, sample_scale=0.0), inputs(build), num_samples=5)
    assert found.epistemic.eq(0).all()
    model = wrapped(build).eval()
    assert predict(model, inputs(build), num_samples=5).epistemic.gt(0).all()
    posterior_of(model).enabled = False
    assert predict(model, inputs(build), num_samples=5).epistemic.eq(0).all()


@pytest.mark.parametrize("build", BUILDS)
def test_shapes_and_sums(build: Callable[..., nn.Module]) -> None:
    found = predict(wrapped(build), inputs(build, rows=2), num_samples=3)
    classes = 3 if build in (bert, llama_classifier) else VOCABULARY
    assert found.probs.shape == (3, 2, classes)
    assert found.probs.dtype == torch.float32
    assert found.mean.shape == (2, classes)
    assert found.total.shape == found.aleatoric.shape == found.epistemic.shape == (2,)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(3, 2))
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic, rtol=0, atol=1e-6)
    assert not found.probs.requires_grad


# -- draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"covariance": "full"}, {"lora_bias": True, "lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_batched_draws_equal_separate_ones(build: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    model, batch = wrapped(build, **options), inputs(build)
    found = predict(model, batch, num_samples=4, seed=9)
    model.eval()
    logits = []
    with torch.no_grad(), posterior_sampling(model, seed=9):
        for _ in range(4):
            output = model(**batch).logits
            logits.append(output if output.dim() == 2 else output[:, -1])
    torch.testing.assert_close(found.probs, torch.stack(logits).softmax(-1), rtol=1e-5, atol=1e-6)
    assert (found.probs[0] - found.probs[1]).abs().max() > 1e-4


def test_more_draws_go_on_where_fewer_ended() -> None:
    """Draw s does not depend on how many are asked for, nor on how they are grouped into forward passes."""
    model, batch = wrapped(bert), inputs(bert, rows=5)
    many = predict(model, batch, num_samples=130, seed=2)
    assert many.probs.shape == (130, 5, 3)
    for count in (1, 12, 13, 40):
        few = predict(model, batch, num_samples=count, seed=2)
        torch.testing.assert_close(few.probs, many.probs[:count], rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in many.probs[:, 0].tolist()}) == 130


def test_seeds() -> None:
    model, batch = wrapped(bert), inputs(bert)
    first = predict(model, batch, num_samples=3, seed=1)
    assert torch.equal(predict(model, batch, num_samples=3, seed=1).probs, first.probs)
    assert not torch.equal(predict(model, batch, num_samples=3, seed=2).probs, first.probs)
    # training's seed names another stream
    assert torch.equal(predict(wrapped(bert, noise_seed=5), batch, num_samples=3, seed=1).probs, first.probs)


@pytest.mark.parametrize("build", [bert, llama])
def test_global_generators_are_neither_used_nor_heeded(build: Callable[..., nn.Module]) -> None:
    model, batch = wrapped(build, lora_dropout=0.5), inputs(build)
    torch.manual_seed(1)
    with same_global_generators():
        first = predict(model, batch, num_samples=3)
    torch.manual_seed(2)
    assert torch.equal(predict(model, batch, num_samples=3).probs, first.probs)


def test_training_before_and_after_is_as_without() -> None:
    plain, asked = wrapped(llama), wrapped(llama)
    for model in (plain, asked):
        model(**batch_for(llama, seed=1))
        if model is asked:
            predict(model, inputs(llama), num_samples=3)
    assert posterior_of(asked).draws == posterior_of(plain).draws == 1
    assert posterior_of(asked).predictive is None
    assert torch.equal(plain(**batch_for(llama)).logits, asked(**batch_for(llama)).logits)


def test_every_modules_mode_is_restored_also_after_an_error() -> None:
    model = wrapped(bert)
    model.get_base_model().bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    predict(model, inputs(bert), num_samples=2)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        predict(model, {"input_ids": torch.tensor([[VOCABULARY]])}, num_samples=2)
    assert [module.training for module in model.modules()] == modes
    assert posterior_of(model).predictive is None
    model.eval()
    predict(model, inputs(bert), num_samples=2)
    assert not model.training


# -- what must not matter ------------------------------------------------------------------------------------------


def padded(rows: list[list[int]], side: str, extra: int = 0) -> dict[str, Tensor]:
    longest = max(map(len, rows)) + extra
    ids, mask = [], []
    for row in rows:
        fill = longest - len(row)
        ids.append([PAD] * fill + row if side == "left" else row + [PAD] * fill)
        mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


ROWS = [[5, 9, 33], [7, 8, 60, 41, 2, 90], [11], [50, 51, 52, 53]]


@pytest.mark.parametrize(
    ("build", "side"),
    [(b, s) for b in (bert, llama, gpt2, llama_classifier) for s in ("left", "right")],
)
def test_neither_the_other_rows_nor_the_padding_matter(build: Callable[..., nn.Module], side: str) -> None:
    model = wrapped(build)
    together = predict(model, padded(ROWS, side, extra=3), num_samples=4, seed=1)
    for number, row in enumerate(ROWS):
        alone = predict(model, {"input_ids": torch.tensor([row])}, num_samples=4, seed=1)
        torch.testing.assert_close(together.probs[:, number], alone.probs[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_absolute_positions_of_a_classifier_on_a_decoder(side: str) -> None:
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, num_labels=3, pad_token_id=PAD
        )
    )
    model = monteclora.get_peft_model(base, config_for(gpt2, task_type="SEQ_CLS"))
    stir(model)
    together = predict(model, padded(ROWS, side, extra=2), num_samples=2)
    for number, row in enumerate(ROWS):
        alone = predict(model, {"input_ids": torch.tensor([row])}, num_samples=2)
        torch.testing.assert_close(together.probs[:, number], alone.probs[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    model, batch = wrapped(gpt2), padded(ROWS, "left")
    expected = predict(model, batch, num_samples=2)
    batch["attention_mask"] = batch["attention_mask"].to(kind)
    torch.testing.assert_close(predict(model, batch, num_samples=2).probs, expected.probs)


def test_positions_that_are_given_are_kept() -> None:
    model, ids = wrapped(gpt2), tokens(2, 4)
    own = predict(model, {"input_ids": ids, "position_ids": torch.arange(4).unsqueeze(0)}, num_samples=2)
    torch.testing.assert_close(own.probs, predict(model, {"input_ids": ids}, num_samples=2).probs)
    other = predict(model, {"input_ids": ids, "position_ids": torch.arange(4).expand(2, 4) + 3}, num_samples=2)
    assert not torch.allclose(own.probs, other.probs)


@pytest.mark.parametrize("build", BUILDS)
def test_labels_are_ignored(build: Callable[..., nn.Module]) -> None:
    model, batch = wrapped(build), inputs(build)
    expected = predict(model, batch, num_samples=2)
    for labels in (batch_for(build)["labels"], torch.tensor(1), [0, 1, 2], None):
        assert torch.equal(predict(model, {**batch, "labels": labels}, num_samples=2).probs, expected.probs)


def test_options_that_are_no_tensors_are_passed_on() -> None:
    model, batch = wrapped(llama), inputs(llama)
    expected = predict(model, batch, num_samples=2)
    found = predict(model, {**batch, "use_cache": False, "output_hidden_states": True}, num_samples=2)
    assert torch.equal(found.probs, expected.probs)


def test_next_tokens_need_the_logits_of_the_last_ones_only() -> None:
    """64 rows of a few hundred tokens over a large vocabulary would take gigabytes."""
    model, seen = wrapped(llama), []
    predict(model, {"input_ids": tokens(2, 4)}, num_samples=2)  # finds out how rows lie
    predict(model, padded(ROWS, "left", extra=1), num_samples=2)
    model.get_base_model().lm_head.register_forward_hook(lambda m, i, output: seen.append(output.shape[1]))
    predict(model, {"input_ids": tokens(2, 30)}, num_samples=2)
    predict(model, padded(ROWS, "left", extra=9), num_samples=2)
    assert seen == [1, 1]
    predict(model, padded(ROWS, "right", extra=9), num_samples=2)
    assert seen[2] <= len(ROWS)


def test_encoder_decoders_predict_the_decoders_next_token() -> None:
    model = wrapped(t5)
    source = padded(ROWS, "right")
    decoder = torch.tensor([[PAD, 4], [PAD, 9], [PAD, 11], [PAD, 30]])
    together = predict(model, {**source, "decoder_input_ids": decoder}, num_samples=3)
    assert together.probs.shape == (3, 4, VOCABULARY)
    model.eval()
    with torch.no_grad(), posterior_sampling(model):
        expected = model(**source, decoder_input_ids=decoder).logits[:, -1].softmax(-1)
    torch.testing.assert_close(together.probs[0], expected, rtol=1e-4, atol=1e-6)
    for number, row in enumerate(ROWS):
        alone = predict(
            model,
            {"input_ids": torch.tensor([row]), "decoder_input_ids": decoder[number : number + 1]},
            num_samples=3,
        )
        torch.testing.assert_close(together.probs[:, number], alone.probs[:, 0], rtol=1e-4, atol=1e-5)
    short = {"decoder_attention_mask": torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]])}
    found = predict(model, {**source, "decoder_input_ids": decoder, **short}, num_samples=1)
    first = predict(model, {**source, "decoder_input_ids": decoder[:, :1]}, num_samples=1)
    torch.testing.assert_close(found.probs[:, [0, 3]], first.probs[:, [0, 3]], rtol=1e-4, atol=1e-6)


# -- other models, other wrappers ----------------------------------------------------------------------------------


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Classifier(Perceptron):
    """A module of one's own: anything whose output has ``logits``."""

    def forward(self, x: Tensor) -> Logits:  # type: ignore[override]
        return Logits(super().forward(x))


def test_a_batch_larger_than_a_forward_pass() -> None:
    torch.manual_seed(0)
    model = monteclora.get_peft_model(Classifier(), config_for(perceptron, target_modules=TARGETS[perceptron]))
    stir(model)
    x = torch.randn(150, 12)
    found, alone = (predict(model, {"x": part}, num_samples=3) for part in (x, x[70:71]))
    assert found.epistemic.gt(0).all()
    torch.testing.assert_close(found.probs[:, 70:71], alone.probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [AveragedModel, lambda model: torch.compile(model, backend="eager")])
def test_left_padding_through_other_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrapped(gpt2, base={"n_layer": 1})
    expected = predict(model, padded(ROWS, "left"), num_samples=2)
    found = predict(wrap(model), padded(ROWS, "left"), num_samples=2)
    torch.testing.assert_close(found.probs, expected.probs, rtol=1e-4, atol=1e-6)


def test_low_precision_models() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = monteclora.get_peft_model(llama().to(dtype), config_for(llama), autocast_adapter_dtype=False)
        stir(model)
        found = predict(model, inputs(llama), num_samples=4)
        assert found.probs.dtype == torch.float32
        torch.testing.assert_close(found.probs.sum(-1), torch.ones(4, 3))
        torch.testing.assert_close(found.total, found.aleatoric + found.epistemic, rtol=0, atol=1e-6)
    exact = predict(wrapped(llama), inputs(llama), num_samples=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict(wrapped(llama), inputs(llama), num_samples=4)
    torch.testing.assert_close(mixed.probs, exact.probs, rtol=0.1, atol=1e-2)


def test_two_adapters() -> None:
    model, batch = wrapped(llama), inputs(llama)
    model.add_adapter("second", config_for(llama, r=2, target_modules=["q_proj"]))
    stir(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    assert predict(model, batch, num_samples=3).epistemic.gt(0).all()


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 2.5, None, True])
def test_the_number_of_draws(count: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_samples is {count}, expected") as caught:
        predict(wrapped(bert), inputs(bert), num_samples=count)
    assert caught.value.hint


def test_models_that_have_no_posterior() -> None:
    with pytest.raises(ConfigError, match="no MonteCLoRA adapter") as caught:
        predict(bert(), inputs(bert))
    assert caught.value.hint
    model = wrapped(llama)
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("plain")
    for use in (lambda: predict(model, inputs(llama)), lambda: posterior_sampling(model).__enter__()):
        with pytest.raises(ConfigError, match="'plain'") as caught:
            use()
        assert "set_adapter" in caught.value.hint


def test_models_with_a_label_for_every_token() -> None:
    torch.manual_seed(0)
    base = BertForTokenClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
        )
    )
    model = monteclora.get_peft_model(base, MonteCLoRAConfig(target_modules=["query"], task_type="TOKEN_CLS"))
    with pytest.raises(ConfigError, match="BertForTokenClassification") as caught:
        predict(model, inputs(bert))
    assert caught.value.hint


def test_a_batch_without_tensors() -> None:
    for batch in ({}, {"input_ids": [[1, 2]]}, {"labels": torch.tensor([1])}):
        with pytest.raises(ConfigError, match="no tensor") as caught:
            predict(wrapped(bert), batch)
        assert caught.value.hint


def test_a_row_of_one_token_is_not_confused_with_its_padding() -> None:
    batch = {"input_ids": torch.tensor([[5, 6], [END, PAD]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    found = predict(wrapped(llama), batch, num_samples=2)
    alone = predict(wrapped(llama), {"input_ids": torch.tensor([[END]])}, num_samples=2)
    torch.testing.assert_close(found.probs[:, 1], alone.probs[:, 0], rtol=1e-4, atol=1e-6)


def test_threads_that_predict_with_one_model_do_not_meet() -> None:
    """400 predictions with four seeds in eight threads, one of them at the mean beside them."""
    model = wrapped(bert)
    model.eval()
    batch = padded(ROWS, "right")
    expected = [predict(model, batch, num_samples=2, seed=seed).probs for seed in range(4)]
    with torch.no_grad():
        mean = model(**batch).logits
    wrong: list[int] = []
    done = threading.Event()

    def work(seed: int) -> None:
        for _ in range(50):
            if not torch.equal(predict(model, batch, num_samples=2, seed=seed).probs, expected[seed]):
                wrong.append(seed)

    def plain() -> None:
        while not done.is_set():
            with torch.no_grad():
                if not torch.equal(model(**batch).logits, mean):
                    wrong.append(-1)

    beside = threading.Thread(target=plain)
    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beside.join()
    assert wrong == []
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, mean)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("a text", "given a str, expected the model's inputs by name"),
        (["a text"], "given a list, expected"),
        (torch.tensor([[5, 6]]), "given a Tensor, expected"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids has the shape \(2,\), expected \(rows, tokens\)"),
        ({"input_ids": torch.tensor([[5.0, 6.0]])}, r"input_ids is of torch\.float32, expected whole numbers"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"\(2, 0\), expected at least one token a row"),
        ({"input_ids": tokens(2, 5), "attention_mask": torch.ones(3, 5)}, "attention_mask has 3 rows, and input_ids 2"),
        ({"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 3)}, "attention_mask has 3 positions a row"),
    ],
    ids=["text", "list", "tensor", "one row", "floats", "no tokens", "rows of the mask", "length of the mask"],
)
def test_what_is_no_batch_is_refused_in_one_line(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        predict(wrapped(llama), batch)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_padding_without_a_mask_is_warned_of() -> None:
    model = wrapped(bert).eval()
    ids = tokens(2, 6)
    ids[1, 4:] = PAD
    with pytest.warns(UserWarning, match="no attention_mask"):
        predict(model, {"input_ids": ids}, num_samples=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        predict(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()}, num_samples=2)
        predict(model, {"input_ids": tokens(2, 6)}, num_samples=2)
