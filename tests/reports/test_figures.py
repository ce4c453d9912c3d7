import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from monteclora.errors import DataError
from monteclora.metrics.calibration import ReliabilityCurve, reliability_curve
from monteclora.reports.figures import (
    TrainingCurve,
    accuracy_bars,
    reliability_diagram,
    training_curves,
    uncertainty_histogram,
)
from monteclora.reports.svg import SERIES, Svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def group(svg: Svg, identifier: str) -> ElementTree.Element:
    found = ElementTree.fromstring(svg).findall(f".//{NAMESPACE}g[@id='{identifier}']")
    assert len(found) == 1, identifier
    return found[0]


def count(element: ElementTree.Element, tag: str) -> int:
    return len(list(element.iter(NAMESPACE + tag)))


def texts(svg: Svg) -> str:
    return " | ".join(element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text"))


def curve_of(counts: list[int], accuracies: list[float]) -> ReliabilityCurve:
    """Two-class curve with the given number of examples and accuracy at confidences 0.55, 0.65, ..."""
    probs, labels = [], []
    for place, (examples, right) in enumerate(zip(counts, accuracies, strict=True)):
        confidence = 0.55 + 0.1 * place
        probs += [[confidence, 1 - confidence]] * examples
        labels += [0 if i < round(right * examples) else 1 for i in range(examples)]
    return reliability_curve(probs, labels, bins=10)


def dots(svg: Svg, series: int) -> list[ElementTree.Element]:
    """The dots of a series: matplotlib repeats one path where that is shorter, else writes one for each."""
    drawn = group(svg, f"dots-{series}")
    return list(drawn.iter(f"{NAMESPACE}use")) or list(drawn.findall(f"{NAMESPACE}path"))


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-\d.]+", path)]


def width(dot: ElementTree.Element) -> float:
    x = numbers(dot.get("d"))[::2]
    return max(x) - min(x)


class TestReliabilityDiagram:
    def test_a_dot_for_each_bin_that_holds_examples(self):
        svg = reliability_diagram({"A": curve_of([4, 0, 8], [0.5, 0, 0.75]), "B": curve_of([2], [1.0])})
        assert len(dots(svg, 0)) == 2
        assert len(dots(svg, 1)) == 1
        group(svg, "identity")

    def test_dots_grow_with_counts(self):
        svg = reliability_diagram({"A": curve_of([5, 50], [0.4, 0.6])})
        small, large = (width(dot) for dot in dots(svg, 0))
        assert large > 1.5 * small

    def test_whiskers_are_longer_where_a_bin_holds_few_examples(self):
        svg = reliability_diagram({"A": curve_of([5, 0, 50], [0.4, 0, 0.6])})
        paths = group(svg, "intervals-0").iter(f"{NAMESPACE}path")
        heights = [abs(y[1] - y[0]) for y in (numbers(path.get("d"))[1::2] for path in paths)]
        curve = curve_of([5, 0, 50], [0.4, 0, 0.6])
        low, high = (bounds[curve.counts > 0] for bounds in curve.accuracy_interval())
        assert heights[0] / heights[1] == pytest.approx((high - low)[0] / (high - low)[1], rel=1e-3)

    def test_the_legend_names_each_ece(self):
        curve = curve_of([10, 10], [0.2, 0.9])
        assert f"LoRA · ECE {curve.ece:.3f}" in texts(reliability_diagram({"LoRA": curve}))

    def test_a_missing_curve_holds_its_place(self):
        svg = reliability_diagram({"A": None, "B": curve_of([4], [0.5])})
        assert SERIES[1] in ElementTree.tostring(group(svg, "dots-1"), encoding="unicode")
        assert "A · ECE" not in texts(svg)

    def test_more_methods_than_colours(self):
        svg = reliability_diagram({f"method {i}": curve_of([4, 4], [0.5, 0.75]) for i in range(9)})
        assert texts(svg).count("ECE") == 9


class TestTrainingCurves:
    def test_a_panel_for_each_quantity_that_a_run_has(self, training):
        loss, kl, pi = training_curves(training)
        for place in (0, 1):
            group(loss, f"curve-{place}")
        for panel in (kl, pi):
            group(panel, "curve-1")
            assert "curve-0" not in panel
            assert SERIES[1] in panel
        assert [texts(panel).count("LoRA") for panel in (loss, kl, pi)] == [2, 1, 1]

    def test_a_plain_run_has_the_loss_alone(self, training):
        assert len(training_curves({"LoRA": training["LoRA"]})) == 1

    def test_values_that_are_not_finite_leave_a_gap(self):
        curve = TrainingCurve([1, 2, 3, 4, 5, 6], [2.0, 1.0, math.nan, math.inf, 0.5, 0.4])
        (svg,) = training_curves({"LoRA": curve})
        path = next(group(svg, "curve-0").iter(f"{NAMESPACE}path")).get("d")
        assert path.count("M") == 2
        assert "nan" not in svg
        assert "inf" not in svg

    def test_the_validation_curve_marks_the_step_that_was_kept(self):
        curve = TrainingCurve([1, 2, 3], [3.0, 2.0, 1.0], None, None, [2, 4, 6], [1.0, 0.5, 0.9], kept_step=4)
        _, validation = training_curves({"LoRA": curve})
        assert count(group(validation, "kept-0"), "path") == 1
        assert "Validation NLL" in texts(validation)
        _, unmarked = training_curves({"LoRA": replace(curve, kept_step=None)})
        assert count(group(unmarked, "kept-0"), "path") == 0

    def test_a_single_logged_step_is_a_dot(self):
        (svg,) = training_curves({"LoRA": TrainingCurve([10], [1.5])})
        assert count(group(svg, "curve-0"), "use") == 1

    def test_values_must_match_steps(self):
        with pytest.raises(DataError, match="the kl of LoRA has 2 values for 3 steps"):
            training_curves({"LoRA": TrainingCurve([1, 2, 3], [1, 1, 1], kl=[1, 1])})


class TestUncertaintyHistogram:
    def test_a_row_and_a_median_for_each_group(self):
        svg = uncertainty_histogram({"in-scope": [0.1, 0.2, 0.9], "out-of-scope": [1.0, 1.5]}, "total uncertainty")
        for place in (0, 1):
            group(svg, f"histogram-{place}")
            group(svg, f"median-{place}")
        shown = texts(svg)
        for text in (
            "in-scope (3)",
            "median 0.2",
            "out-of-scope (2)",
            "median 1.25",
            "total uncertainty (nats)",
        ):
            assert text in shown

    def test_the_colour_is_that_of_the_run(self):
        assert SERIES[3] in uncertainty_histogram({"all": [0.5]}, "total uncertainty", series=3)

    def test_no_uncertainty_at_all_is_drawn_at_zero(self):
        assert "median 0" in texts(uncertainty_histogram({"all": [0.0, 0.0]}, "epistemic uncertainty"))

    @pytest.mark.parametrize("values", [[], [math.nan], [math.inf], [-0.1], [[0.1, 0.2]]])
    def test_what_is_not_an_uncertainty_is_refused_by_group(self, values):
        with pytest.raises(DataError, match="the values of odd can't be drawn"):
            uncertainty_histogram({"fine": [0.1], "odd": values}, "total uncertainty")


class TestAccuracyBars:
    def test_a_bar_a_method_and_a_dot_a_run(self):
        svg = accuracy_bars({"LoRA": [0.8, 0.9], "MonteCLoRA": [0.85, 0.86, 0.9]})
        assert [count(group(svg, f"runs-{place}"), "use") for place in (0, 1)] == [2, 3]
        assert "0.850 (0.800 to 0.900)" in texts(svg)

    def test_one_run_has_no_spread(self):
        assert "0.800 |" in texts(accuracy_bars({"LoRA": [0.8]})) + " |"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: reliability_diagram({}),
        lambda: reliability_diagram({"A": None}),
        lambda: training_curves({}),
        lambda: uncertainty_histogram({}, "total uncertainty"),
        lambda: accuracy_bars({}),
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(DataError, match=r"there is no .* to draw"):
        draw()


SCRIPT = """
import sys
from monteclora.reports.figures import accuracy_bars
print(accuracy_bars({"a": [0.5, 0.7]}))
assert not {"torch", "matplotlib.pyplot"} & set(sys.modules)
"""


def test_another_process_draws_the_same_bytes_without_pyplot_or_torch():
    elsewhere = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout == accuracy_bars({"a": [0.5, 0.7]}) + "\n"
