"""Training: a recipe becomes a finished run."""
