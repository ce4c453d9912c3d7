"""Bayesian low-rank adaptation of language models."""
