"""Data sets and loaders, seeded so that a run can resume anywhere."""
