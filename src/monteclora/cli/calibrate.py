"""``monteclora calibrate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from monteclora.cli.output import Flag, Json, note, print_json, print_line, print_table
from monteclora.errors import ConfigError

if TYPE_CHECKING:
    from monteclora.evaluation.calibrate import CalibrationResult
    from monteclora.tasks import DataSpec

__all__ = ["calibrate"]


def calibrate(
    run: str,
    /,
    *,
    base: str | None = None,
    data: Path | None = None,
    label_names: str | None = None,
    max_length: int | None = None,
    rows: Literal["equal", "isotropic"] | None = None,
    tolerance: float | None = None,
    temperature: Flag = False,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    batch_size: int | None = None,
    undo: Flag = False,
    as_json: Json = False,
) -> None:
    """Fit the posterior's scale to validation rows, without training, and store it in the adapter.

    Half of the validation rows choose it, the other half says what it is worth. Evaluation, prediction, export and
    from_pretrained then draw at that scale. A plain LoRA, from a run or from elsewhere, is first given a posterior.

    Args:
        run: a run folder, or the folder of a LoRA adapter of peft, unsloth or axolotl, with --data.
        base: of an adapter folder: the model it was trained on; by default the one that its configuration names.
        data: of an adapter folder: a file with labels or completions, which takes the place of validation rows.
        label_names: of a classifier's adapter folder: its labels in the order of training, separated by commas; by
            default that of their names.
        max_length: of an adapter folder: most tokens of a row; by default 128.
        rows: of a plain LoRA: rows of A with equal noise, the default, or such that the noise in each layer's output is
            isotropic within the column space of B.
        tolerance: take the largest scale whose accuracy is at most so much below the mean's; by default the scale
            with the smallest NLL is taken.
        temperature: also fit a temperature at that scale, for --calibrator temperature of evaluate and predict.
        num_samples: posterior draws; by default the recipe's number.
        seed: of the draws, the same ones at every scale.
        layers: draw in so many of the last adapted blocks alone, here and from now on, which costs less; by default the
            recipe's number, else all.
        batch_size: sequences per forward pass; by default the recipe's training.eval_batch_size.
        undo: restore the scale of training; a posterior that a plain LoRA was given is removed.
    """
    from monteclora.evaluation.calibrate import calibrate as fit
    from monteclora.evaluation.calibrate import undo_calibration

    if undo:
        given: dict[str, object] = {
            "tolerance": tolerance,
            "num-samples": num_samples,
            "batch-size": batch_size,
            "seed": seed or None,
            "temperature": temperature or None,
            "layers": layers,
            "rows": rows,
            "base": base,
            "data": data,
            "label-names": label_names,
            "max-length": max_length,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--undo and --{name} are both given", "Keep one.")
        undone = undo_calibration(run)
        if as_json:
            print_json({"undone": undone})
        else:
            print_line(f"{run}: the scale of training is back" if undone else f"{run}: there was nothing to undo")
        return
    result = fit(
        run,
        base=base,
        data=_rows_of(data, max_length),
        label_names=[name.strip() for name in label_names.split(",")] if label_names else (),
        rows=rows,
        tolerance=tolerance,
        temperature=temperature,
        num_samples=num_samples,
        seed=seed,
        layers=layers,
        batch_size=batch_size,
    )
    if as_json:
        print_json({"folder": result.folder, **result.facts()})
        return
    _print(result)


def _rows_of(data: Path | None, max_length: int | None) -> DataSpec | None:
    from monteclora.tasks import DataSpec

    if data is None:
        if max_length is not None:
            raise ConfigError("--max-length is given without --data", "Leave it out: a run has its own.")
        return None
    spec = DataSpec(validation_file=str(data))
    return spec if max_length is None else replace(spec, max_length=max_length)


def _print(result: CalibrationResult) -> None:
    from monteclora.metrics.registry import METRICS
    from monteclora.runs.calibration import CALIBRATION_FILE
    from monteclora.runs.run_folder import RunFolder

    shown = [metric for name, metric in METRICS.items() if name in result.report["mean"]]
    columns = [metric.label for metric in shown]

    def cells(metrics: object) -> list[str]:
        assert isinstance(metrics, dict)
        return [f"{metrics[metric.name]:.3f}" for metric in shown]

    title = f"{result.folder}: scale against metrics, {result.rows[0]} rows, {result.num_samples} draws"
    print_table(["scale", *columns], [[f"{c:.3g}", *cells(m)] for c, m in result.curve.items()], title)
    title = f"scale {result.factor:.3g} ({result.criterion}), on {result.rows[1]} rows that the fit did not use"
    print_table(["", *columns], [[name, *cells(m)] for name, m in result.report.items()], title)
    print_line(f"written: {RunFolder(result.folder).adapter}, {result.folder / CALIBRATION_FILE}")
    for text in result.notes:
        note(text)
    if result.temperature is not None:
        note(
            f"temperature {result.temperature:.3f} is used by evaluate and predict with --calibrator temperature "
            f"--num-samples {result.num_samples} and this --seed; the scale itself always is"
        )
    if result.factor == 0.0:
        way_back = "takes the posterior away" if result.grafted else "puts the scale of training back"
        note(f"no scale was better than the mean: draws are now the mean; --undo {way_back}")
    elif result.factor == max(result.curve):
        note("the largest scale that was tried is the best one")
