"""A training run: step, loop, regimes, checkpoints and records."""
