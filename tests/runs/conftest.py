from tests.training.conftest import assets, recipe  # noqa: F401
