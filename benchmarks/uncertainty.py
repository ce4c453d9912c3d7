"""Which way of predicting knows what it does not know: on test rows, on corrupted ones, and on messages out of scope.

    python benchmarks/uncertainty.py --study STUDY

Takes the finished runs of a study of ``helpdesk`` that kept their adapters, of method lora and monteclora, without
label noise and at one batch size. For each seed and method the run whose validation NLL at the mean is the smallest is
taken; all else is fitted to validation rows too. Every case (a way of predicting and a seed) has a file of its own, so
that the same command resumes where it stopped, and takes in runs that were finished since. ``uncertainty.parquet`` has
a row for each case and corruption, ``uncertainty.md`` the means over seeds. The study's folder is only read.

This is the protocol of Ovadia et al. 2019: fit to clean validation rows, report on clean and on corrupted test rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from results import table

from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupted_rows
from monteclora.errors import MonteCLoRAError
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.calibrators import fitted_calibrators
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

DRAWS, MEMBERS = 16, 5
CLEAN = "none"
MEASURES = ("accuracy", "nll", "brier", "ece", "aurc", "ood_entropy", "ood_mutual_information")


@dataclass(frozen=True)
class Way:
    """A way of predicting.

    Attributes:
        arm: of the run: ``lora``, ``monteclora`` or ``monteclora wide``.
        sampler: by name.
        temperature: whether one is fitted.
        rows: calibrate the posterior's scale; of a plain LoRA, with a posterior of such rows.
    """

    arm: str
    sampler: str = "mean"
    temperature: bool = False
    rows: str | None = None


WAYS = {
    "LoRA": Way("lora"),
    "LoRA + temperature": Way("lora", temperature=True),
    "LoRA, MC dropout": Way("lora", "mc_dropout"),
    "LoRA, Laplace": Way("lora", "laplace"),
    f"ensemble of {MEMBERS} LoRA": Way("lora", "ensemble"),
    "LoRA + calibrate": Way("lora", "posterior", rows="equal"),
    "LoRA + calibrate + temperature": Way("lora", "posterior", True, "equal"),
    "LoRA + calibrate, isotropic": Way("lora", "posterior", rows="isotropic"),
    **{
        f"{title}{suffix}": Way(arm, *how)
        for arm, title in (("monteclora", "MonteCLoRA"), ("monteclora wide", "MonteCLoRA wide"))
        for suffix, how in {
            ", mean": (),
            ", posterior": ("posterior",),
            ", calibrated": ("posterior", False, "trained"),
            ", calibrated + temperature": ("posterior", True, "trained"),
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


def runs_of(study: Path, batch_size: int) -> Iterator[Run]:
    """The finished runs that kept their adapters, with the validation NLL they ended with."""
    for folder in sorted((study / "trials").iterdir()):
        run = RunFolder(folder)
        try:
            recipe, done = run.recipe, run.finished is not None
        except (MonteCLoRAError, OSError):
            continue
        plain = recipe.data.task == "helpdesk" and not recipe.data.label_noise
        if not done or not plain or recipe.training.batch_size != batch_size:
            continue
        method: Any = recipe.method
        if method.name not in ("lora", "monteclora"):
            continue
        wide = getattr(method, "sample_scale", None) is not None
        nlls = [event["nll"] for event in run.metrics.read() if event["event"] == "eval" and "nll" in event]
        if nlls:
            yield Run(
                folder, f"{method.name}{' wide' if wide else ''}", recipe.seed, recipe.training.learning_rate, nlls[-1]
            )


def best(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """For each seed the run with the smallest validation NLL."""
    found: dict[int, Run] = {}
    for run in runs:
        if run.arm == arm and (run.seed not in found or run.nll < found[run.seed].nll):
            found[run.seed] = run
    return found


def prepared(way: Way, run: Run, members: Sequence[Run], work: Path) -> LoadedRun:
    """A copy of the run, calibrated where that is asked for, loaded."""
    copies = []
    for each in [run, *(m for m in members if m is not run)] if way.sampler == "ensemble" else [run]:
        copies.append(work / f"{each.arm.replace(' ', '-')}-{each.seed}")
        shutil.copytree(each.folder, copies[-1], ignore=shutil.ignore_patterns("checkpoints", "*.parquet"))
    if way.sampler == "ensemble":
        return load_ensemble(copies)
    if way.rows is not None:
        rows: Any = None if way.rows == "trained" else way.rows
        calibrate(copies[0], rows=rows, temperature=way.temperature, num_samples=DRAWS, progress=False)
    return load_run(copies[0])


def measured(way: Way, loaded: LoadedRun) -> list[dict[str, Any]]:
    """The measures on test rows, clean and corrupted, and what the predictions of clean ones cost."""
    count = None if way.sampler in ("mean", "ensemble") else DRAWS
    sampler = loaded.sampler(way.sampler, count)
    name = "temperature" if way.temperature else None
    calibrators, _ = fitted_calibrators(loaded, name, sampler, 0)
    test = load(loaded.recipe.data, ("test",)).split("test")
    outside = Dataset.from_dict({"text": list(out_of_scope())})
    between = Dataset.from_dict({"text": [message.text for message in ambiguous()]})

    def predicted(rows: Dataset) -> tuple[Predictions, float, int]:
        started = time.perf_counter()
        with metered(loaded.model) as meter:
            drawn = sampler and Metered.of(sampler, meter)
            predictor = loaded.predictor(drawn, calibrators=calibrators)
            (found,), _ = classify(predictor, rows, (drawn or MEAN,))
        return found, time.perf_counter() - started, meter.calls

    far, near = predicted(outside)[0], predicted(between)[0]
    settings = [(CLEAN, 0), *((name, strength) for name in CORRUPTIONS for strength in STRENGTHS)]
    records = []
    for corruption, strength in settings:
        rows = test if corruption == CLEAN else corrupted_rows(test, corruption, strength)
        found, seconds, passes = predicted(rows)
        record = {"corruption": corruption, "strength": strength, **measures(found, np.asarray(rows["label"][:]), far)}
        if corruption == CLEAN:
            record |= {"seconds": seconds, "passes": passes, "epistemic": float(np.median(found.epistemic))}
            record |= {"epistemic_outside": float(np.median(far.epistemic))}
            record |= {"epistemic_ambiguous": float(np.median(near.epistemic))}
        records.append(record)
    return records


def measures(found: Predictions, labels: np.ndarray, far: Predictions) -> dict[str, float]:
    """Of predictions of labelled rows, and of telling out-of-scope messages from them."""
    scores = dict(measure("classes", found.probs, labels))
    curve = risk_coverage(found.probs.max(1), found.probs.argmax(1) == labels)
    record = {name: float(scores[name]) for name in ("accuracy", "nll", "brier", "ece")}
    record |= {"aurc": float(curve.aurc), "ood_entropy": auroc(found.total, far.total)}
    if found.num_samples > 1:
        record["ood_mutual_information"] = auroc(found.epistemic, far.epistemic)
    return record


def run_case(name: str, way: Way, run: Run, members: Sequence[Run], out: Path) -> None:
    """Measure a case and keep it; one that cannot be measured is kept with the reason."""
    place = out / "cases" / f"{name.replace(' ', '-').replace(',', '')}-{run.seed}.json"
    chosen = [str(each.folder.name) for each in members] if way.sampler == "ensemble" else [run.folder.name]
    if place.exists() and json.loads(place.read_text())["runs"] == chosen:
        return
    print(f"{name}, seed {run.seed} ...", file=sys.stderr, flush=True)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    record: dict[str, Any] = {"way": name, "seed": run.seed, "rate": run.rate, "runs": chosen}
    try:
        with quiet_libraries():
            record["settings"] = measured(way, prepared(way, run, members, work))
    except MonteCLoRAError as error:
        record["left_out"] = error.message
    write_file(place, (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(work, ignore_errors=True)


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "cases").glob("*.json"))]


def write_tables(out: Path) -> None:
    """``uncertainty.parquet`` and ``uncertainty.md`` of the cases so far."""
    records = records_of(out)
    rows = [
        {"way": r["way"], "seed": r["seed"], "rate": r["rate"], **setting}
        for r in records
        for setting in r.get("settings", [])
    ]
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(out / "uncertainty.parquet") as temporary:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), temporary)
    texts = ["## Clean test rows", table(*clean_table(rows))]
    texts += ["## Corrupted test rows, mean over four corruptions at three strengths", table(*shifted_table(rows))]
    left_out = {r["way"]: r["left_out"] for r in records if "left_out" in r}
    texts += [f"{way}: left out, {reason}" for way, reason in left_out.items()]
    write_file(out / "uncertainty.md", ("\n\n".join(texts) + "\n").encode())


def clean_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = (*MEASURES, "epistemic", "epistemic_outside", "passes", "seconds")
    return _means(rows, columns, lambda row: row["corruption"] == CLEAN)


def shifted_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return _means(rows, MEASURES, lambda row: row["corruption"] != CLEAN)


def _means(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], wanted: Any) -> tuple[list[str], list[list[str]]]:
    """For each way the mean over seeds of the mean over settings; with a range where there are several seeds."""
    body = []
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way and wanted(row)]
        seeds = sorted({row["seed"] for row in mine})
        if not seeds:
            continue
        cells = [way, str(len(seeds))]
        for column in columns:
            by_seed = [[r[column] for r in mine if r["seed"] == seed and r.get(column) is not None] for seed in seeds]
            values = [float(np.mean(each)) for each in by_seed if each]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "")
        body.append(cells)
    return ["", "seeds", *columns], body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="folder of a study whose trials kept their adapters")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "uncertainty")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    runs = list(runs_of(args.study, args.batch_size))
    for seed in sorted({run.seed for run in runs}):
        for name, way in WAYS.items():
            of_arm = best(runs, way.arm)
            members = [of_arm[each] for each in sorted(of_arm)][:MEMBERS]
            if seed not in of_arm or (way.sampler == "ensemble" and (len(members) < 2 or seed != members[0].seed)):
                continue
            run_case(name, way, of_arm[seed], members, args.out)
            write_tables(args.out)
    write_tables(args.out)
    if (args.out / "uncertainty.md").exists():
        print((args.out / "uncertainty.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
