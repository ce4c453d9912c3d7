from __future__ import annotations

import datasets
import pytest
import torch

from monteclora.data.chat import use_template
from monteclora.data.encoding import IGNORED, Encoder, collator, describe_rows, encode
from monteclora.errors import ConfigError, DataError
from tests.data.tiny import CHATML, byte_tokenizer

LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
REWRITES = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}|{% endif %}{% endfor %}"
USERS_FIRST = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + CHATML


def causal(*rows):
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def learned_text(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def encoded_text(row, tokenizer):
    return tokenizer.decode(row["input_ids"])


def test_only_the_assistants_turn_and_its_end_are_learned():
    tokenizer = byte_tokenizer()
    row = encode(causal(("Is ice cold?", " yes,\nit is")), "causal_lm", tokenizer, 200).dataset[0]
    assert encoded_text(row, tokenizer) == (
        "<|im_start|>user\nIs ice cold?<|im_end|>\n<|im_start|>assistant\n yes,\nit is<|im_end|>"
    )
    assert learned_text(row, tokenizer) == " yes,\nit is<|im_end|>"
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_labels_are_the_ids_where_they_are_learned():
    row = encode(causal(("a", "b")), "causal_lm", byte_tokenizer(), 200).dataset[0]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)


def test_training_sees_the_prompt_as_generation_does():
    tokenizer = byte_tokenizer()
    row = encode(causal(("question", "answer")), "causal_lm", tokenizer, 200).dataset[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) == {IGNORED}
    assert IGNORED not in row["labels"][len(prompt) :]


def test_without_a_template_a_line_break_parts_them():
    tokenizer = byte_tokenizer(chat_template=None)
    row = encode(causal(("2+2=", "4")), "causal_lm", tokenizer, 50).dataset[0]
    assert encoded_text(row, tokenizer) == "2+2=\n4<|im_end|>"
    assert learned_text(row, tokenizer) == "4<|im_end|>"


def test_a_template_with_its_own_beginning_and_end():
    tokenizer = byte_tokenizer(LLAMA_LIKE)
    row = encode(causal(("q", "a")), "causal_lm", tokenizer, 50).dataset[0]
    assert encoded_text(row, tokenizer) == "<|im_start|>[user] q[assistant] a<|im_end|>"
    assert learned_text(row, tokenizer) == "a<|im_end|>"


def conversation(*turns):
    roles = ["user", "assistant"] * len(turns)
    return datasets.Dataset.from_list(
        [{"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}]
    )


def test_every_turn_of_the_assistant_is_learned():
    tokenizer = byte_tokenizer()
    row = encode(conversation("one", "eins", "two", "zwei"), "causal_lm", tokenizer, 200).dataset[0]
    assert learned_text(row, tokenizer) == "eins<|im_end|>zwei<|im_end|>"
    assert encoded_text(row, tokenizer).count("<|im_end|>\n") == 3


def test_a_long_prompt_loses_its_beginning():
    tokenizer = byte_tokenizer()
    encoded = encode(causal(("x" * 100, "answer")), "causal_lm", tokenizer, 40)
    row = encoded.dataset[0]
    assert len(row["input_ids"]) == 40
    assert learned_text(row, tokenizer) == "answer<|im_end|>"
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert encoded_text(row, tokenizer).endswith("xx<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>")
    assert (encoded.shortened, encoded.completions_cut, encoded.dropped) == (1, 0, 0)


def test_a_long_completion_loses_its_end_and_leaves_the_question():
    tokenizer = byte_tokenizer()
    encoded = encode(causal(("Capital 0?", "y" * 120), ("q", "ok")), "causal_lm", tokenizer, 128)
    assert (encoded.shortened, encoded.prompts_cut, encoded.completions_cut) == (1, 0, 1)
    prompt = "<|im_start|>user\nCapital 0?<|im_end|>\n<|im_start|>assistant\n"
    room = 128 - len(tokenizer(prompt)["input_ids"])
    assert encoded_text(encoded.dataset[0], tokenizer) == prompt + "y" * room
    assert learned_text(encoded.dataset[0], tokenizer) == "y" * room


HEAD, FOOT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("truncation", "left"), [("prompt_start", "345"), ("prompt_end", "123")])
def test_which_end_of_a_long_prompt_is_cut(truncation, left):
    tokenizer = byte_tokenizer()
    expected = HEAD + left + FOOT + "ok<|im_end|>"
    length = len(tokenizer(expected)["input_ids"])
    encoded = encode(causal(("12345", "ok"), ("q", "ok")), "causal_lm", tokenizer, length, truncation)
    assert encoded_text(encoded.dataset[0], tokenizer) == expected
    assert (encoded.shortened, encoded.prompts_cut, encoded.completions_cut, encoded.dropped) == (1, 1, 0, 0)


def test_rows_without_room_for_the_whole_prompt_are_dropped_where_only_the_completion_may_be_cut():
    tokenizer = byte_tokenizer()
    rows = causal(("p" * 60, "answer"), ("q", "y" * 60), ("q", "a"))
    encoded = encode(rows, "causal_lm", tokenizer, 60, "completion")
    assert (encoded.kept, encoded.dropped, encoded.prompts_cut, encoded.completions_cut) == ([1, 2], 1, 0, 1)
    dropped = encode(rows, "causal_lm", tokenizer, 60, "drop")
    assert (dropped.kept, dropped.shortened, dropped.dropped) == ([2], 0, 2)


def test_the_system_prompt_stays_and_a_row_it_fills_alone_is_dropped():
    tokenizer = byte_tokenizer()
    turns = [("system", "be brief"), ("user", "x" * 80), ("assistant", "ok")]
    rows = datasets.Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turns]}])
    found = encode(rows, "causal_lm", tokenizer, 70)
    text = encoded_text(found.dataset[0], tokenizer)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nx")
    assert text.endswith("x<|im_end|>\n<|im_start|>assistant\nok<|im_end|>")
    assert (len(found.dataset[0]["input_ids"]), found.prompts_cut) == (70, 1)
    with pytest.raises(DataError, match="none of the 1 rows has a token left"):
        encode(rows, "causal_lm", tokenizer, 36)


def test_a_long_prompt_to_be_answered_keeps_the_template_and_its_end():
    tokenizer = byte_tokenizer()
    ids, cut = Encoder(tokenizer).prompt({"prompt": "x" * 80 + "?"}, 50)
    assert (len(ids), cut) == (50, True)
    text = tokenizer.decode(ids)
    assert text.startswith(HEAD + "x")
    assert text.endswith("x?" + FOOT)
    turns = [{"role": "user", "content": "q"}]
    whole, cut = Encoder(tokenizer).prompt({"messages": turns}, 50)
    assert (tokenizer.decode(whole), cut) == (HEAD + "q" + FOOT, False)
    answered = [*turns, {"role": "assistant", "content": "left out"}]
    assert Encoder(tokenizer).prompt({"messages": answered}, 50)[0] == whole


def test_a_long_conversation_keeps_its_last_turn_whole():
    tokenizer = byte_tokenizer()
    encoded = encode(conversation("one" * 20, "eins", "two", "zwei"), "causal_lm", tokenizer, 60)
    assert learned_text(encoded.dataset[0], tokenizer).endswith("zwei<|im_end|>")
    assert len(encoded.dataset[0]["input_ids"]) == 60


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_row_that_fits_costs_one_call_of_the_tokenizer_a_segment(template, monkeypatch):
    tokenizer = byte_tokenizer(template)
    called, call = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **options: (called.append(text), call(self, text, **options))[1]
    )
    rows = [("question", "answer")] * 5
    encode(causal(*rows), "causal_lm", tokenizer, 200)
    segments = 3  # the prompt, the answer, and what ends it
    assert len(called) == 5 * segments + (template is None and tokenizer.bos_token_id is not None)
    called.clear()
    encoder = Encoder(tokenizer)
    for _ in range(5):
        encoder.options("question", ["one", "two"], 200)
    assert len(called) == 10 * segments + (template is None and tokenizer.bos_token_id is not None)


def test_options_of_which_one_alone_is_too_long_lose_the_same_part_of_the_prompt():
    tokenizer = byte_tokenizer()
    whole, none = Encoder(tokenizer).options("q" * 16, ["a", "b" * 10], 200)
    length = max(len(row["input_ids"]) for row in whole)  # room for what four of the letters less leave
    assert Encoder(tokenizer).options("q" * 20, ["a", "b" * 10], length) == (whole, 4)
    assert none == length - 200


def test_rows_without_anything_to_learn():
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="none of the 1 rows has a token left to learn within 1 tokens"):
        encode(causal(("q", "a")), "causal_lm", tokenizer, 1)


APPENDS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
STRIPS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]").replace(
    "assistant\n' }}", "assistant\n<think>' }}"
)
FORGETS = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")


def test_a_template_that_always_asks_for_an_answer_teaches_only_the_answer():
    tokenizer = byte_tokenizer(APPENDS)
    row = encode(conversation("one", "eins", "two", "zwei"), "causal_lm", tokenizer, 200).dataset[0]
    assert learned_text(row, tokenizer) == "eins<|im_end|>zwei<|im_end|>"
    single = encode(causal(("q", "a")), "causal_lm", tokenizer, 200).dataset[0]
    assert encoded_text(single, tokenizer) == HEAD + "q" + FOOT + "a<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ConfigError, match="the end of an answer is unknown"):
        encode(causal(("q", "a")), "causal_lm", tokenizer, 200)


def test_a_template_that_strips_thoughts_is_refused_with_what_helps():
    with pytest.raises(ConfigError, match="writes an answer otherwise than it asks for it") as caught:
        encode(causal(("q", "<think>t</think>a")), "causal_lm", byte_tokenizer(STRIPS), 200)
    assert caught.value.hint.startswith("Set data.chat_template")
    rows = conversation("one", "<think>t</think>eins", "two", "<think>t</think>zwei")
    with pytest.raises(ConfigError, match="rewrites earlier turns") as caught:
        encode(rows, "causal_lm", byte_tokenizer(FORGETS), 200)
    assert "one prompt and one completion" in caught.value.hint


def test_another_chat_template(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = "<|endoftext|>"
    use_template(tokenizer, "chatml")
    row = encode(causal(("q", "a")), "causal_lm", tokenizer, 200).dataset[0]
    assert encoded_text(row, tokenizer) == HEAD + "q" + FOOT + "a<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>", "what ends a turn ends an answer"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}({{ m['content'] }}){{ eos_token }}{% endfor %}")
    use_template(tokenizer, str(tmp_path / "own.jinja"))
    row = encode(causal(("q", "a")), "causal_lm", tokenizer, 200).dataset[0]
    assert learned_text(row, tokenizer) == "(a)<|im_end|>"
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*none\.jinja: No such file"):
        use_template(tokenizer, str(tmp_path / "none.jinja"))


def test_templates_that_cannot_be_masked_are_refused():
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        encode(conversation("one", "eins", "two", "zwei"), "causal_lm", byte_tokenizer(REWRITES), 200)
    with pytest.raises(ConfigError, match="no chat template"):
        encode(conversation("one", "eins"), "causal_lm", byte_tokenizer(None), 200)
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    rows = datasets.Dataset.from_list([{"messages": turns}])
    with pytest.raises(DataError, match="row 1 does not fit the chat template: the user speaks first"):
        encode(rows, "causal_lm", byte_tokenizer(USERS_FIRST), 200)


def test_more_than_the_model_reads_is_refused():
    with pytest.raises(ConfigError, match="max_length is 600, the model reads at most 512 tokens"):
        encode(causal(("q", "a")), "causal_lm", byte_tokenizer(), 600)


def test_one_completion_is_encoded_as_the_training_rows_are():
    tokenizer = byte_tokenizer()
    row = encode(causal(("q" * 50, "a")), "causal_lm", tokenizer, 30).dataset[0]
    assert Encoder(tokenizer).options("q" * 50, ["a"], 30)[0] == [row]


def test_batches_are_padded_to_their_longest_row():
    tokenizer = byte_tokenizer()
    encoded = encode(causal(("q", "short"), ("q", "a longer answer")), "causal_lm", tokenizer, 200)
    batch = collator("causal_lm", tokenizer)(list(encoded.dataset))
    short = len(encoded.dataset[0]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(encoded.dataset[1]["input_ids"]))
    assert (batch["labels"][0, short:] == IGNORED).all()
    assert (batch["attention_mask"][0, short:] == 0).all()
    # Padding with the end token must neither hide the real one nor be learned.
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0, short - 1] == 1


def test_classification_pairs_labels_and_truncation():
    tokenizer = byte_tokenizer()
    rows = datasets.Dataset.from_list(
        [
            {"text": "ab", "text_pair": "cd", "label": 1},
            {"text": "e" * 30, "text_pair": "f" * 10, "label": 0},
            {"text": "g" * 10, "text_pair": "h" * 10, "label": 0},
        ]
    )
    encoded = encode(rows, "classification", tokenizer, 20)
    assert tokenizer.decode(encoded.dataset[1]["input_ids"]) == "e" * 10 + "f" * 10
    assert (encoded.shortened, encoded.dataset["labels"][:]) == (1, [1, 0, 0])
    batch = collator("classification", tokenizer)(list(encoded.dataset))
    assert torch.equal(batch["labels"], torch.tensor([1, 0, 0]))
    assert batch["attention_mask"].sum(1).tolist() == [4, 20, 20]
    assert "labels" not in encode(rows.remove_columns("label"), "classification", tokenizer, 20).dataset.features


def test_a_row_can_be_shown():
    tokenizer = byte_tokenizer()
    view = describe_rows(encode(causal(("Grüße?", "ja 😀")), "causal_lm", tokenizer, 100), tokenizer)[0]
    assert str(view) == r"<|im_start|>user\nGrüße?<|im_end|>\n<|im_start|>assistant\n[[ja 😀<|im_end|>]]"
    assert view.learned_tokens == len("ja 😀".encode()) + 1
    rows = datasets.Dataset.from_list([{"text": "hello", "label": 1}] * 9)
    views = describe_rows(encode(rows, "classification", tokenizer, 100), tokenizer, 3, ("no", "yes").__getitem__)
    assert [str(view) for view in views] == ["hello -> yes"] * 3


def test_more_rows_than_are_tokenised_at_once():
    tokenizer = byte_tokenizer()
    talks = causal(*((f"question {i}", f"answer {i}") for i in range(2001)))
    labelled = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(2001)], "label": [*range(3)] * 667})
    for rows, kind in ((talks, "causal_lm"), (labelled, "classification")):
        found = encode(rows, kind, tokenizer, 60).dataset
        assert len(found) == 2001
        for index in (0, 999, 1000, 1999, 2000):
            assert found[index] == encode(rows.select([index]), kind, tokenizer, 60).dataset[0]


def test_no_rows_to_classify():
    nothing = datasets.Dataset.from_dict({"text": [], "label": []})
    assert len(encode(nothing, "classification", byte_tokenizer(), 60).dataset) == 0
