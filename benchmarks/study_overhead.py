"""What a study costs beside a shell loop over ``monteclora train`` and beside Ray Tune: wall time of the same trials.

python benchmarks/study_overhead.py

Each trial trains MiniLM on the bundled data for a few steps, with a learning rate of its own. All three run on the same
machine, one after the other, in a new folder, ``--rounds`` times in turns. The study evaluates its trials on
the test rows too, which the others do not. ``monteclora train`` ends with a verdict instead: a pass of the frozen model
over training and validation rows and a logistic regression, which the study and Ray Tune do without. Neither is taken
out of the times.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

BASE = "helpdesk-minilm-monteclora"


def overrides(steps: int) -> dict[str, Any]:
    return {"training.max_steps": steps, "training.num_workers": 0, "evaluation.num_samples": 2}


def rates(trials: int) -> list[float]:
    return [round(1e-4 * 1.05**number, 10) for number in range(trials)]


def run_study(folder: Path, trials: int, steps: int, workers: int) -> None:
    recipe = folder / "overhead.yaml"
    grid = {"training.learning_rate": rates(trials), "seed": [0]}
    study = {"base": BASE, "set": overrides(steps), "grid": grid, "output": str(folder / "study")}
    recipe.write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "monteclora", "study", str(recipe), "--workers", str(workers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    statuses = [json.loads(file.read_text())["status"] for file in (folder / "study" / "results").glob("*.json")]
    finished = statuses.count("finished")
    assert finished == len(statuses) == trials, f"{finished} of {trials} trials finished"


def run_loop(folder: Path, trials: int, steps: int, workers: int) -> None:
    """As a user would write it: one process a trial, one after the other."""
    options = " ".join(f"--{key} {value}" for key, value in overrides(steps).items())
    program = f"{shlex.quote(sys.executable)} -m monteclora train {BASE} {options}"
    lines = [
        f"{program} --training.learning_rate {rate} --output {shlex.quote(str(folder / str(number)))}"
        for number, rate in enumerate(rates(trials))
    ]
    script = "set -e\n" + "\n".join(lines)
    subprocess.run(["bash", "-c", script], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_tune(folder: Path, trials: int, steps: int, workers: int) -> None:
    code = f"""
import os
from ray import init, tune

def trial(config):
    import monteclora
    changes = [(key, str(value)) for key, value in config.items()]
    changes.append(("output", os.path.join({str(folder)!r}, "run-" + str(config["training.learning_rate"]))))
    run = monteclora.train({BASE!r}, changes, progress=False)
    tune.report({{"nll": run.metrics["nll"]}})

init(num_cpus={workers}, include_dashboard=False, log_to_driver=False)
space = {{**{overrides(steps)!r}, "training.learning_rate": tune.grid_search({rates(trials)!r})}}
found = tune.Tuner(tune.with_resources(trial, {{"cpu": 1}}), param_space=space).fit()
assert not found.errors and len(found) == {trials}, found.errors
"""
    program = folder / "tune.py"
    program.write_text(code)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    subprocess.run(
        [sys.executable, str(program)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "tune.log").open("w"),
        env=environment,
    )


def between_trials(study: Path) -> list[float]:
    """Seconds from each outcome to the next trial's first step, from the files' times; of a single worker."""
    trials = [
        ((study / "trials" / result.stem / "environment.json").stat().st_mtime, result.stat().st_mtime)
        for result in (study / "results").glob("*.json")
    ]
    ordered = sorted(trials)
    return [start - end for (_, end), (start, _) in itertools.pairwise(ordered)]


RUNNERS: dict[str, Callable[[Path, int, int, int], None]] = {"study": run_study, "loop": run_loop, "ray tune": run_tune}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the study, and of Ray Tune")
    parser.add_argument("--only", choices=list(RUNNERS), action="append")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    given = parser.parse_args(arguments)
    names = given.only or list(RUNNERS)
    if "ray tune" in names and any(importlib.util.find_spec(name) is None for name in ("ray", "pandas")):
        print("Ray Tune is not installed: left out (pip install 'ray[tune]')", file=sys.stderr)
        names.remove("ray tune")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gaps: list[float] = []
    for number in range(given.rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                RUNNERS[name](Path(folder), given.trials, given.steps, given.workers)
                seconds[name].append(time.perf_counter() - started)
                if name == "study" and given.workers == 1:
                    gaps += between_trials(Path(folder) / "study")
            print(f"round {number + 1}: {name} {seconds[name][-1]:.1f} s", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    table = [f"| {name} | {m:.1f} | {m / given.trials:.2f} |" for name, m in medians.items()]
    print("\n".join(["| run by | seconds | a trial |", "| --- | ---: | ---: |", *table]))
    if "study" in medians:
        print(
            *(f"study / {name}: {medians['study'] / m:.2f}" for name, m in medians.items() if name != "study"), sep="\n"
        )
    if gaps:
        print(f"from the end of a trial to the first step of the next one: at most {max(gaps):.2f} s")
    if given.out:
        given.out.write_text(json.dumps({**vars(given), "out": str(given.out), "seconds": seconds, "gaps": gaps}))


if __name__ == "__main__":
    main()
