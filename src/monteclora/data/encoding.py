"""Rows to token ids, with the labels that are learned and -100 on all other tokens.

Causal LM: prompt and completion are tokenised apart, so that training sees a completion in exactly the tokens
that follow the prompt at inference. With a chat template the prompt is the user's turn and the
completion the assistant's; without one a line break parts them and the end-of-sequence token follows.
Learned are the completion and the token that ends its turn, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from monteclora.data.kinds import Kind
from monteclora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "RowView", "collator", "describe_rows", "encode", "encode_completion"]

IGNORED = -100
"""The label of a token that is not learned; torch's cross-entropy skips it."""

_ROWS = 1000
"""So many are tokenised at once."""

Segment = tuple[str, bool]


@dataclass(frozen=True)
class Encoded:
    """Token ids ready for the collator, and what was cut.

    ``dataset`` has ``input_ids``, ``attention_mask``, what else the tokenizer gives, and ``labels``: one id a
    row for classification, one a token for causal LM. ``shortened`` counts the rows that were too long,
    ``completions_cut`` those of them that lost part of what is learned; ``dropped`` counts the rows left out
    because nothing to learn was left, ``kept`` the numbers of the others, from 0 (None where all are).
    """

    dataset: Dataset
    shortened: int = 0
    completions_cut: int = 0
    dropped: int = 0
    kept: Sequence[int] | None = None

    def row_of(self, index: int) -> int:
        """The number, among the rows that were encoded, of the one that stands at ``index`` of ``dataset``."""
        return index if self.kept is None else self.kept[index]


def encode(rows: Dataset, kind: Kind, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise rows of a :class:`~monteclora.tasks.loading.TaskData`.

    Args:
        rows: with ``text``, perhaps ``text_pair`` and ``label``; ``prompt``, ``completion``; or ``messages``.
        kind: what the rows are for.
        tokenizer: of the model.
        max_length: most tokens of a row. Longer texts lose their end (the longer text of a pair first),
            longer prompts their beginning; a completion loses its end only if it alone is too long.

    Raises:
        ConfigError: ``max_length`` is more than the model reads, or conversations need a chat template that
            the tokenizer has not.
        DataError: no row has anything left to learn.
    """
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"max_length is {max_length}, the model reads at most {tokenizer.model_max_length} tokens",
            "Set a smaller data.max_length.",
        )
    if kind == "classification":
        return _encode_classification(rows, tokenizer, max_length)
    return _encode_causal(rows, tokenizer, max_length)


def encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """One prompt and completion as :func:`encode` does it: ``input_ids``, ``attention_mask``, ``labels``."""
    segments = _segments({"prompt": prompt, "completion": completion}, tokenizer)
    ids, learned = _tokens(segments, tokenizer)
    return _row(*_shorten(ids, learned, max_length, tokenizer.bos_token_id))


def collator(kind: Kind, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
    """Pads a batch to its longest row: ids with the padding token, the mask with 0, labels with -100."""
    import transformers

    make: Callable[..., Callable[[list[dict[str, Any]]], Any]]
    if kind == "classification":
        make = transformers.DataCollatorWithPadding
        return make(tokenizer)
    make = transformers.DataCollatorForSeq2Seq
    return make(tokenizer, label_pad_token_id=IGNORED)


def _encode_classification(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    import datasets

    parts = []  # a number in a list takes several times the memory that it does in a table
    shortened = 0
    for batch in rows.iter(batch_size=_ROWS):
        texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        columns = dict(encoded.items())
        full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
        if full:
            whole = tokenizer(*([text[i] for i in full] for text in texts), verbose=False)
            shortened += sum(len(ids) > max_length for ids in whole["input_ids"])
        if "label" in batch:
            columns["labels"] = batch["label"]
        parts.append(datasets.Dataset.from_dict(columns))
    return Encoded(datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict({}), shortened)


def _encode_causal(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    import datasets
    import jinja2

    parts: list[Dataset] = []
    encoded: list[dict[str, list[int]]] = []
    kept_rows: list[int] = []
    shortened = completions_cut = 0
    for number, row in enumerate(rows, start=1):
        try:
            segments = _segments(row, tokenizer)
        except jinja2.TemplateError as error:
            raise DataError(f"row {number} does not fit the chat template: {error}", "Correct its messages.") from None
        ids, learned = _tokens(segments, tokenizer)
        kept_ids, kept = _shorten(ids, learned, max_length, tokenizer.bos_token_id)
        shortened += len(kept_ids) < len(ids)
        completions_cut += sum(kept) < sum(learned)
        # The first token has no predecessor that could predict it.
        if any(kept[1:]):
            encoded.append(_row(kept_ids, kept))
            kept_rows.append(number - 1)
        if encoded and (number == len(rows) or len(encoded) == _ROWS):
            parts.append(datasets.Dataset.from_list(encoded))
            encoded.clear()
    if not parts:
        raise DataError(
            f"none of the {len(rows)} rows has a token left to learn within {max_length} tokens",
            "Set a larger data.max_length.",
        )
    dropped = len(rows) - len(kept_rows)
    dataset = datasets.concatenate_datasets(parts)
    return Encoded(dataset, shortened, completions_cut, dropped, kept_rows if dropped else None)


def _segments(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a row in pieces, each with whether it is learned."""
    if not tokenizer.chat_template:
        if "messages" in row:
            raise ConfigError(
                "the data holds conversations and the model's tokenizer has no chat template",
                "Use an instruction-tuned model, or give prompt and completion columns.",
            )
        if tokenizer.eos_token is None:
            raise ConfigError("the model's tokenizer has no end-of-sequence token", "Use another model.")
        return [(row["prompt"] + "\n", False), (row["completion"], True), (tokenizer.eos_token, True)]
    messages = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return list(_chat_segments(messages, tokenizer))


def _chat_segments(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    """The conversation as the chat template writes it; the assistant's turns and their end are learned."""
    done = ""
    for end, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        before = _render(messages[: end - 1], tokenizer, prompt=True)
        after = _render(messages[:end], tokenizer, prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ConfigError(
                "the model's chat template rewrites earlier turns, the tokens to learn cannot be told",
                "Use one prompt and one completion a row.",
            )
        turn = after[len(before) :]
        # Templates put a line break after the end of a turn; nothing ever generates it.
        learned = turn.rstrip()
        yield before[len(done) :], False
        yield learned, True
        yield turn[len(learned) :], False
        done = after


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return str(text)


def _tokens(segments: list[Segment], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    for text, is_learned in segments:
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        ids += new
        learned += [is_learned] * len(new)
    # What follows the last learned token teaches nothing.
    while learned and not learned[-1]:
        del ids[-1], learned[-1]
    bos = _leading_bos(tokenizer)
    if bos is not None and ids[:1] != [bos]:
        ids, learned = [bos, *ids], [False, *learned]
    return ids, learned


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that this tokenizer puts before a plain text; chat templates write their own."""
    if tokenizer.chat_template or tokenizer.bos_token_id is None:
        return None
    return tokenizer.bos_token_id if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None


def _shorten(
    ids: list[int], learned: list[bool], max_length: int, bos_token_id: int | None
) -> tuple[list[int], list[bool]]:
    """At most ``max_length`` tokens: what comes first goes first, the beginning-of-sequence token stays."""
    excess = len(ids) - max_length
    if excess <= 0:
        return ids, learned
    head = int(ids[0] == bos_token_id)
    last_turn = max((i + 1 for i, is_learned in enumerate(learned) if not is_learned), default=0)
    # One token must stay before the last turn, to predict its first.
    cut = min(excess, max(last_turn - max(head, 1), 0))
    ids, learned = ids[:head] + ids[head + cut :], learned[:head] + learned[head + cut :]
    return ids[:max_length], learned[:max_length]


def _row(ids: list[int], learned: list[bool]) -> dict[str, list[int]]:
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True)
class RowView:
    """A tokenised row for people.

    ``segments`` are runs of text, each with whether it is learned; ``tokens`` and ``learned_tokens`` their
    lengths; ``label`` the label of a classified text.
    """

    segments: tuple[Segment, ...]
    tokens: int
    learned_tokens: int
    label: str | None = None

    def __str__(self) -> str:
        """The text on one line, what is learned in double brackets; after it the label."""
        escaped = ((text.replace("\n", "\\n"), is_learned) for text, is_learned in self.segments)
        line = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in escaped)
        return line if self.label is None else f"{line} -> {self.label}"


def describe_rows(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, n: int = 5, label_names: Sequence[str] | None = None
) -> list[RowView]:
    """The first ``n`` rows as the model sees them, decoded."""
    views = []
    for row in encoded.dataset.select(range(min(n, len(encoded.dataset)))):
        ids, labels = row["input_ids"], row.get("labels")
        learned = [label != IGNORED for label in labels] if isinstance(labels, list) else [False] * len(ids)
        runs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        segments = tuple((str(tokenizer.decode([token for token, _ in run])), is_learned) for is_learned, run in runs)
        label = str(label_names[labels] if label_names else labels) if isinstance(labels, int) else None
        views.append(RowView(segments, len(ids), sum(learned), label))
    return views
