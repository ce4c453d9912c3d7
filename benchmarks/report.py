"""Write benchmarks/README.md and its picture from the results.

    python benchmarks/report.py

The tables come from the results folder, which is not committed: run the benchmarks first. The part between the markers
``what was tried`` is written by hand and kept.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from common import KINDS, usual_settings
from matplotlib.figure import Figure
from results import FOLDER, between, markers, number, read_results, show, table

from monteclora.system.atomic import write_file

README = Path(__file__).parent / "README.md"
PICTURE = "step_time.svg"
_LABELS = {
    "base": "frozen base",
    "lora": "peft LoRA",
    "shared": "monteclora, shared noise",
    "per_example": "monteclora, per example",
    "peft_monteclora": "peft MonteCLoRA",
}
_COLOURS = {"base": "#9e9e9e", "shared": "#00796b", "per_example": "#7cb342", "peft_monteclora": "#d84315"}

Records = Sequence[Mapping[str, Any]]


def _times(records: Records) -> str:
    """A row a case, a column a kind: median of the ratios, and the ratio of the minima."""

    def cell(row: Mapping[str, Any]) -> str:
        return f"{row['ratio']:.3f} ({row['min_ratio']:.3f})"

    plain = [record for record in records if "graphs" not in record and "lora" in record["rows"]]
    matrices = [_matrix([r for r in plain if set(r["rows"]) <= set(KINDS)], cell, "median_ms", "LoRA, ms")]
    others = [record for record in records if not set(record["rows"]) <= set(KINDS) or "graphs" in record]
    return "\n\n".join([*matrices, *_each(others)])


def _memory(records: Records) -> str:
    return _matrix(records, lambda row: f"{row['ratio']:.3f} ({row['above_base_ratio']:.3f})", "peak_mb", "LoRA, MB")


def _matrix(records: Records, cell: Callable[[Mapping[str, Any]], str], absolute: str, title: str) -> str:
    kinds = [kind for kind in KINDS if kind != "lora"]
    rows = []
    for record in records:
        found = record["rows"]
        cells = [cell(found[kind]) if kind in found else "-" for kind in kinds]
        rows.append([record["case"], number(found["lora"][absolute]), *cells])
    notes = [
        f"- {record['case']}, {_LABELS.get(label, label)}: {reason}"
        for record in records
        for label, reason in record.get("left_out", {}).items()
    ]
    matrix = table(["case", title, *(_LABELS[kind] for kind in kinds)], rows)
    return matrix + ("\n\nLeft out:\n\n" + "\n".join(notes) if notes else "")


def _each(records: Records) -> list[str]:
    parts = []
    for record in records:
        parts.append(f"### {record['case']}\n\n{show(record)}")
        if "graphs" in record:
            names = ("graph_breaks", "graphs", "graphs_compiled_later")
            parts.append(", ".join(f"{name.replace('_', ' ')}: {record[name]}" for name in names))
    return parts


def _tables(records: Records) -> str:
    return "\n\n".join(_each(records))


# benchmark, what it measures, how long it takes on two cores, how its table is read, and its table
_BENCHMARKS: tuple[tuple[str, str, str, str, Callable[[Records], str]], ...] = (
    (
        "step_time",
        "Step time",
        "50 min",
        "Ratios to peft's LoRA: the median of the ratios of each round, and in parentheses that of the minima. "
        "A step is forward, loss, regulariser, backward and AdamW; r = 8, N = 4, all linear layers and float32 where "
        "a case does not say otherwise. peft's MonteCLoRA draws its noise for 150 steps in advance; the medians leave "
        "out the step that draws.",
        _times,
    ),
    (
        "memory",
        "Peak memory",
        "45 min",
        "Ratios to peft's LoRA of the peak over three training steps, and in parentheses of what wrapping and training "
        "take on top of the loaded model. Each kind runs in a process of its own.",
        _memory,
    ),
    (
        "loading",
        "Wrapping and loading",
        "5 min",
        "Fresh copies of the model, in turns; sizes on disk in bytes.",
        _tables,
    ),
    (
        "prediction",
        "Evaluation and prediction",
        "25 min",
        "Evaluation at the mean is compared with LoRA, the merged model with the base, batched posterior draws with as "
        "many separate passes.",
        _tables,
    ),
    (
        "gradient_variance",
        "Variance of the gradient due to the noise",
        "20 min",
        "Trace of the covariance over draws, on one fixed batch of 16 messages without dropout; the factor says how "
        "many times smaller it is than under shared noise (or with the sampled regulariser, or for one example alone).",
        _tables,
    ),
)


def picture(records: Records) -> bytes:
    """Ratios to LoRA of every model and size, an interval each, as SVG."""
    matplotlib.rcParams.update({"svg.hashsalt": "monteclora", "svg.fonttype": "none"})
    found = {record["case"]: record["rows"] for record in records}
    names = [setting.name for setting in usual_settings() if setting.name in found]
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="black", linewidth=1)
    for number_of_kind, (kind, colour) in enumerate(_COLOURS.items()):
        offset = 0.13 * (number_of_kind - (len(_COLOURS) - 1) / 2)
        points = [(i + offset, found[name][kind]) for i, name in enumerate(names) if kind in found[name]]
        ratios = [row["ratio"] for _, row in points]
        errors = [
            [row["ratio"] - row["ratio_low"] for _, row in points],
            [row["ratio_high"] - row["ratio"] for _, row in points],
        ]
        places = [x for x, _ in points]
        axes.errorbar(places, ratios, yerr=errors, fmt="o", color=colour, capsize=3, markersize=5, label=_LABELS[kind])
    axes.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names])
    axes.set_ylabel("step time / peft LoRA's")
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _machines(found: Mapping[str, Records]) -> str:
    """A line for every machine, with the benchmarks that ran there."""
    lines: dict[str, list[str]] = {}
    for benchmark, records in found.items():
        for record in records:
            names = lines.setdefault(_machine(record["machine"]), [])
            if benchmark not in names:
                names.append(benchmark)
    return "\n".join(f"- {line} ({', '.join(names)})" for line, names in lines.items())


def _machine(m: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    processor = f"{m['gpu']}, " if "gpu" in m else ""
    return (
        f"{processor}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gb']} GB; "
        f"{m['system']}, Python {m['python']}, {packages}"
    )


def _busy(records: Records) -> str:
    """Which cases started on a machine that had other work; the case before leaves a load of its own threads."""
    names = [record["case"] for record in records if record["load"] > record["machine"]["threads"] + 0.5]
    return f"\n\nMeasured on a busy machine: {', '.join(names)}." if names else ""


def page(folder: Path, tried: str) -> str:
    """The README.

    Args:
        folder: of the results.
        tried: the hand-written part.
    """
    found = {name: read_results(folder, name) for name, *_ in _BENCHMARKS}
    commands = [[title, f"`python benchmarks/{name}.py`", duration] for name, title, duration, _, _ in _BENCHMARKS]
    commands.append(["A run's loop beside a bare one", "`python benchmarks/loop.py`", "3 min"])
    commands.append(["Compiled blocks", "`python benchmarks/step_time.py --compile`", "10 min"])
    commands.append(["Scale on paper", "`python benchmarks/paper_scale.py --write docs/scale.md`", "1 min"])
    start, end = markers("what was tried")
    parts = [
        "# Benchmarks",
        "monteclora beside peft's LoRA, peft's MonteCLoRA and the frozen base (forward and backward without an "
        "adapter: the floor). All that is compared runs in turns, in one process where not said otherwise. This page "
        "is written by `python benchmarks/report.py` from the results folder, which is not committed.",
        "## Run them",
        table(["benchmark", "command", "two cores"], commands),
        "Every command but `loop.py` (`--only NAME`, `--rounds`) and `paper_scale.py` takes `--only PATTERN`, "
        "`--list`, `--device`, `--threads` and `--out`, and the timed ones `--seconds` and `--rounds`. Finished cases "
        "are kept in `--out` and not measured again. Where there is a GPU the same commands run on it, timed by device "
        "events.",
        "## Machine",
        _machines(found),
    ]
    for name, title, _, explanation, tables in _BENCHMARKS:
        if not found[name]:
            continue
        parts += [f"## {title}", explanation + _busy(found[name])]
        parts += [f"![Step time relative to LoRA]({PICTURE})"] if name == "step_time" else []
        parts.append(tables(found[name]))
    parts += ["## What was tried", f"{start}\n{tried}\n{end}"]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, readme: Path) -> None:
    """Write the page and, where step times are known, the picture beside it."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    lost = [title for name, title, *_ in _BENCHMARKS if f"\n## {title}\n" in text and not read_results(folder, name)]
    if lost:
        sys.exit(f"{folder} has no results for {', '.join(lost)}, whose tables {readme} would lose: run them first")
    tried = between(text, "what was tried") or ""
    write_file(readme, page(folder, tried).encode())
    if records := read_results(folder, "step_time"):
        write_file(readme.with_name(PICTURE), picture(records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args()
    write(args.results, args.readme)


if __name__ == "__main__":
    main()
