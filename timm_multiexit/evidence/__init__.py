"""Evidence: plans of runs, the runner that works through them, what each run left, and the tables of it all."""
