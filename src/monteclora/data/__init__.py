"""Files to rows to tokens; pretrained models by name. Knows nothing of tasks."""
