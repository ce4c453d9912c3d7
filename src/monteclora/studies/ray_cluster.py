"""The workers of a study on the nodes of a Ray cluster, each as a task of Ray's core.

A task does nothing but run a worker (:mod:`monteclora.studies.worker`) on its node, which takes trials by claims in the
study's folder, as workers on one machine do. So a node needs this package, at the same version, and the study's folder
and data under the same path: on a shared disk, unless all nodes are one machine. Ray gives a task its core or GPU, and
starts it elsewhere when its node is lost; the lost worker's trial resumes from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monteclora.errors import ConfigError
from monteclora.studies.folder import StudyFolder
from monteclora.studies.processes import PATIENCE, POLL, Endings, last_line, threads_of_a_worker, worker_command

__all__ = ["LOCAL", "run_on_ray"]

LOCAL = "local"
_CONNECT = 15.0  # seconds until an address counts as out of reach


def run_on_ray(
    folder: StudyFolder,
    address: str,
    count: int | None,
    most: int,
    per_device: int,
    deadline: float | None,
    tick: Callable[[], int],
) -> None:
    """Have workers on a cluster run a study until they find nothing left to do.

    Args:
        folder: of the study, with its recipe.
        address: of the cluster, as ``ray.init`` takes it; ``local`` starts one on this machine for as long as it takes.
        count: how many workers; None is one for each core, or ``per_device`` for each GPU.
        most: how many have something to do: the runs that are left.
        per_device: how many share a GPU.
        deadline, tick: as for :func:`monteclora.studies.processes.run_workers`.

    Raises:
        ConfigError: Ray is missing or the cluster out of reach, or workers end with an error before they come to
            anything.
        KeyboardInterrupt: asked for; the workers have saved.
    """
    with _connected(address) as ray:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        workers = min(most, count or per_device * gpus or int(resources.get("CPU", 1)))
        start = ray.remote(num_cpus=1, num_gpus=1 / per_device if gpus else 0, max_retries=-1)(_run_worker).remote
        path = str(folder.path.resolve())
        endings = Endings(folder, workers, tick())
        running = {start(path, number, deadline): number for number in range(workers)}
        try:
            while running:
                ended, _ = ray.wait(list(running), timeout=POLL)
                endings.now(tick())
                for task in ended:
                    number = running.pop(task)
                    status, said = _ending(ray, task)
                    if status != 0:
                        endings.add(status, said)
                        running[start(path, number, deadline)] = number
        finally:
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray", "Run `pip install 'monteclora[ray]'`.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports of use to anybody
    _check_reachable(address)
    where: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        # an address of its own, so that RAY_ADDRESS has no say
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **where)
    except (ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot use the Ray cluster {address}: {reason}", "Give its address, or local for this machine."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ConfigError where nobody listens at ``host:port``: Ray would try for minutes, and end the process."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot use the Ray cluster {address}: {error}", "Give its address, or local for this machine."
        ) from None


def _ending(ray: Any, task: Any) -> tuple[int, str]:
    """The exit status of a task's worker, and the last that it said."""
    try:
        status, said = ray.get(task)
    except ray.exceptions.RayError as error:  # of a task that Ray gave up; the nodes of others are replaced
        return -signal.SIGKILL, type(error).__name__
    return int(status), str(said)


def _run_worker(path: str, number: int, deadline: float | None) -> tuple[int, str]:
    """Runs on a node: a worker, until it ends or the task is cancelled, which has it save."""
    folder = Path(path)
    if not (folder / "study.yaml").is_file():
        return 1, f"a node of the cluster does not see the folder {folder}: it must be on a disk that all nodes share"
    log = folder / "logs" / f"worker-ray-{os.getpid()}-{number}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            worker_command(sys.executable, folder, deadline),
            stdin=subprocess.PIPE,  # the worker saves and ends when it closes, as it does when this process dies
            stdout=output,
            stderr=output,
            env={**os.environ, **threads_of_a_worker()},
        )
    try:
        return process.wait(), last_line(log)
    except KeyboardInterrupt:
        process.terminate()
        return process.wait(PATIENCE), last_line(log)
