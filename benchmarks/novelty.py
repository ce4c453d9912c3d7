"""Scores that tell messages out of scope, and random keystrokes, from helpdesk's test messages.

    python benchmarks/novelty.py RUN RUN ... [--draws 8] [--halves 20] [--out FILE]

Takes finished runs of the task helpdesk, which are only read. Test and out-of-scope messages are divided in halves by
their content. The table has the AUROC of each score on either half, a mean over the runs of a method, so that whoever
chooses a score by the first half can report the second. ``--halves`` repeats choice and report on so many random
divisions. Random keystrokes count as found where their score is above the 95th percentile of all test messages. A score
is fitted to training rows and standardised by validation rows alone. Scores of the pretrained model's features take a
forward pass of their own, the others none. ``--from FILE`` shows what an earlier call wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from results import table

from monteclora.data.encoding import encode
from monteclora.metrics.ood import auroc, neighbour_distance
from monteclora.prediction.novelty import Novelty, Seen, predict_and_look, with_pretrained
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.whitening import Whitening
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.system.atomic import write_file
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import load
from monteclora.tasks.classification import classify
from monteclora.tasks.helpdesk import out_of_scope

Scores = dict[str, np.ndarray]
Halves = tuple[np.ndarray, np.ndarray]
DEFAULT = "novelty (the default)"
NEW = "share of new tokens"
PAIRS = "share of new pairs"
EARLIER = "energy + 2 x three nearest, pretrained, both views"


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


def seen_by(
    loaded: LoadedRun, rows: Sequence[dict], pretrained: dict[str, np.ndarray], name: str
) -> tuple[Predictions, Seen]:
    """At the mean, with the pretrained model's features, which are measured with the first run and stand for all."""
    predictions, found = predict_and_look(loaded.model, rows, loaded.collate)
    if name not in pretrained:
        shown = with_pretrained(loaded.model, found, rows, loaded.collate).pretrained
        assert shown is not None
        pretrained[name] = shown
    return predictions, replace(found, pretrained=pretrained[name])


def views(features: np.ndarray) -> dict[str, np.ndarray]:
    """Of a row's two views, each and both."""
    mean, token = np.split(features, 2, axis=1)
    return {"mean": mean, "first token": token, "both views": features}


def distances(ours: np.ndarray, known: np.ndarray, at: str) -> Scores:
    """Of rows to the training rows by one view: as it is, without the training rows' mean, and whitened by them."""
    middle = known.mean(0)
    by_ridge = {ridge: Whitening.of(known, ridge) for ridge in (0.1, 1, 10)}
    return {
        f"nearest row, {at}": neighbour_distance(ours, known),
        f"three nearest, {at}": neighbour_distance(ours, known, 3),
        f"nearest row, {at}, centred": neighbour_distance(ours - middle, known - middle),
        f"three nearest, {at}, centred": neighbour_distance(ours - middle, known - middle, 3),
        **{
            f"three nearest, {at}, whitened (ridge {ridge})": neighbour_distance(whiten(ours), whiten(known), 3)
            for ridge, whiten in by_ridge.items()
        },
    }


def mahalanobis(rows: np.ndarray, known: np.ndarray, labels: np.ndarray, *, relative: bool) -> np.ndarray:
    """To the nearest class mean (Lee et al. 2018); relative: less that to the mean of all rows (Ren et al. 2021)."""
    kinds, of_row = np.unique(labels, return_inverse=True)
    means = np.stack([known[labels == label].mean(0) for label in kinds])

    def whitening(deviations: np.ndarray) -> np.ndarray:
        covariance = deviations.T @ deviations / len(deviations)
        covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return np.linalg.cholesky(np.linalg.inv(covariance))

    within = whitening(known - means[of_row])
    found = np.min([(((rows - mean) @ within) ** 2).sum(1) for mean in means], 0)
    if not relative:
        return found
    return found - (((rows - known.mean(0)) @ whitening(known - known.mean(0))) ** 2).sum(1)


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
    shown = {name: seen_by(loaded, rows, pretrained, name) for name, rows in encoded.items()}
    train = shown["train"][1]
    assert train.pretrained is not None
    sampler = loaded.sampler(None, draws if loaded.has_posterior else None)
    found: dict[str, Scores] = {}
    novelty = Novelty.fit(train, shown["validation"][1])
    for name, rows in sets.items():
        predictions, seen = shown[name]
        assert seen.pretrained is not None
        scores = {
            "maximum probability": -predictions.probs.max(1),
            "entropy": predictions.total,
            "maximum logit": -seen.max_logit,
            "energy": seen.energy,
            NEW: novelty.parts_of(seen)[2],
            PAIRS: novelty.parts_of(seen)[3],
        }
        if sampler is not None:
            (drawn,), _ = classify(loaded.predictor(sampler), rows, (sampler,))
            scores["mutual information"] = drawn.epistemic
        of_tuned = views(train.features)
        for view, ours in views(seen.features).items():
            scores |= distances(ours, of_tuned[view], f"tuned, {view}")
            if view != "both views":
                for relative, kind in ((False, "Mahalanobis"), (True, "relative Mahalanobis")):
                    scores[f"{kind}, tuned, {view}"] = mahalanobis(ours, of_tuned[view], labels, relative=relative)
        of_pretrained = views(train.pretrained)
        for view, ours in views(seen.pretrained).items():
            scores |= distances(ours, of_pretrained[view], f"pretrained, {view}")
        scores[DEFAULT] = novelty.of(seen)
        found[name] = scores
    combined(found)
    return found


def combined(found: dict[str, Scores]) -> None:
    """Add sums of standardised scores: an output's with a distance, with new tokens and new pairs or without."""
    near = [name for name in found["test"] if name.startswith(("nearest row", "three nearest"))]
    held_out = found["validation"]
    spread = {name: (held_out[name].mean(), held_out[name].std()) for name in held_out}

    def of(scores: Scores, name: str) -> np.ndarray:
        centre, scale = spread[name]
        return (scores[name] - centre) / scale

    for output, distance in itertools.product(("energy", "maximum logit", "entropy"), near):
        for share, new, pairs in itertools.product((1, 2), (0, 1, 2), (0, 0.5, 1)):
            parts = {output: 1, distance: share, NEW: new, PAIRS: pairs}
            name = " + ".join(f"{times(each)}{part}" for part, each in parts.items() if each)
            for scores in found.values():
                scores[name] = sum(each * of(scores, part) for part, each in parts.items())


def times(share: float) -> str:
    return "" if share == 1 else f"{share} x "


def measures(found: dict[str, Scores], halved: Sequence[dict[str, Halves]]) -> Iterator[tuple[str, dict]]:
    """Of each score: AUROC by half, of the first of the divisions and of all of them, of all rows, and keystrokes."""
    for name, inside in found["test"].items():
        outside, keys = found["outside"][name], found["keystrokes"][name]
        limit = np.quantile(inside, 0.95, method="inverted_cdf")
        by_half = [
            [round(auroc(inside[half["test"][i]], outside[half["outside"][i]]), 4) for i in (0, 1)] for half in halved
        ]
        about = {"halves": by_half[0], "all": auroc(inside, outside), "keystrokes": float(np.mean(keys > limit))}
        yield name, {**about, "divisions": by_half[1:]}


def divisions(texts: dict[str, Sequence[str]], count: int) -> list[dict[str, Halves]]:
    """By content, then at random so many times."""
    found = [{name: halves(of) for name, of in texts.items()}]
    for seed in range(count):
        generator = np.random.default_rng(seed)
        orders = {name: generator.permutation(len(of)) for name, of in texts.items()}
        found.append({name: (order[: len(order) // 2], order[len(order) // 2 :]) for name, order in orders.items()})
    return found


def free(name: str) -> bool:
    """Whether the forward pass that answers a row gives its score."""
    return "pretrained" not in name and "mutual" not in name


def of_all(records: Sequence[dict]) -> list[str]:
    """The scores that every run has, besides the default, which is one of them under another name."""
    first = records[0]["scores"]
    return [name for name in first if name != DEFAULT and all(name in record["scores"] for record in records)]


def chosen(records: Sequence[dict], names: Sequence[str], values: Callable[[dict], float]) -> str:
    """The score with the largest mean over the runs of what ``values`` takes from its measures."""
    return max(names, key=lambda name: float(np.mean([values(record["scores"][name]) for record in records])))


def report(records: Sequence[dict]) -> str:
    """The table: the mean over all runs on the first half chooses, a method's runs on the second are reported."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    names = of_all(records)
    best = {
        "any": chosen(records, names, lambda score: score["halves"][0]),
        "without a pass of its own": chosen(records, [n for n in names if free(n)], lambda score: score["halves"][0]),
    }
    header = ["score"]
    for method in methods:
        seeds = ", ".join(str(record["seed"]) for record in records if record["method"] == method)
        header += [f"{method}, choosing half", f"other half, mean (seeds {seeds})", "all", "keystrokes"]
    plain = dict.fromkeys(name for record in records for name in record["scores"] if " + " not in name)
    shown = dict.fromkeys([*plain, EARLIER, *best.values()])
    body = [[name, *(cell for method in methods for cell in cells(records, method, name))] for name in shown]
    lines = [f"best of {len(names)} on the choosing half, {what}: {name}" for what, name in best.items()]
    return "\n".join([table(header, body), "", *lines, *over_divisions(records, names)])


def cells(records: Sequence[dict], method: str, name: str) -> list[str]:
    of = [r["scores"][name] for r in records if r["method"] == method and name in r["scores"]]
    if not of:
        return [""] * 4
    other = [s["halves"][1] for s in of]
    return [
        f"{np.mean([s['halves'][0] for s in of]):.3f}",
        f"{np.mean(other):.3f} ({', '.join(f'{value:.3f}' for value in other)})",
        f"{np.mean([s['all'] for s in of]):.3f}",
        f"{100 * np.mean([s['keystrokes'] for s in of]):.0f} %",
    ]


def over_divisions(records: Sequence[dict], names: Sequence[str]) -> Iterator[str]:
    """What choosing anew on each random division gives on the half that had no part in it, and the default there."""
    count = len(records[0]["scores"][DEFAULT]["divisions"])
    if not count:
        return
    kinds = {"any score": names, "scores without a pass of their own": [name for name in names if free(name)]}
    for what, candidates in kinds.items():
        picked = [chosen(records, candidates, lambda s, i=i: s["divisions"][i][0]) for i in range(count)]
        often = ", ".join(f"{number} x {name}" for name, number in Counter(picked).most_common(3))
        yield f"{count} random divisions, chosen anew among {what}: {spread_of(records, picked)}; {often}"
    for what, name in (("the default", DEFAULT), ("the earlier default", EARLIER)):
        yield f"{count} random divisions, {what}: {spread_of(records, [name] * count)}"


def spread_of(records: Sequence[dict], picked: Sequence[str]) -> str:
    """The AUROC on the other half: mean over runs and divisions, standard deviation over divisions, mean by run."""
    found = np.array([[r["scores"][n]["divisions"][i][1] for i, n in enumerate(picked)] for r in records])
    by_run = ", ".join(f"{r['method']} {r['seed']}: {m:.3f}" for r, m in zip(records, found.mean(1), strict=True))
    return f"{found.mean():.3f}, standard deviation {found.mean(0).std(ddof=1):.3f} ({by_run})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="finished runs of helpdesk")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--halves", type=int, default=0, help="random divisions, with a choice made anew on each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "novelty.json")
    parser.add_argument("--from", type=Path, dest="stored", help="show what an earlier call wrote to --out")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.stored):
        parser.error("give finished runs, or --from FILE")
    records = (
        json.loads(args.stored.read_text()) if args.stored else measured(args.runs, args.draws, args.halves, args.out)
    )
    print(report(records))


def measured(runs: Sequence[Path], draws: int, count: int, out: Path) -> list[dict]:
    """A record of each run; what is found is written after each."""
    records: list[dict] = []
    pretrained: dict[str, np.ndarray] = {}
    for folder in runs:
        print(f"{folder} ...", file=sys.stderr, flush=True)
        with quiet_libraries():
            loaded = load_run(folder)
            own = load(loaded.recipe.data, ("validation", "test"))
            texts = {"outside": list(out_of_scope()), "keystrokes": keystrokes()}
            sets = {name: own.split(name) for name in ("validation", "test")}
            sets |= {name: Dataset.from_dict({"text": each}) for name, each in texts.items()}
            found = scores_of(loaded, sets, draws, pretrained)
        halved = divisions({"test": sets["test"]["text"][:], "outside": texts["outside"]}, count)
        about = {"run": folder.name, "method": loaded.recipe.method.name, "seed": loaded.recipe.seed}
        records.append({**about, "scores": dict(measures(found, halved))})
        write_file(out, (json.dumps(records) + "\n").encode())
    return records


if __name__ == "__main__":
    main()
