"""Encoded rows, and a collator as a tokenizer pads."""

import numpy as np
import torch

from tests.models import PAD

SIDES = ("left", "right")


def padding(side="right"):
    """A collator over token ids, as a tokenizer pads."""

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "attention_mask": []}
        for row in rows:
            blanks = [PAD] * (width - len(row["input_ids"]))
            ones, zeros = [1] * len(row["input_ids"]), [0] * len(blanks)
            ids = list(row["input_ids"])
            batch["input_ids"].append(blanks + ids if side == "left" else ids + blanks)
            batch["attention_mask"].append(zeros + ones if side == "left" else ones + zeros)
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def rows_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(2, 96, size=n).tolist()} for n in lengths]
