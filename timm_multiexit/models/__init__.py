"""The multi-exit model, and what it can be asked."""
