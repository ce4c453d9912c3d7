"""Ways to train, predict and calibrate side by side: on test rows, on corrupted ones, and on messages out of scope.

    python benchmarks/uncertainty.py --study STUDY [STUDY] --out FOLDER [--draws 8] [--corrupted typos:2 cut:2]

Takes the finished runs of studies of a classification task that kept their adapters, without label noise. Each method
has the learning rate whose validation NLL is the smallest, averaged over the seeds that tried all rates; all else is
fitted to validation rows too. So one study may try the rates, and a second one more seeds at the best. Every case (a
way of predicting and a seed) has a file of its own, so that the same command resumes where it stopped, and takes in
runs that were finished since. ``uncertainty.parquet`` has a row for each case, with and without a temperature, and
each corruption; ``uncertainty.md`` the means over seeds. The study's folder is only read. ``--from FILE`` shows what
an earlier call wrote.

This is the protocol of Ovadia et al. 2019: fit to clean validation rows, report on clean and on corrupted test rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from results import table
from scipy import stats

from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupted_rows
from monteclora.errors import MonteCLoRAError
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.calibrators import fitted_calibrators
from monteclora.evaluation.laplace import prepare_sampler
from monteclora.metrics.ood import auroc
from monteclora.metrics.registry import measure
from monteclora.metrics.selective import risk_coverage
from monteclora.prediction.cost import Metered, metered
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import MEAN
from monteclora.runs.ensemble import load_ensemble
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import replacing, write_file
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import load
from monteclora.tasks.classification import classify
from monteclora.tasks.helpdesk import ambiguous, out_of_scope

MEMBERS = 5
CLEAN = ("none", 0)
MEASURES = (
    "accuracy",
    "mcc",
    "nll",
    "brier",
    "ece",
    "aurc",
    "error_entropy",
    "error_mutual_information",
    "ood_entropy",
    "ood_mutual_information",
)
TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "peft_monteclora": "peft's MonteCLoRA",
    "monteclora": "MonteCLoRA",
    "monteclora wide": "MonteCLoRA wide",
}


@dataclass(frozen=True)
class Way:
    """A way of predicting; each is measured without and with a temperature.

    Attributes:
        arm: of the run: a method, or ``monteclora wide`` for one with a scale of its own.
        sampler: by name.
        rows: calibrate the posterior's scale; of a plain LoRA, with a posterior of such rows.
        layers: the last adapted blocks that are drawn; None is all.
    """

    arm: str
    sampler: str = "mean"
    rows: str | None = None
    layers: int | None = None


WAYS = {
    "full fine-tuning": Way("full"),
    "LoRA": Way("lora"),
    "DoRA": Way("dora"),
    "LoRA, MC dropout": Way("lora", "mc_dropout"),
    "LoRA, Laplace": Way("lora", "laplace"),
    f"ensemble of {MEMBERS} LoRA": Way("lora", "ensemble"),
    "LoRA + calibrate": Way("lora", "posterior", "equal"),
    "LoRA + calibrate, isotropic": Way("lora", "posterior", "isotropic"),
    "LoRA + calibrate in the last block": Way("lora", "posterior", "equal", 1),
    "peft's MonteCLoRA": Way("peft_monteclora"),
    **{
        f"{TITLES[arm]}{suffix}": Way(arm, *how)
        for arm in ("monteclora", "monteclora wide")
        for suffix, how in {
            ", mean": (),
            ", posterior": ("posterior",),
            ", calibrated": ("posterior", "trained"),
            ", posterior in the last block": ("posterior", None, 1),
            ", calibrated in the last block": ("posterior", "trained", 1),
        }.items()
    },
}


@dataclass(frozen=True)
class Run:
    """A finished run of the study."""

    folder: Path
    arm: str
    seed: int
    rate: float
    nll: float
    seconds: float
    memory: float


def runs_of(study: Path, batch_size: int | None) -> Iterator[Run]:
    """The finished runs that kept their adapters, with the validation NLL of their weights."""
    for folder in sorted((study / "trials").iterdir()):
        run = RunFolder(folder)
        try:
            recipe, done = run.recipe, run.finished
        except (MonteCLoRAError, OSError):
            continue
        if done is None or recipe.data.label_noise or batch_size not in (None, recipe.training.batch_size):
            continue
        method: Any = recipe.method
        wide = " wide" if getattr(method, "sample_scale", None) is not None else ""
        nll = done["metrics"].get("nll")  # of the weights that were kept, which need not be the last ones
        if nll is not None and f"{method.name}{wide}" in TITLES:
            yield Run(
                folder,
                f"{method.name}{wide}",
                recipe.seed,
                recipe.training.learning_rate,
                nll,
                done["seconds"],
                done["peak_memory_bytes"],
            )


def best(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """The runs of an arm at its best rate, by seed: the one with the least NLL over the seeds that tried all rates."""
    by_rate: dict[float, dict[int, Run]] = {}
    for run in runs:
        if run.arm == arm:
            by_rate.setdefault(run.rate, {})[run.seed] = run
    if not by_rate:
        return {}
    tried_by_all = set.intersection(*(set(each) for each in by_rate.values()))

    def nll(rate: float) -> float:
        return float(np.mean([by_rate[rate][seed].nll for seed in tried_by_all]))

    if not tried_by_all:
        return {}
    return by_rate[min(by_rate, key=nll)]


def groups(way: Way, of_arm: Mapping[int, Run]) -> dict[int, list[Run]]:
    """The runs that predict together, by seed: one each, or five that no other ensemble has, numbered from 0."""
    if way.sampler != "ensemble":
        return {seed: [run] for seed, run in of_arm.items()}
    runs = [of_arm[seed] for seed in sorted(of_arm)]
    return {number: runs[MEMBERS * number :][:MEMBERS] for number in range(len(runs) // MEMBERS)}


def prepared(way: Way, runs: Sequence[Run], work: Path, draws: int) -> LoadedRun:
    """Copies of the runs, calibrated where that is asked for, loaded."""
    copies = []
    for each in runs:
        copies.append(work / f"{each.arm.replace(' ', '-')}-{each.seed}")
        shutil.copytree(each.folder, copies[-1], ignore=shutil.ignore_patterns("checkpoints", "*.parquet"))
    if way.sampler == "ensemble":
        return load_ensemble(copies)
    if way.rows is not None:
        rows: Any = None if way.rows == "trained" else way.rows
        calibrate(copies[0], rows=rows, num_samples=draws, layers=way.layers, progress=False)
    return load_run(copies[0])


def measured(way: Way, loaded: LoadedRun, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The measures on test rows, clean and corrupted, and what the predictions of clean ones cost."""
    draws = args.draws
    count = None if way.sampler in ("mean", "ensemble") else draws
    prepare_sampler(loaded, way.sampler, count)
    sampler = loaded.sampler(way.sampler, count, layers=way.layers)
    calibrators, _ = fitted_calibrators(loaded, "temperature", sampler, 0)
    temperature = calibrators[(sampler or MEAN).name]
    test = some_rows(load(loaded.recipe.data, ("test",)).split("test"), args.test_rows)

    def predicted(rows: Dataset) -> tuple[Predictions, float, int]:
        started = time.perf_counter()
        with metered(loaded.model) as meter:
            drawn = sampler and Metered.of(sampler, meter)
            (found,), _ = classify(loaded.predictor(drawn), rows, (drawn or MEAN,))
        return found, time.perf_counter() - started, meter.calls

    outside = {}
    if loaded.recipe.data.task == "helpdesk":
        texts = {"epistemic_outside": list(out_of_scope()), "epistemic_ambiguous": [m.text for m in ambiguous()]}
        outside = {name: predicted(Dataset.from_dict({"text": each}))[0] for name, each in texts.items()}
    records = []
    for corruption, strength in (CLEAN, *args.corrupted):
        rows = test if corruption == CLEAN[0] else corrupted_rows(test, corruption, strength)
        found, seconds, passes = predicted(rows)
        cost = {"seconds_per_1000": 1000 * seconds / len(rows), "passes": passes}
        for name, apply in (("none", _unchanged), ("temperature", temperature.apply)):
            far = {key: apply(each) for key, each in outside.items()}
            records.append(
                {
                    "calibrator": name,
                    "corruption": corruption,
                    "strength": strength,
                    **measures(apply(found), np.asarray(rows["label"][:]), far),
                    **(cost if corruption == CLEAN[0] else {}),
                    **({"temperature": temperature.state["temperature"]} if name == "temperature" else {}),
                }
            )
    return records


def some_rows(rows: Dataset, count: int | None) -> Dataset:
    """So many rows drawn at random, the same ones in every call, in their order; all where there are no more."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:count]))


def _unchanged(found: Predictions) -> Predictions:
    return found


def measures(found: Predictions, labels: np.ndarray, far: Mapping[str, Predictions]) -> dict[str, float]:
    """Of predictions of labelled rows; AUROCs of telling wrong from right ones, and out-of-scope messages from all."""
    scores = dict(measure("classes", found.probs, labels))
    right = found.probs.argmax(1) == labels
    curve = risk_coverage(found.probs.max(1), right)
    record = {name: float(scores[name]) for name in ("accuracy", "mcc", "nll", "brier", "ece")}
    record |= {"aurc": float(curve.aurc), "epistemic": float(np.median(found.epistemic))}
    if 0 < right.sum() < len(right):
        record["error_entropy"] = auroc(found.total[right], found.total[~right])
        if found.num_samples > 1:
            record["error_mutual_information"] = auroc(found.epistemic[right], found.epistemic[~right])
    record |= {name: float(np.median(each.epistemic)) for name, each in far.items()}
    if far:
        other = far["epistemic_outside"]
        record["ood_entropy"] = auroc(found.total, other.total)
        if found.num_samples > 1:
            record["ood_mutual_information"] = auroc(found.epistemic, other.epistemic)
    return record


def run_case(name: str, way: Way, seed: int, runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Measure a case and keep it; one that cannot be measured is kept with the reason."""
    place = args.out / "cases" / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
    how = {
        "runs": [run.folder.name for run in runs],
        "draws": args.draws,
        "corrupted": [list(each) for each in args.corrupted],
        **({} if args.test_rows is None else {"test_rows": args.test_rows}),
    }
    if place.exists() and how.items() <= json.loads(place.read_text()).items():
        return
    print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
    work = args.out / "work" / place.stem  # its own: several commands may share the folder
    shutil.rmtree(work, ignore_errors=True)
    trained = {"rate": runs[0].rate, "train_seconds": sum(run.seconds for run in runs)}
    trained["peak_memory_mb"] = max(run.memory for run in runs) / 1e6
    record: dict[str, Any] = {"way": name, "seed": seed, **trained, **how}
    try:
        with quiet_libraries():
            loaded = prepared(way, runs, work, args.draws)
            record["settings"] = measured(way, loaded, args)
    except MonteCLoRAError as error:
        record["left_out"] = error.message
    write_file(place, (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(work, ignore_errors=True)


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "cases").glob("*.json"))]


def write_tables(out: Path) -> None:
    """``uncertainty.parquet`` and ``uncertainty.md`` of the cases so far."""
    records = records_of(out)
    about = ("way", "seed", "rate", "train_seconds", "peak_memory_mb", "draws")
    rows = [{**{key: r[key] for key in about}, **setting} for r in records for setting in r.get("settings", [])]
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(out / "uncertainty.parquet") as temporary:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), temporary)
    left_out = {r["way"]: r["left_out"] for r in records if "left_out" in r}
    notes = "".join(f"\n{way}: left out, {reason}\n" for way, reason in left_out.items())
    write_file(out / "uncertainty.md", (tables(rows) + notes).encode())


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the rows of ``uncertainty.parquet``, as Markdown."""
    texts = ["## Clean test rows", table(*clean_table(rows))]
    if any(row["corruption"] != CLEAN[0] for row in rows):
        texts += ["## Corrupted test rows, mean over corruptions", table(*shifted_table(rows))]
    return "\n\n".join(texts) + "\n"


def clean_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    cost = ("rate", "epistemic", "epistemic_outside", "passes", "seconds_per_1000", "train_seconds", "peak_memory_mb")
    return _means(rows, (*MEASURES, *cost), lambda row: row["corruption"] == CLEAN[0])


def shifted_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return _means(rows, MEASURES, lambda row: row["corruption"] != CLEAN[0])


def _means(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], wanted: Callable[[Mapping[str, Any]], bool]
) -> tuple[list[str], list[list[str]]]:
    """For each way the mean over seeds of the mean over settings, ± half the 95 % interval (Student's t over seeds)."""
    columns = [name for name in columns if any(row.get(name) is not None for row in rows if wanted(row))]
    body = []
    for way in WAYS:
        for calibrator, suffix in (("none", ""), ("temperature", " + temperature")):
            mine = [row for row in rows if row["way"] == way and row["calibrator"] == calibrator and wanted(row)]
            seeds = sorted({row["seed"] for row in mine})
            if not seeds:
                continue
            cells = [way + suffix, str(len(seeds))]
            for column in columns:
                by_seed = [[r[column] for r in mine if r["seed"] == s and r.get(column) is not None] for s in seeds]
                cells.append(_cell([float(np.mean(each)) for each in by_seed if each]))
            body.append(cells)
    return ["", "seeds", *columns], body


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1 or len(set(values)) == 1:
        return f"{np.mean(values):.4g}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.4g} ± {half:.2g}"


def corruption(text: str) -> tuple[str, int]:
    """Of ``typos:2``."""
    name, _, strength = text.partition(":")
    if name not in CORRUPTIONS or strength not in map(str, STRENGTHS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(CORRUPTIONS)}, and :1, :2 or :3")
    return name, int(strength)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, nargs="+", help="folders of studies whose trials kept their adapters")
    parser.add_argument("--from", dest="written", type=Path, help="show the tables of an earlier uncertainty.parquet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "uncertainty")
    parser.add_argument("--batch-size", type=int, help="of the runs to take; by default all")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument(
        "--test-rows", type=int, help="measure on so many of the test rows, the same ones in every case"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--corrupted",
        type=corruption,
        nargs="*",
        default=[(name, strength) for name in CORRUPTIONS for strength in STRENGTHS],
        metavar="NAME:STRENGTH",
    )
    args = parser.parse_args()
    if args.written is not None:
        print(tables(pq.read_table(args.written).to_pylist()))
        return
    if args.study is None:
        parser.error("--study or --from is needed")
    runs = [run for study in args.study for run in runs_of(study, args.batch_size)]
    for name in args.ways:
        way = WAYS[name]
        for seed, together in groups(way, best(runs, way.arm)).items():
            if seed in args.seeds:
                run_case(name, way, seed, together, args)
                write_tables(args.out)
    write_tables(args.out)
    if (args.out / "uncertainty.md").exists():
        print((args.out / "uncertainty.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
