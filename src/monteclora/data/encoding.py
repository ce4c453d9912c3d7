"""Rows to token ids, with the labels that are learned and -100 on all other tokens.

Causal LM: prompt and completion are tokenised apart, so that training sees a completion in exactly the tokens
that follow the prompt at inference. With a chat template the prompt is the user's turn and the
completion the assistant's; without one a line break parts them and the end-of-sequence token follows.
Learned are the completion and the token that ends its turn, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from monteclora.data.chat import Segment, Writer, Written
from monteclora.data.kinds import TEXT_KINDS, Kind
from monteclora.data.truncation import Kept, Tokens, Truncation, prompt_excess, truncate
from monteclora.errors import ConfigError, DataError, visible

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "Encoder", "RowView", "collator", "describe_rows", "encode"]

IGNORED = -100
"""The label of a token that is not learned; torch's cross-entropy skips it."""

_ROWS = 1000
"""So many are tokenised at once."""


@dataclass(frozen=True)
class Encoded:
    """Token ids ready for the collator, and what was cut.

    ``dataset`` has ``input_ids``, ``attention_mask``, what else the tokenizer gives, and ``labels``: one id a
    row for classification, one a token for causal LM. ``shortened`` counts the rows that were too long and are
    kept, ``prompts_cut`` those of them whose prompt lost some of its text, ``completions_cut`` those that lost part of
    what is learned; ``dropped`` counts the rows left out because nothing to learn was left, or nothing of the prompt,
    ``kept`` the numbers of the others, from 0 (None where all are).
    """

    dataset: Dataset
    shortened: int = 0
    completions_cut: int = 0
    dropped: int = 0
    kept: Sequence[int] | None = None
    prompts_cut: int = 0

    def row_of(self, index: int) -> int:
        """The number, among the rows that were encoded, of the one that stands at ``index`` of ``dataset``."""
        return index if self.kept is None else self.kept[index]


def encode(
    rows: Dataset,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: Truncation = "prompt_start",
) -> Encoded:
    """Tokenise rows of a :class:`~monteclora.tasks.loading.TaskData`.

    Args:
        rows: with ``text``, perhaps ``text_pair`` and ``label``; ``prompt``, ``completion``; or ``messages``.
        kind: what the rows are for.
        tokenizer: of the model.
        max_length: most tokens of a row. Of longer texts the end is lost (of a pair, first that of the longer text).
        truncation: of rows with completions that are longer, see :func:`~monteclora.data.truncation.truncate`.

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
    if kind in TEXT_KINDS:
        return _encode_texts(rows, tokenizer, max_length)
    return _encode_causal(rows, tokenizer, max_length, truncation)


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of rows with completions, one by one, as :func:`encode` does; what no row changes is computed once.

    Attributes:
        tokenizer: of the model; it must not be changed in the meantime.
    """

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self.tokenizer)

    @cached_property
    def _leading_bos(self) -> int | None:
        """The token that this tokenizer puts before a plain text."""
        bos: int | None = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else None

    def options(
        self, prompt: str, completions: Sequence[str], max_length: int
    ) -> tuple[list[dict[str, list[int]]], int]:
        """A prompt with each of its completions, and by how many tokens the longest was too long.

        All lose the same part of the prompt's text, so that they differ in the completion alone.

        Raises:
            DataError: no row is left.
        """
        written = [self._writer.row({"prompt": prompt, "completion": text}) for text in completions]
        rows = [self._tokens(each, max_length) for each in written]
        excess = max(len(row.ids) for row in rows) - max_length
        if excess > 0:
            rows = [self._tokens(each) for each in written]  # where each may be cut, the short ones too
            cut = prompt_excess(max(rows, key=lambda row: len(row.ids)), max_length)
            rows = [row.without(row.start, cut) for row in rows]
        if not all(any(row.learned[1:max_length]) for row in rows):
            raise DataError(f"no option has a token left within {max_length} tokens", "Set a larger data.max_length.")
        return [_row(row.ids[:max_length], row.learned[:max_length]) for row in rows], excess

    def prompt(
        self, row: dict[str, Any], max_length: int, truncation: Truncation = "prompt_start"
    ) -> tuple[list[int], bool]:
        """The token ids that ask for an answer, as training had them before it, and whether the prompt's text was cut.

        Args:
            row: with ``prompt``, or ``messages`` that may end with an answer, which is left out.
            max_length: most tokens.
            truncation: ``prompt_end`` cuts the prompt's end, any other its start.

        Raises:
            DataError: the template and the system prompt alone are longer.
        """
        found = self._tokens(self._writer.prompt(row), max_length)
        kept = truncate(found, max_length, truncation if truncation == "prompt_end" else "prompt_start")
        if not kept.ids:
            raise DataError(f"a prompt has no room within {max_length} tokens", "Shorten its system prompt.")
        return kept.ids, kept.prompt_cut

    def row(self, row: dict[str, Any], max_length: int) -> Tokens:
        """A row with an answer in tokens; where it may be cut is given only for rows longer than ``max_length``.

        Raises:
            ConfigError, jinja2.TemplateError: see :meth:`monteclora.data.chat.Writer.row`.
        """
        return self._tokens(self._writer.row(row), max_length)

    def _tokens(self, written: Written, max_length: int = 0) -> Tokens:
        """The tokens of a row, each segment by itself, up to the last that is learned (all of a prompt)."""
        ids: list[int] = []
        learned: list[bool] = []
        answer = 0
        for number, (text, is_learned) in enumerate(written.segments):
            new = self._tokenised(text)
            ids += new
            learned += [is_learned] * len(new)
            if number == written.asking:
                answer = len(ids)
        # What follows the last learned token teaches nothing.
        while any(learned) and not learned[-1]:
            del ids[-1], learned[-1]
        bos = None if written.templated else self._leading_bos
        added = 0
        if bos is not None and ids[:1] != [bos]:
            ids, learned, added = [bos, *ids], [False, *learned], 1
        if len(ids) <= max_length:
            return Tokens(ids, learned, 0, 0, 0)
        segments = written.segments
        start = len(self._tokenised(segments[0][0][: written.start])) if segments else 0
        end = answer - len(self._tokenised(segments[written.asking][0][written.end :])) if segments else 0
        start = max(start + added, int(ids[:1] == [self.tokenizer.bos_token_id]))
        return Tokens(ids, learned, start, max(end + added, start), max(answer + added, start))

    def _tokenised(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def collator(kind: Kind, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
    """Pads a batch to its longest row: ids with the padding token, the mask with 0, labels with -100."""
    import transformers

    make: Callable[..., Callable[[list[dict[str, Any]]], Any]]
    if kind in TEXT_KINDS:
        make = transformers.DataCollatorWithPadding
        return make(tokenizer)
    make = transformers.DataCollatorForSeq2Seq
    return make(tokenizer, label_pad_token_id=IGNORED)


def _encode_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
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


def _encode_causal(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: Truncation
) -> Encoded:
    import datasets
    import jinja2

    encoder = Encoder(tokenizer)
    parts: list[Dataset] = []
    encoded: list[dict[str, list[int]]] = []
    kept_rows: list[int] = []
    shortened = prompts_cut = completions_cut = 0
    for number, row in enumerate(rows, start=1):
        try:
            whole = encoder.row(row, max_length)
        except jinja2.TemplateError as error:
            raise DataError(f"row {number} does not fit the chat template: {error}", "Correct its messages.") from None
        kept: Kept = truncate(whole, max_length, truncation)
        # The first token has no predecessor that could predict it.
        if any(kept.learned[1:]):
            shortened += len(kept.ids) < len(whole.ids)
            prompts_cut += kept.prompt_cut
            completions_cut += sum(kept.learned) < sum(whole.learned)
            encoded.append(_row(kept.ids, kept.learned))
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
    return Encoded(dataset, shortened, completions_cut, dropped, kept_rows if dropped else None, prompts_cut)


def _row(ids: list[int], learned: list[bool]) -> dict[str, list[int]]:
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True)
class RowView:
    """A tokenised row for people.

    ``segments`` are runs of text, each with whether it is learned; ``tokens`` and ``learned_tokens`` their
    lengths; ``label`` what is learned of a text as a whole, in words.
    """

    segments: tuple[Segment, ...]
    tokens: int
    learned_tokens: int
    label: str | None = None

    def __str__(self) -> str:
        """The text on one line, control characters escaped, what is learned in double brackets; after it the label."""
        escaped = ((visible(text), is_learned) for text, is_learned in self.segments)
        line = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in escaped)
        return line if self.label is None else f"{line} -> {visible(self.label)}"


def describe_rows(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 5,
    shown: Callable[[Any], str | None] = lambda label: None,
) -> list[RowView]:
    """The first ``n`` rows as the model sees them, decoded.

    Args:
        encoded, tokenizer, n: what is shown.
        shown: what is learned of a text as a whole, in words; None where it is some of its tokens.
    """
    views = []
    for row in encoded.dataset.select(range(min(n, len(encoded.dataset)))):
        ids, labels = row["input_ids"], row.get("labels")
        whole = None if labels is None else shown(labels)
        tokens = isinstance(labels, list) and whole is None
        learned = [label != IGNORED for label in labels] if tokens else [False] * len(ids)
        runs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        segments = tuple((str(tokenizer.decode([token for token, _ in run])), is_learned) for is_learned, run in runs)
        views.append(RowView(segments, len(ids), sum(learned), whole))
    return views
