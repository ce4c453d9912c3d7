from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monteclora.errors import CheckpointError
from monteclora.system.tree import load_tree, save_tree

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=40)
@given(tree=TREES)
def test_plain_values_come_back_equal_and_of_the_same_type(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    stem = tmp_path_factory.mktemp("tree") / "state"
    save_tree(stem, tree)
    assert repr(load_tree(stem)) == repr(tree)


def test_tensors(tmp_path: Path) -> None:
    values = torch.randn(3, 4)
    tree = {
        0: [values, values[0], values.t(), torch.tensor(3.5), torch.zeros(0, dtype=torch.uint8)],
        "low": (torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor(True)),
    }
    save_tree(tmp_path / "state", tree)
    found = load_tree(tmp_path / "state")
    for one, other in zip([*tree[0], *tree["low"]], [*found[0], *found["low"]], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [object(), lambda: None, np.float64(1.0).dtype, {1.5: 2}])
def test_anything_else_is_refused_by_its_place(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at /group/1"):
        save_tree(tmp_path / "state", {"group": [1, value]})


def test_optimizers_and_schedulers(tmp_path: Path) -> None:
    """A copy that loads the state goes on as the original, to the bit."""

    def make() -> tuple[torch.nn.Linear, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def advance(model: torch.nn.Linear, optimizer: Any, scheduler: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    original = make()
    advance(*original)
    save_tree(tmp_path / "state", {"optimizer": original[1].state_dict(), "scheduler": original[2].state_dict()})
    copy = make()
    copy[0].load_state_dict(original[0].state_dict())
    state = load_tree(tmp_path / "state")
    copy[1].load_state_dict(state["optimizer"])
    copy[2].load_state_dict(state["scheduler"])
    for parts in (original, copy):
        advance(*parts)
    assert torch.equal(original[0].weight, copy[0].weight)
    assert original[2].get_last_lr() == copy[2].get_last_lr()


def test_damaged_files(tmp_path: Path) -> None:
    save_tree(tmp_path / "state", {"a": torch.ones(2)})
    (tmp_path / "state.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tree(tmp_path / "state")
