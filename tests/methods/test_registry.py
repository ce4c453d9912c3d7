from __future__ import annotations

import pytest

from monteclora.errors import ConfigError
from monteclora.methods import get_method, list_methods


def test_names() -> None:
    names = [method.name for method in list_methods()]
    assert names == sorted(names)
    assert {"full", "lora", "monteclora"} <= set(names)
    with pytest.raises(ConfigError, match=r"no method 'montclora'. Did you mean monteclora\?"):
        get_method("montclora")
