"""What a run is, and what is on disk of it."""
