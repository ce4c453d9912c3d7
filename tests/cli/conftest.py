from tests.runs import assets, trained  # noqa: F401
