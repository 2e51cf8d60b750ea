"""Where a backbone is read, and the classifiers that read it."""
