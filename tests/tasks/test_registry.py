from __future__ import annotations

import subprocess
import sys

import pytest

from monteclora.errors import ConfigError
from monteclora.tasks import Task, get_task, list_tasks, register


def test_every_task_of_the_issue_is_there_in_order():
    names = [task.name for task in list_tasks()]
    assert names == sorted(names)
    assert {"mrpc", "cola", "rte", "wic", "boolq", "helpdesk", "arc_easy_instruct"} <= set(names)


def test_labels_belong_to_classification():
    for task in list_tasks():
        assert (task.label_names is None) == (task.kind == "causal_lm"), task.name
        assert "\n" not in task.description


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean mrpc") as caught:
        get_task("mprc")
    assert "monteclora list tasks" in caught.value.hint


def test_a_name_is_given_once():
    task = get_task("mrpc")
    with pytest.raises(ConfigError, match="registered already"):
        register(Task("mrpc", task.kind, task.text_columns, task.label_names, task.splits, "", task.loader))


def test_listing_loads_no_heavy_library():
    code = (
        "import sys; from monteclora.tasks import list_tasks; from monteclora.data.models import STARTERS;"
        "list_tasks();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
