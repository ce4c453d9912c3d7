"""Workers on a Ray cluster, whose nodes are processes of this machine here."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import ConfigError
from monteclora.studies.folder import StudyFolder
from monteclora.studies.study import study
from tests.studies.test_study import holders, results

pytest.importorskip("ray")
Make = Callable[..., dict[str, Any]]


def test_a_cluster_that_is_not_there_is_told(make_study: Make) -> None:
    with pytest.raises(ConfigError, match=r"cannot use the Ray cluster 127\.0\.0\.1:1: "):
        study(make_study(), ray="127.0.0.1:1", progress=False)


@pytest.mark.slow
def test_a_lost_nodes_trial_goes_on_elsewhere(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = {"set": {"training.epochs": 10}}
    recipe = make_study("cluster", **options)
    folder = StudyFolder(Path(recipe["output"]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    lost: list[int] = []

    def lose() -> None:
        while len(set(holders(folder))) < 2:
            time.sleep(0.05)
        lost.extend(holders(folder))
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    try:
        found = study(recipe, ray=cluster.address, workers=2, progress=False)
    finally:
        cluster.shutdown()
    assert len(set(lost)) == 2, "no node was lost while both worked"
    assert results(found) == results(study(make_study("serial", **options), workers=0, progress=False))
