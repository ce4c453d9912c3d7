"""From rows to predictions, draw by draw."""
