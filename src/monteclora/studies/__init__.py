"""A grid of runs: planned, run by worker processes that may die at any time, resumed, and summarised."""
