"""`python -m timm_multiexit COMMAND`, the same as `timm-multiexit COMMAND`."""

import sys

from timm_multiexit.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
