"""Texts with their tokens shaded by how uncertain the model was at each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from monteclora.reports.formats import decimals
from monteclora.reports.page import Column, Page, Passage, Row, Section, Shaded, Table, write_page

__all__ = ["text_sections", "write_text_page"]

_TEXTS = 12
_SPIKES = 8
_NATS = decimals(2)
_FINE = decimals(4)
_MEANINGS = {
    "total": "The stronger the colour, the more other words the model held possible in that place",
    "epistemic": "The stronger the colour, the more the draws disagree, versions of the model that fit its training "
    "about equally well: here it was not taught enough to know",
}


def write_text_page(path: str | Path, predictions: Path, *, title: str, command: str) -> Path:
    """Write a page of the first texts of a file of predictions that has the column ``tokens``.

    Args:
        path: of the page.
        predictions: what ``predict_file(..., tokens=True)`` wrote.
        title: of the page.
        command: that made the predictions.

    Raises:
        CheckpointError: the page cannot be written.
    """
    records = list(islice(_records(predictions), _TEXTS + 1))
    more = len(records) > _TEXTS
    page = Page(
        title=title,
        subtitle=f"The first {_TEXTS} texts of {predictions.name}" if more else predictions.name,
        sections=text_sections(records[:_TEXTS]),
        reproduce=[command],
    )
    return write_page(path, page)


def text_sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section for each text, from records with ``prompt`` or ``messages``, ``tokens`` and ``sequence``."""
    tokens = [token for record in records for token in record["tokens"]]
    drawn = any(token["epistemic"] > 0 for token in tokens)
    most = {name: max((token[name] for token in tokens), default=0.0) for name in _MEANINGS if drawn or name == "total"}
    return [_section(number, record, most) for number, record in enumerate(records, start=1)]


def _section(number: int, record: Mapping[str, Any], most: Mapping[str, float]) -> Section:
    tokens, sequence = record["tokens"], record["sequence"]
    passages = [
        Passage(
            asked=_asked(record),
            pieces=[
                Shaded(
                    token["text"],
                    token[name] / limit if limit else 0.0,
                    f"total {_NATS(token['total'])}, epistemic {_FINE(token['epistemic'])} nats, "
                    f"probability {_NATS(_probability(token))}",
                )
                for token in tokens
            ],
            caption=f"{_MEANINGS[name]} ({name} uncertainty; the strongest colour is {_shown(name, limit)} nats, the "
            "most of any text on this page).",
        )
        for name, limit in most.items()
    ]
    spikes = sorted(tokens, key=lambda token: -token["total"])[:_SPIKES]
    table = Table(
        [
            Column("Token"),
            Column("Probability", decimals(3)),
            Column("Total (nats)", _NATS),
            Column("Epistemic (nats)", _FINE),
        ],
        [Row([repr(t["text"]), _probability(t), t["total"], t["epistemic"]]) for t in spikes],
        caption="The most uncertain tokens.",
    )
    facts = [
        f"{len(tokens)} tokens; mean log-probability {_NATS(sequence['mean_log_probability'])} nats a token, mean "
        f"uncertainty {_NATS(sequence['mean_total'])} nats, of it epistemic {_FINE(sequence['mean_epistemic'])}."
    ]
    if record.get("agreement") is not None:
        share = f"{round(record['agreement'] * len(record['answers']))} of {len(record['answers'])}"
        facts.append(f"{share} draws that wrote an answer of their own agree on: {record['answer']}")
    return Section(f"Text {number}", facts, tables=[table], passages=passages)


def _shown(name: str, value: float) -> str:
    return (_NATS if name == "total" else _FINE)(value)


def _probability(token: Mapping[str, Any]) -> float:
    return math.exp(token["log_probability"])


def _asked(record: Mapping[str, Any]) -> str:
    """The prompt, or the last message before the answer."""
    if record.get("prompt"):
        return str(record["prompt"])
    messages = record.get("messages") or [{}]
    return str(messages[-1].get("content", ""))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_TEXTS + 1):
            yield from batch.to_pylist()
