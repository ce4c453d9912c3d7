from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    with claims.heartbeat("t"):
        time.sleep(0.8)
        assert take(claims) is None
    file = tmp_path / "t.json"
    old = file.stat().st_mtime - 1
    os.utime(file, (old, old))
    assert take(claims, step=3) is not None
    assert json.loads(file.read_text())["step"] == 3
    with claims.held("t", token) as mine:
        assert not mine
