"""A real llama.cpp server beside the tests, from the PyPI package xllamacpp in an environment of its own.

python3 -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install xllamacpp
MONTECLORA_XLLAMACPP=ENVIRONMENT/bin/python pytest -m serving tests/serving
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

PYTHON = os.environ.get("MONTECLORA_XLLAMACPP")
_CHILD = Path(__file__).with_name("llama_cpp_child.py")


@contextmanager
def llama_cpp_server(base: Path, adapters: Sequence[Path]) -> Iterator[str]:
    """The address of a server of ``base`` with the adapters numbered as given, none of them on by default."""
    assert PYTHON is not None
    arguments = json.dumps({"base": str(base), "adapters": [str(path) for path in adapters]})
    with subprocess.Popen(
        [PYTHON, _CHILD, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("LISTENING ")), None)
            assert address is not None, "the server did not start"
            yield address
        finally:
            process.stdin.close()  # its end is the server's
            process.wait(60)


def float32_copy(source: Path, target: Path) -> Path:
    """The same model with every weight in float32, so that a server computes with the numbers that we compute with."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
