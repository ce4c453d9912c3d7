"""A study on two hosts: names, processes, shared memory and network addresses of their own, and one disk.

Linux namespaces stand in for the machines. Neither host can see the other's processes, as it can where a cluster's
nodes are processes of one machine (``test_ray_cluster.py``), so that only a heartbeat tells whether a claim is alive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from monteclora.studies.study import study
from tests.studies.test_study import DRIVER, results

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PORT = 6379


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Host:
    """Processes in namespaces; ``number`` is the last part of its address."""

    def __init__(self, number: int) -> None:
        self.name = f"host{number}"
        self.network = f"monteclora-{os.getpid()}-{number}"
        self.address = f"10.200.0.{number}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first = 0
        run("ip", "netns", "add", self.network)

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run something there: the first command makes the host, and others join it."""
        if self._first:
            enter = ["nsenter", "--target", str(self._first), "--net", "--uts", "--pid", "--mount", "--"]
        else:
            begin = f'hostname {self.name} && mount -t tmpfs tmpfs /dev/shm && "$@"'
            enter = ["ip", "netns", "exec", self.network, "unshare", "--uts", "--mount-proc", "--pid", "--fork"]
            enter += ["--kill-child", "bash", "-c", begin, self.name]
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*enter, *command],
                env={**os.environ, **paths, "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        if not self._first:
            # the child of unshare, the host's first process
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            self._first = int(wait_for(lambda: children.read_text().split(), f"{self.name} did not start")[0])
        return process

    def ray(self, options: list[str], folder: Path) -> None:
        """Start a node of a cluster, with files of its own in ``folder``, whose path is short enough for sockets."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats", "--block"]
        own = [f"--node-ip-address={self.address}", f"--temp-dir={folder / self.name}"]
        log = folder / f"{self.name}.log"
        process = self.start([*ray, *own, *options], log)
        wait_for(lambda: b"runtime started" in log.read_bytes() or process.poll() is not None, "no node of Ray started")
        assert process.poll() is None, log.read_text()

    def pull_the_plug(self) -> None:
        """Every process of it ends at once."""
        with suppress(ProcessLookupError):
            if self._first:
                os.kill(self._first, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def wait_for(found: Callable[[], Any], otherwise: str, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    pytest.fail(otherwise)


@pytest.fixture
def ray_files() -> Iterator[Path]:
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    made: list[Host] = []
    try:
        try:
            made += [Host(1), Host(2)]
            first, second = made
            link = ["ip", "link", "add", "wire", "netns", first.network, "type", "veth", "peer", "name", "wire"]
            run(*link, "netns", second.network)
            for host in made:
                run("ip", "-n", host.network, "address", "add", f"{host.address}/24", "dev", "wire")
                for device in ("lo", "wire"):
                    run("ip", "-n", host.network, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine or user cannot make hosts of namespaces: {error}")
        yield first, second
    finally:
        for host in made:
            host.pull_the_plug()
            run("ip", "netns", "delete", host.network)


def test_a_hosts_trials_go_on_at_the_other_when_it_is_lost(
    make_study: Callable[..., dict[str, Any]], hosts: tuple[Host, Host], ray_files: Path, tmp_path: Path
) -> None:
    head, other = hosts
    options = {"set": {"training.epochs": 10}}
    recipe = make_study("hosts", **options)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(recipe))
    head.ray(["--head", f"--port={PORT}", "--include-dashboard=false"], ray_files)
    other.ray([f"--address={head.address}:{PORT}"], ray_files)

    code = DRIVER.replace("workers=2", f"workers=2, ray='{head.address}:{PORT}'")
    driver = head.start([sys.executable, "-c", code, str(file)], tmp_path / "driver.log")
    folder = Path(recipe["output"])

    def working() -> set[str]:
        states = [json.loads(path.read_text()) for path in folder.glob("claims/*.json")]
        return {state["holder"]["machine"].split()[0] for state in states if state["holder"] is not None}

    wait_for(lambda: working() == {"host1", "host2"} or driver.poll() is not None, "the hosts did not both work")
    assert working() == {"host1", "host2"}, (tmp_path / "driver.log").read_text()
    other.pull_the_plug()
    assert driver.wait(300) == 0, (tmp_path / "driver.log").read_text()

    found = study(recipe, workers=0, progress=False)
    assert results(found) == results(study(make_study("serial", **options), workers=0, progress=False))
