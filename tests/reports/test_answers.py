import numpy as np
import pytest

from monteclora.prediction.predictions import Predictions
from monteclora.reports.answers import label_section


def predicted(answers, labels, classes):
    probs = np.full((1, len(answers), classes), 0.1 / (classes - 1))
    probs[0, np.arange(len(answers)), answers] = 0.9
    return Predictions(np.log(probs), np.array(labels))


def test_each_label_has_its_precision_recall_and_f1():
    found = predicted([0, 0, 1, 1, 0], [0, 0, 1, 0, 2], 3)
    section = label_section(found, ["bill", "login", "other"])
    (table,) = section.tables
    cells = {row.cells[0]: row.cells[1:] for row in table.rows}
    assert cells["bill"] == [3, 3, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3)]
    assert cells["login"] == [1, 2, 0.5, 1.0, pytest.approx(2 / 3)]
    assert cells["other"] == [1, 0, None, 0.0, 0.0]  # never answered: no precision
    (figure,) = section.figures
    (drawn,) = figure.panels
    assert "2 of 5 rows answered wrong" in drawn
    assert drawn.count(">1<") == 3  # 0 as 1, 1 as 1, 2 as 0
    assert ">0<" not in drawn


def test_of_many_labels_the_commonest_confusions_are_listed():
    names = [f"label {i}" for i in range(20)]
    found = predicted([1, 1, 3, 4, 0], [0, 0, 2, 4, 0], 20)
    section = label_section(found, names)
    assert not section.figures
    assert [row.cells for row in section.tables[1].rows] == [["label 0", "label 1", 2], ["label 2", "label 3", 1]]


def test_answers_that_are_no_labels_have_no_section():
    assert label_section(predicted([0, 1], [0, 1], 2), ()) is None  # options of a question, which have no names
    assert label_section(Predictions(np.log(np.full((1, 2, 2), 0.5))), ["a", "b"]) is None
