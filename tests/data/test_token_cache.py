from __future__ import annotations

import datasets
import pytest

from monteclora.data import token_cache
from monteclora.data.encoding import encode
from monteclora.data.token_cache import encode_once
from monteclora.errors import ConfigError
from tests.data.tiny import CHATML, byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONTECLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """Every call that really tokenises."""
    calls = []

    def count(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(token_cache, "encode", count)
    return calls


def rows(*prompts):
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": "an answer"} for prompt in prompts])


def test_the_same_is_tokenised_once(made, cache):
    again = []
    for _ in range(3):
        tokenizer = byte_tokenizer()
        again += [encode_once(rows("one", "two" * 30), "causal_lm", tokenizer, 60)]
        again += [encode_once(rows("three"), "causal_lm", tokenizer, 60)]  # after a call that cut
    assert len(made) == 2
    assert len(list(cache.iterdir())) == 2
    plain = encode(rows("one", "two" * 30), "causal_lm", byte_tokenizer(), 60)
    assert plain.shortened == 1
    for found in again[::2]:
        assert found.dataset[:] == plain.dataset[:]
        assert found.dataset.features == plain.dataset.features
        assert (found.shortened, found.completions_cut, found.dropped) == (1, plain.completions_cut, 0)


def test_what_was_left_out_is_remembered(made):
    asked = [{"role": "user", "content": "one"}]
    answered = [*asked, {"role": "assistant", "content": "two"}]
    talks = datasets.Dataset.from_list([{"messages": asked}, {"messages": answered}, {"messages": answered}])
    found = [encode_once(talks, "causal_lm", byte_tokenizer(), 60) for _ in range(2)]
    assert len(made) == 1
    assert found[0].dropped == 1
    for one in found:
        assert [one.row_of(index) for index in range(2)] == [1, 2]
    for name in ("shortened", "completions_cut", "dropped", "kept"):
        assert getattr(found[0], name) == getattr(found[1], name)


def test_the_limits_of_the_model_are_checked_every_time(made):
    encode_once(rows("one"), "causal_lm", byte_tokenizer(), 60)
    narrow = byte_tokenizer()
    narrow.model_max_length = 50
    with pytest.raises(ConfigError, match="reads at most 50 tokens"):
        encode_once(rows("one"), "causal_lm", narrow, 60)


def test_classification(made):
    labelled = datasets.Dataset.from_dict({"text": ["a", "bc"], "text_pair": ["d", "e"], "label": [1, 0]})
    found = [encode_once(labelled, "classification", byte_tokenizer(), 60) for _ in range(2)]
    assert len(made) == 1
    assert (
        found[0].dataset[:]
        == found[1].dataset[:]
        == encode(labelled, "classification", byte_tokenizer(), 60).dataset[:]
    )


def test_whatever_differs_is_tokenised_anew(made):
    base = rows("one", "two")
    other_template, more_tokens = byte_tokenizer(), byte_tokenizer()
    other_template.chat_template = "{# another #}" + CHATML
    more_tokens.add_tokens(["one"])
    text = datasets.Dataset.from_dict({"text": ["one", "two"]})
    variants = [
        (base, "causal_lm", byte_tokenizer(), 60),
        (base, "causal_lm", byte_tokenizer(), 61),
        (base, "causal_lm", other_template, 60),
        (base, "causal_lm", more_tokens, 60),
        (rows("one", "twq"), "causal_lm", byte_tokenizer(), 60),
        (rows("two", "one"), "causal_lm", byte_tokenizer(), 60),
        (base.select([1, 0]), "causal_lm", byte_tokenizer(), 60),
        (text, "classification", byte_tokenizer(), 60),
    ]
    found = [encode_once(*variant) for variant in variants]
    assert len(made) == 7  # two of them have the same rows
    for variant, one in zip(variants, found, strict=True):
        assert one.dataset[:] == encode(*variant).dataset[:]


def test_a_damaged_file_is_made_anew(made, cache):
    whole = encode_once(rows("one"), "causal_lm", byte_tokenizer(), 60).dataset[:]
    (path,) = cache.iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for damage in (b"", content[:-9], bytes(flipped)):
        path.write_bytes(damage)
        assert encode_once(rows("one"), "causal_lm", byte_tokenizer(), 60).dataset[:] == whole
        assert path.read_bytes() == content
    assert len(made) == 4


def test_without_a_place_to_keep_them(made, cache):
    cache.parent.write_text("a file")
    for _ in range(2):
        assert len(encode_once(rows("one"), "causal_lm", byte_tokenizer(), 60).dataset) == 1
    assert len(made) == 2
