"""``monteclora demo``: LoRA beside MonteCLoRA on the bundled data, then a report page."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from monteclora.cli.output import Json, print_json, print_line, print_table

__all__ = ["demo"]

RECIPES = {"LoRA": "helpdesk-minilm-lora", "MonteCLoRA": "helpdesk-minilm-monteclora"}
PAGE = "report.html"


def demo(*, out: Path = Path("demo"), seed: int = 0, as_json: Json = False) -> None:
    """Fine-tune a real model with LoRA and with MonteCLoRA on the bundled data, and compare them.

    Takes minutes on a laptop. The same command again resumes where it stopped, and keeps what is finished.

    Args:
        out: the folder of both runs and of the report.
        seed: of both runs.
    """
    from monteclora.cli.demo_report import Contender, contend, demo_report
    from monteclora.reports.formats import duration, size
    from monteclora.reports.page import write_page
    from monteclora.training.run import train

    contenders: list[Contender] = []
    for number, (name, recipe) in enumerate(RECIPES.items(), start=1):
        print(f"{name} ({number} of {len(RECIPES)})", file=sys.stderr)
        run = train(recipe, [("output", str(out / Path(recipe).stem)), ("seed", str(seed))])
        contenders.append(contend(name, run))
    command = f"monteclora demo --out {quote(str(out))} --seed {seed}"
    page = write_page(out / PAGE, demo_report(contenders, [command]))
    if as_json:
        print_json({"report": page, "runs": [contender.facts() for contender in contenders]})
        return
    rows = []
    for contender in contenders:
        metrics, run = contender.metrics, contender.run
        measured = [f"{metrics[metric]:.3f}" for metric in ("accuracy", "nll", "ece")]
        cost = [duration(run.seconds), size(run.peak_memory_bytes)]
        rows.append([contender.name, *measured, f"{contender.detection:.3f}", *cost])
    columns = ["method", "accuracy", "NLL (nats)", "ECE", "AUROC out of scope", "training time", "peak memory"]
    print_table(columns, rows, f"{contenders[0].evaluation.source.rows} test messages, 12 intents")
    print_line(f"report: {page}")
