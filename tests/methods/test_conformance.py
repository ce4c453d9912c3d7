from __future__ import annotations

import pytest

from monteclora.methods import list_methods
from tests.methods import registered
from tests.methods.conformance import MethodSuite


class TestEveryMethod(MethodSuite):
    @pytest.fixture(params=[method.name for method in list_methods()])
    def method(self, request: pytest.FixtureRequest) -> str:
        name: str = request.param
        return name


def test_the_suite_covers_a_method_of_its_own() -> None:
    assert registered.HeadOnly.name in [method.name for method in list_methods()]
