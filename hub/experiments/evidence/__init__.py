"""Plans of runs, their results and tables."""
