"""Wrong labels in training rows, on purpose: to measure how a method copes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monteclora.data.splitting import content_ranks
from monteclora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["with_label_noise"]


def with_label_noise(rows: Dataset, share: float, seed: int, classes: int | None) -> tuple[Dataset, int]:
    """Rows of which a share is labelled wrongly, and how many those are.

    A hash of seed and content chooses the ``round(share * rows)`` rows and, uniformly, what each is labelled instead:
    the order of the rows does not matter, and more noise keeps the wrong labels of less noise.

    Args:
        rows: with ``label``, an id, or with ``options``, ``answer`` and ``completion``.
        share: of the rows, in [0, 1].
        seed: of the choice.
        classes: how many labels there are; None for rows without labels.

    Raises:
        ConfigError: the rows have neither labels nor answer options.
        DataError: a completion does not contain the answer, or no option is another answer.
    """
    if classes is None and not {"options", "answer"} <= set(rows.column_names):
        raise ConfigError(
            "data.label_noise is given, and the training rows have neither labels nor answer options",
            "Leave it out, or use a task with labels or options.",
        )
    order = content_ranks(rows, seed, "label noise")
    chosen = set(sorted(range(len(rows)), key=lambda index: order[index])[: round(share * len(rows))])
    draws = [int.from_bytes(rank, "big") for rank in content_ranks(rows, seed, "wrong label")]

    def changed(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in chosen:
            return row
        if classes is not None:
            return {**row, "label": (row["label"] + 1 + draws[index] % (classes - 1)) % classes}
        others = [option for option in row["options"] if option != row["answer"]]
        before, found, after = row["completion"].rpartition(row["answer"])
        if not others or not found:
            what = f"the completion {row['completion']!r} does not contain it" if others else "there is no other option"
            raise DataError(
                f"row {index} cannot have a wrong answer in place of {row['answer']!r}: {what}",
                "Correct the columns completion, options and answer, or leave data.label_noise out.",
            )
        wrong = others[draws[index] % len(others)]
        return {**row, "answer": wrong, "completion": before + wrong + after}

    kept = rows.to_list()
    import datasets

    noisy = datasets.Dataset.from_list([changed(row, i) for i, row in enumerate(kept)], features=rows.features)
    return noisy, len(chosen)
