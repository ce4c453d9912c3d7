from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from monteclora.errors import CheckpointError
from monteclora.prediction.laplace import LaplacePosterior
from monteclora.prediction.novelty import Novelty


@pytest.mark.parametrize(("load", "newest"), [(LaplacePosterior.load, 2), (Novelty.load, 4)])
def test_a_later_format_is_told_before_its_content_is_looked_at(
    tmp_path: Path, load: Callable[..., Any], newest: int
) -> None:
    path = tmp_path / "fitted.safetensors"
    save_file({"other": torch.ones(1)}, path, metadata={"format": str(newest + 1)})
    wanted = rf"has format {newest + 1}, this version reads format {newest}. Upgrade monteclora"
    with pytest.raises(CheckpointError, match=wanted):
        load(path)
    save_file({"other": torch.ones(1)}, path, metadata={"format": "one"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    with pytest.raises(CheckpointError, match="it is no file"):
        load(tmp_path)
