"""Answer options scored behind a shared prompt, beside one option at a time: arc_easy with smollm2.

    MONTECLORA_DATA=<folder> python benchmarks/options.py

Both score the same rows; the largest difference of their log-likelihoods is printed, and the median time of each with
the ratio (see timing.py).
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import numpy as np
import torch
from common import load_base
from timing import alternate, compare

from monteclora.data.encoding import IGNORED, Encoder
from monteclora.data.models import load_tokenizer, resolve_model
from monteclora.prediction.options import OptionRow, score_options
from monteclora.tasks import DataSpec, load


def questions(count: int, tokenizer) -> list[OptionRow]:
    rows = load(DataSpec(task="arc_easy"), splits=["test"]).split("test").select(range(count))
    found, encoder = [], Encoder(tokenizer)
    for row in rows:
        encoded, _ = encoder.options(row["prompt"], row["options"], 512)
        start = next(i for i, label in enumerate(encoded[0]["labels"]) if label != IGNORED)
        found.append(OptionRow(encoded[0]["input_ids"][:start], [each["input_ids"][start:] for each in encoded]))
    return found


@torch.no_grad()
def one_at_a_time(model, rows: list[OptionRow], ends: frozenset[int]) -> np.ndarray:
    """A plain loop: each option in a pass of its own, together with its prompt."""
    width = max(len(row.options) for row in rows)
    found = np.full((1, len(rows), width), -np.inf)
    for i, row in enumerate(rows):
        kept = [[t for j, t in enumerate(o) if not set(o[j:]) <= ends] for o in row.options]
        if any(a != b and b[: len(a)] == a for a in kept for b in kept):
            kept = row.options
        for k, option in enumerate(kept):
            ids = torch.tensor([row.prompt + option])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(option) + 1).logits[0, :-1]
            found[0, i, k] = logits.float().log_softmax(-1)[range(len(option)), option].double().sum()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    model = load_base("smollm2").eval()
    tokenizer = load_tokenizer(resolve_model("smollm2"))
    rows, ends = questions(args.rows, tokenizer), frozenset(tokenizer.all_special_ids)
    shared = partial(score_options, model, rows, ends=ends, batch_size=args.batch_size)
    alone = partial(one_at_a_time, model, rows, ends)
    one, other = shared().log_likelihoods, alone()
    difference = np.abs(one - other)[np.isfinite(other)].max()
    times = alternate({"one at a time": alone, "shared prompt": shared}, torch.device("cpu"), rounds=args.rounds)
    table = compare(times, {"shared prompt": "one at a time"})
    print(json.dumps({"rows": args.rows, "largest difference, nats": float(difference), **table}, indent=2))


if __name__ == "__main__":
    main()
