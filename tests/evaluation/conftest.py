from tests.finished_runs import assets, trained  # noqa: F401
