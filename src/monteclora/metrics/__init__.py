"""Metrics of predictions, in numpy alone: no model, no file, no task is known here."""
