"""Thresholds and temperatures from held-out logits, for a budget or a bound on the loss of accuracy."""
