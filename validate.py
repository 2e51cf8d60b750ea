#!/usr/bin/env python3
"""Accuracy and cost of every exit: `validate.py --model local-dir:output/train/RUN/best --data-dir DIR`."""

import sys

from timm_multiexit.cli.validate import main

if __name__ == '__main__':
    sys.exit(main())
