"""The bundled data set: messages to the support desk of a software company, written for this project.

Twelve intents, with messages outside all of them and messages between two of them beside the splits, to see
whether a model knows what it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from monteclora.data.files import Table, open_table
from monteclora.tasks.registry import Task, register

__all__ = ["LABELS", "AmbiguousMessage", "ambiguous", "out_of_scope"]

LABELS = (
    "billing_question",
    "bug_report",
    "cancel_subscription",
    "data_transfer",
    "feature_request",
    "how_to",
    "integration_api",
    "login_problem",
    "outage_or_slow",
    "privacy_security",
    "refund_request",
    "upgrade_plan",
)
_FOLDER = Path(__file__).parent / "helpdesk_files"


@dataclass(frozen=True)
class AmbiguousMessage:
    """A message that two labels fit."""

    text: str
    labels: tuple[str, str]


def out_of_scope() -> tuple[str, ...]:
    """Messages that none of the labels fits."""
    return tuple(row["text"] for _, row in _open("out_of_scope").rows())


def ambiguous() -> tuple[AmbiguousMessage, ...]:
    """Messages that each fit two labels equally well."""
    rows = _open("ambiguous").rows()
    return tuple(AmbiguousMessage(row["text"], (row["labels"][0], row["labels"][1])) for _, row in rows)


def _open(name: str) -> Table:
    return open_table(_FOLDER / f"{name}.jsonl")


def _load(split: str, folder: Path | None) -> Table:
    return _open(split)


register(
    Task(
        name="helpdesk",
        kind="classification",
        text_columns=("text",),
        label_names=LABELS,
        splits=("train", "validation", "test"),
        description="bundled: what does the customer of a software company want? 12 intents",
        loader=_load,
    )
)
