#!/usr/bin/env python3
"""Publish a run of train.py: `hub/publish.py output/train/RUN ORG/NAME`."""

import sys

from timm_multiexit.cli.publish import main

if __name__ == '__main__':
    sys.exit(main())
