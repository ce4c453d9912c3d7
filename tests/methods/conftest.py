from tests.training.conftest import assets  # noqa: F401
