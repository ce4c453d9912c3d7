"""Evaluation: a run and rows become predictions, metrics and files."""
