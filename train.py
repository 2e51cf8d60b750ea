#!/usr/bin/env python3
"""Train a timm model, plain or with exits: `accelerate launch train.py --eed --data-dir DIR`."""

import sys

from timm_multiexit.cli.train import main

if __name__ == '__main__':
    sys.exit(main())
