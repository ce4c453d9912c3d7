"""One run: recipe to adapter."""
