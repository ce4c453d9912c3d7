"""Scores that tell messages out of scope, and random keystrokes, from helpdesk's test messages.

    python benchmarks/novelty.py RUN RUN ... [--draws 8] [--out FILE]

Takes finished runs of the task helpdesk, which are only read. Test and out-of-scope messages are divided in halves by
their content. The table has the AUROC of each score on either half, a mean over the runs of a method, so that whoever
chooses a score by the first half can report the second. Random keystrokes count as found where their score is above the
95th percentile of all test messages. A score is fitted to training rows and standardised by validation rows alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from results import table

from monteclora.data.encoding import encode
from monteclora.metrics.ood import auroc, neighbour_distance
from monteclora.prediction.forward import batches
from monteclora.prediction.novelty import Novelty, Seen, look_at
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.system.atomic import write_file
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import load
from monteclora.tasks.classification import classify
from monteclora.tasks.helpdesk import out_of_scope

Scores = dict[str, np.ndarray]
DEFAULT = "novelty (the default)"


def keystrokes(count: int = 100) -> list[str]:
    """Two to ten words of two to nine letters each."""
    generator = random.Random(0)

    def word() -> str:
        return "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9)))

    return [" ".join(word() for _ in range(generator.randint(2, 10))) for _ in range(count)]


def halves(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the texts of each half."""
    order = np.array(sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest()))
    return order[: len(order) // 2], order[len(order) // 2 :]


def third_nearest(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Distances as Sun et al. (2022) have them: what three neighbours have beyond two."""
    return 3 * neighbour_distance(rows, known, 3) - 2 * neighbour_distance(rows, known, 2)


@dataclass(frozen=True)
class Tuned:
    """What the tuned model shows of B rows at its mean: logits, and two views of its last hidden states."""

    logits: np.ndarray
    views: dict[str, np.ndarray]


@torch.no_grad()
def tuned(loaded: LoadedRun, rows: Sequence[dict]) -> Tuned:
    """Of encoded rows."""
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    logits, means, firsts, order = [], [], [], []
    for indices in batches(inputs, 64):
        batch = loaded.collate([inputs[i] for i in indices])
        found = loaded.model(**batch, output_hidden_states=True)
        states, mask = found.hidden_states[-1].double(), batch["attention_mask"].unsqueeze(-1).double()
        logits.append(found.logits.double().numpy())
        means.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        firsts.append(states[:, 0].numpy())
        order += indices
    back = np.argsort(order)
    parts = [np.concatenate(each)[back] for each in (logits, means, firsts)]
    return Tuned(parts[0], {"mean": parts[1], "first token": parts[2]})


def seen_by(
    loaded: LoadedRun, rows: Sequence[dict], found: Tuned, pretrained: dict[str, np.ndarray], name: str
) -> Seen:
    """As ``look_at`` sees them; the features are the pretrained model's, so that the first run's stand for all."""
    if name not in pretrained:
        pretrained[name] = look_at(loaded.model, rows, loaded.collate).features
    return Seen(pretrained[name], -np.logaddexp.reduce(found.logits, axis=1), found.logits.max(1))


def mahalanobis(rows: np.ndarray, known: np.ndarray, labels: np.ndarray, *, relative: bool) -> np.ndarray:
    """To the nearest class mean (Lee et al. 2018); relative: less that to the mean of all rows (Ren et al. 2021)."""
    means = np.stack([known[labels == label].mean(0) for label in np.unique(labels)])
    of_row = np.searchsorted(np.unique(labels), labels)

    def squares(centred: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        covariance = deviations.T @ deviations / len(deviations)
        covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return (centred @ np.linalg.inv(covariance) * centred).sum(1)

    found = np.min([squares(rows - mean, known - means[of_row]) for mean in means], 0)
    return found - squares(rows - known.mean(0), known - known.mean(0)) if relative else found


def scores_of(
    loaded: LoadedRun, sets: dict[str, Dataset], draws: int, pretrained: dict[str, np.ndarray]
) -> dict[str, Scores]:
    """Of each set of rows, every score; ``pretrained`` keeps the features that all runs share."""
    training = load(loaded.recipe.data, ("train",)).split("train")
    labels = np.asarray(training["label"][:])
    known_rows = {**sets, "train": training}
    length = loaded.recipe.data.max_length
    encoded = {
        n: encode(rows, loaded.kind, loaded.tokenizer, length).dataset.to_list() for n, rows in known_rows.items()
    }
    shown = {name: tuned(loaded, rows) for name, rows in encoded.items()}
    seen = {name: seen_by(loaded, rows, shown[name], pretrained, name) for name, rows in encoded.items()}
    sampler = loaded.sampler(None, draws if loaded.has_posterior else None)
    found: dict[str, Scores] = {}
    width = seen["train"].features.shape[1] // 2
    novelty = Novelty.fit(seen["train"], seen["validation"])
    for name, rows in sets.items():
        predictor = loaded.predictor(sampler)
        (predictions,), _ = classify(predictor, rows, predictor.samplers[-1:])
        scores = {
            "maximum probability": -predictions.probs.max(1),
            "entropy": predictions.total,
            "mutual information": predictions.epistemic,
            "maximum logit": -seen[name].max_logit,
            "energy": seen[name].energy,
        }
        if sampler is None:
            del scores["mutual information"]
        for view in shown["train"].views:
            at = f"tuned, {view}"
            ours, known = shown[name].views[view], shown["train"].views[view]
            scores[f"nearest row, {at}"] = neighbour_distance(ours, known)
            scores[f"third nearest, {at}"] = third_nearest(ours, known)
            scores[f"Mahalanobis, {at}"] = mahalanobis(ours, known, labels, relative=False)
            scores[f"relative Mahalanobis, {at}"] = mahalanobis(ours, known, labels, relative=True)
        for at, part in (("mean", slice(width)), ("first token", slice(width, None)), ("both", slice(None))):
            ours, known = seen[name].features[:, part], seen["train"].features[:, part]
            scores[f"nearest row, pretrained, {at}"] = neighbour_distance(ours, known)
            scores[f"three nearest, pretrained, {at}"] = neighbour_distance(ours, known, 3)
        scores[DEFAULT] = novelty.of(seen[name])
        found[name] = scores
    combined(found)
    return found


def combined(found: dict[str, Scores]) -> None:
    """Add sums of standardised scores: an output's with a distance, once or twice."""
    distances = [name for name in found["test"] if ", pretrained" in name or "tuned" in name]
    held_out = found["validation"]
    for output in ("energy", "maximum logit", "entropy"):
        for distance in distances:
            for share in (1, 2):
                name = f"{output} + {'2 x ' if share == 2 else ''}{distance}"
                for scores in found.values():
                    parts = [(scores[n] - held_out[n].mean()) / held_out[n].std() for n in (output, distance)]
                    scores[name] = parts[0] + share * parts[1]


def measures(found: dict[str, Scores], half: dict[str, tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[str, dict]]:
    for name, inside in found["test"].items():
        outside, keys = found["outside"][name], found["keystrokes"][name]
        limit = np.quantile(inside, 0.95, method="inverted_cdf")
        by_half = [auroc(inside[half["test"][i]], outside[half["outside"][i]]) for i in (0, 1)]
        yield name, {"halves": by_half, "all": auroc(inside, outside), "keystrokes": float(np.mean(keys > limit))}


def chosen(records: Sequence[dict], method: str, names: Sequence[str]) -> str:
    """The score with the largest mean AUROC over a method's runs on the first half."""
    of = [record["scores"] for record in records if record["method"] == method]
    known = [name for name in names if name != DEFAULT and all(name in scores for scores in of)]
    return max(known, key=lambda name: float(np.mean([scores[name]["halves"][0] for scores in of])))


def report(records: Sequence[dict]) -> str:
    """The table: a method's mean on the first half chooses, its runs on the second half are what is reported."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))

    plain = [name for name in names if " + " not in name]
    best = {method: chosen(records, method, names) for method in methods}
    header = ["score"]
    for method in methods:
        seeds = ", ".join(str(record["seed"]) for record in records if record["method"] == method)
        header += [f"{method}, choosing half", f"other half, mean (seeds {seeds})", "all", "keystrokes"]
    body = []
    for name in [*plain, *dict.fromkeys(best.values())]:
        cells = [name]
        for method in methods:
            of = [r["scores"][name] for r in records if r["method"] == method and name in r["scores"]]
            if not of:
                cells += [""] * 4
                continue
            other = [s["halves"][1] for s in of]
            cells += [
                f"{np.mean([s['halves'][0] for s in of]):.3f}",
                f"{np.mean(other):.3f} ({', '.join(f'{value:.3f}' for value in other)})",
                f"{np.mean([s['all'] for s in of]):.3f}",
                f"{100 * np.mean([s['keystrokes'] for s in of]):.0f} %",
            ]
        body.append(cells)
    lines = [f"best of {len(names)} on the choosing half, {method}: {name}" for method, name in best.items()]
    return "\n".join([table(header, body), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of helpdesk")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "novelty.json")
    args = parser.parse_args()
    records, pretrained = [], {}
    for folder in args.runs:
        print(f"{folder} ...", file=sys.stderr, flush=True)
        with quiet_libraries():
            loaded = load_run(folder)
            own = load(loaded.recipe.data, ("validation", "test"))
            texts = {"outside": list(out_of_scope()), "keystrokes": keystrokes()}
            sets = {name: own.split(name) for name in ("validation", "test")}
            sets |= {name: Dataset.from_dict({"text": each}) for name, each in texts.items()}
            found = scores_of(loaded, sets, args.draws, pretrained)
        half = {"test": halves(sets["test"]["text"][:]), "outside": halves(texts["outside"])}
        about = {"run": folder.name, "method": loaded.recipe.method.name, "seed": loaded.recipe.seed}
        records.append({**about, "scores": dict(measures(found, half))})
        write_file(args.out, (json.dumps(records, indent=1) + "\n").encode())
    print(report(records))


if __name__ == "__main__":
    main()
