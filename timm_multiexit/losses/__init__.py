"""Multi-exit losses, who teaches, and distances between outputs."""
