"""Accuracy, calibration and speed of a model at every exit."""
