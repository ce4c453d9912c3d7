"""What is learned of a conversation, beside trl's assistant_only_loss where it can tell, else beside what must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from trl import SFTConfig, SFTTrainer

from monteclora.data.encoding import IGNORED, encode
from monteclora.tasks import DataSpec, load
from tests.data.tiny import CHATML, byte_tokenizer
from tests.models import llama

HEADED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = HEADED.replace(
    "{{ m['content'] + '<|im_end|>' }}",
    "{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}{{ '<call>' + c['function']['name'] }}{% endfor %}"
    "{{ '<|im_end|>' }}",
)
Message = dict[str, Any]


def turns(*texts: str, first: str = "user") -> list[Message]:
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant"]
    order = [*roles, *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(order, texts, strict=False)]


TOOL = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look"}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
LIKE_TRL: dict[str, list[Message]] = {
    "one turn": turns("q", "a"),
    "two turns": turns("q", "a", "r", "b"),
    "three turns": turns("q", "a", "r", "b", "s", "c"),
    "system prompt": turns("be brief", "q", "a", first="system"),
    "system prompt and two turns": turns("be brief", "q", "a", "r", "b", first="system"),
    "lines and accents": turns("caf\u00e9\n\nwhat?", "yes,\nit is \U0001f600"),
    "an answer that quotes the template": turns("q", "say assistant and user"),
}
BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str]]] = {
    "tool calls and answers of tools": (
        {"messages": TOOL},
        {},
        CALLS,
        ["<call>look<|im_end|>", "It rains.<|im_end|>"],
    ),
    "a turn of weight 0": (
        {"messages": [*turns("q"), {"role": "assistant", "content": "bad", "weight": 0}, *turns("r", "good")]},
        {},
        HEADED,
        ["good<|im_end|>"],
    ),
    "the last turn alone": (
        {"messages": turns("q", "a", "r", "b")},
        {"learned_turns": "last"},
        HEADED,
        ["b<|im_end|>"],
    ),
    "a prompt of several turns": (
        {"prompt": turns("q", "a", "r"), "completion": [{"role": "assistant", "content": "b"}]},
        {},
        HEADED,
        ["b<|im_end|>"],
    ),
    "two answers in a row": (
        {"messages": [*turns("q", "a"), {"role": "assistant", "content": "b"}]},
        {},
        CHATML,
        ["a<|im_end|>", "b<|im_end|>"],
    ),
}


def masks(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], template: str) -> tuple[list[int], list[int]]:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    data = load(DataSpec(train_file=str(tmp_path / "a.jsonl"), validation_fraction=0.0, **options))
    found = encode(data.split("train"), "causal_lm", byte_tokenizer(template), 500).dataset[0]
    return found["input_ids"], found["labels"]


@pytest.fixture(scope="module")
def trl_masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[int]]]:
    rows = datasets.Dataset.from_list([{"messages": messages} for messages in LIKE_TRL.values()])
    config = SFTConfig(
        str(tmp_path_factory.mktemp("trl")),
        assistant_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=500,
    )
    tokenizer = byte_tokenizer(HEADED, pad_token="<|endoftext|>")
    trainer = SFTTrainer(llama(vocab_size=300), args=config, train_dataset=rows, processing_class=tokenizer)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return {
        case: (batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
        for case, batch in zip(LIKE_TRL, batches, strict=True)
    }


@pytest.mark.parametrize("case", LIKE_TRL)
def test_the_mask_is_that_of_trl(tmp_path: Path, trl_masks: Any, case: str) -> None:
    ids, labels = masks(tmp_path, {"messages": LIKE_TRL[case]}, {}, HEADED)
    expected_ids, expected_labels = trl_masks[case]
    # trl keeps the line break behind the last turn, which is not learned
    assert ids == expected_ids[: len(ids)]
    assert set(expected_labels[len(ids) :]) <= {IGNORED}
    assert labels == expected_labels[: len(ids)]
    assert labels[-1] != IGNORED


@pytest.mark.parametrize("case", BY_HAND)
def test_the_mask_is_what_it_must_be(tmp_path: Path, case: str) -> None:
    row, options, template, expected = BY_HAND[case]
    tokenizer = byte_tokenizer(template)
    ids, labels = masks(tmp_path, row, options, template)
    learned: list[list[int]] = []
    for before, (token, label) in zip([IGNORED, *labels], zip(ids, labels, strict=True), strict=False):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if before == IGNORED:
                learned.append([])
            learned[-1].append(token)
    assert [tokenizer.decode(tokens) for tokens in learned] == expected


def test_there_are_twelve_shapes() -> None:
    assert len(LIKE_TRL) + len(BY_HAND) == 12


def test_every_token_of_a_corpus_is_learned(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(HEADED)
    row = {"text": "once upon a time"}
    ids, labels = masks(tmp_path, row, {"completion_column": "text"}, HEADED)
    assert tokenizer.decode(ids) == "once upon a time<|im_end|>"
    assert labels == ids
