"""Training: datasets, losses as pure functions, and the training loop."""
