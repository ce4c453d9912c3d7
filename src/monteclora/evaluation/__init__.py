"""What a trained adapter knows, and what it does not: predictions, metrics, calibration."""
