"""What an adapter's configuration says, as a recipe says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from monteclora.errors import ConfigError
from monteclora.methods.lora import LoRAOptions
from monteclora.runs.foreign_adapter import lora_options

FOLDER = Path("theirs")


def test_options_are_those_that_peft_writes() -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.25,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=r".*\.0\..*",
        modules_to_save=["score", "norm", "classifier"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 1},
        use_rslora=True,
    )
    written = json.loads(json.dumps(config.to_dict(), default=list))  # it holds sets
    assert LoRAOptions(**lora_options(FOLDER, written)) == LoRAOptions(
        r=4,
        lora_alpha=6,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=r".*\.0\..*",
        modules_to_save=["norm"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 1},
        use_rslora=True,
    )


def test_what_is_absent_is_what_peft_takes() -> None:
    nothing = peft.LoraConfig()
    found = lora_options(FOLDER, {"r": None, "target_modules": None})
    assert found == lora_options(FOLDER, nothing.to_dict())
    assert (found["r"], found["lora_alpha"]) == (nothing.r, nothing.lora_alpha)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"r": "8"}, "theirs/adapter_config.json: r: expected an integer"),
        ({"r": 0.5}, "r: expected an integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": {"q_proj": 1}}, "target_modules: expected"),
        ({"modules_to_save": [["norm"]]}, r"modules_to_save\[0\]: expected"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj: expected"),
    ],
)
def test_what_no_recipe_can_have_is_refused(written: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_options(FOLDER, written)
