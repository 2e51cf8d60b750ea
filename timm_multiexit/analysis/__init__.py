"""The figures of the EED paper for runs of `train.py`, with their numbers: `timm-multiexit analyze RUN`."""
