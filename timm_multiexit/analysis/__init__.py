"""The figures of the EED paper for runs of `train.py`, with their numbers: `python -m timm_multiexit.analysis RUN`."""
