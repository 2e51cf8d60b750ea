"""Models on disk: timm folders with exits, training checkpoints, and the files of a run."""
