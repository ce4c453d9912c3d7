from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monteclora.errors import CheckpointError
from monteclora.studies import claims as module
from monteclora.studies.claims import Claims


def take(claims: Claims, step: int = 0) -> str | None:
    found = claims.take("t", lambda: False, lambda: step)
    return None if found is None else found[0]


def test_a_claim_that_is_held_is_not_given_again(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    token = take(claims)
    assert token is not None
    assert take(Claims(tmp_path)) is None
    claims.release("t", token, claims.state("t"))
    assert take(claims) is not None


def test_a_trial_with_a_result_is_not_given(tmp_path: Path) -> None:
    assert Claims(tmp_path).take("t", lambda: True, lambda: 0) is None


def test_a_dead_holders_claim_is_taken_over_and_its_deaths_at_one_step_counted(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from monteclora.studies.claims import Claims\nClaims(Path({str(tmp_path)!r}))"
    code += ".take('t', lambda: False, lambda: 0)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    found = Claims(tmp_path).take("t", lambda: False, lambda: 0)
    assert found is not None
    assert found[1].deaths == 2


def test_a_claim_of_another_machine_lives_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(tmp_path, lease=0.4)
    token = take(claims)
    assert token is not None
    monkeypatch.setattr(module.socket, "gethostname", lambda: "elsewhere")
    with claims.heartbeat("t", token):
        time.sleep(0.8)
        assert take(claims) is None
    file = tmp_path / "t.json"
    old = file.stat().st_mtime - 1
    os.utime(file, (old, old))
    assert take(claims, step=3) is not None
    assert json.loads(file.read_text())["step"] == 3
    with claims.held("t", token) as mine:
        assert not mine


def test_a_lost_claim_is_not_kept_alive(tmp_path: Path) -> None:
    claims = Claims(tmp_path, lease=0.2)
    token = take(claims)
    assert token is not None
    state = claims.state("t")
    with claims.heartbeat("t", token):
        assert claims.release("t", token, state)
        assert take(claims) is not None
        file = tmp_path / "t.json"
        os.utime(file, (1, 1))
        time.sleep(0.3)
        assert file.stat().st_mtime == 1


@pytest.mark.parametrize("boot", ["another boot", None])
def test_the_same_host_name_is_not_the_same_machine(tmp_path: Path, boot: str | None) -> None:
    """Of a container or a copy of a machine: its processes cannot be seen, and its heartbeat is all there is."""
    claims = Claims(tmp_path)
    state = claims.state("t")
    machine = f"{socket.gethostname()} {boot}" if boot else socket.gethostname()
    state.holder = {"token": "x", "machine": machine, "pid": 2**22 + 1, "start": 1.0}
    assert not module.Path("/proc/4194305").exists()
    claims._write("t", state)
    if module._machine() != machine:
        assert take(claims) is None
    state.holder["machine"] = module._machine()
    claims._write("t", state)
    assert take(claims) is not None


def test_a_claim_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(tmp_path)
    assert take(claims) is not None

    def stale(self: Path, **options: object) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        with pytest.raises(CheckpointError, match="Stale file handle"):
            claims.state("t")
        assert not claims.running("t")
    (tmp_path / "t.json").write_text('{"holder"')
    with pytest.raises(CheckpointError, match="is damaged"):
        take(claims)


def test_failures_are_forgotten_unless_the_trial_is_worked_on(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    result = tmp_path / "t.json"
    result.write_text("failed")
    token = take(claims)
    assert token is not None
    state = claims.state("t")
    state.failures, state.deaths, state.micro_batch_size = ["no such disk"], 3, 4
    claims.forget("t", [result])
    assert result.exists()
    claims.release("t", token, state)
    claims.forget("t", [result])
    assert not result.exists()
    found = claims.state("t")
    assert (found.failures, found.deaths, found.micro_batch_size) == ([], 0, 4)
