"""What `benchmark.py` measures; it prints the rows that these modules return."""
