"""`timm-multiexit COMMAND`, or `python -m timm_multiexit COMMAND`: one door to the commands of the package."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from timm_multiexit.version import __version__

PROGRAM = 'timm-multiexit'

# Module in cli, of the same name as the command -> what it does.
COMMANDS = {
    'train': 'train a timm model, plain or with exits',
    'validate': 'accuracy and cost of every exit, and what can be reached with which budget',
    'export': 'write ONNX and torch.export programs that stop early without Python',
    'publish': 'publish a run on the Hugging Face Hub',
    'analyze': 'draw the figures of the EED paper for runs',
}


def format_usage() -> str:
    """Return the help of the program."""
    lines = '\n'.join(f'  {name:10}{what}' for name, what in COMMANDS.items())
    return f"""usage: {PROGRAM} [-h] [--version] COMMAND ...

Multi-exit image classifiers from any timm backbone.

commands:
{lines}

{PROGRAM} COMMAND --help lists the flags of a command. To train on several devices:
accelerate launch -m timm_multiexit.cli.train ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, 2 for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ''
    if not words:
        print(format_usage(), file=sys.stderr)
        return 2
    if name in ('-h', '--help'):
        print(format_usage())
    elif name == '--version':
        print(f'{PROGRAM} {__version__}')
    elif name in COMMANDS:
        # Imported here, so that a command loads what it uses alone.
        command = importlib.import_module(f'timm_multiexit.cli.{name}')
        return int(command.main(words[1:], prog=f'{PROGRAM} {name}'))
    else:
        nearest = get_close_matches(name, COMMANDS, n=1)
        hint = f'Did you mean {nearest[0]}?' if nearest else f'See {PROGRAM} --help.'
        print(f'{PROGRAM}: error: COMMAND must be one of {", ".join(COMMANDS)}, got {name!r}. {hint}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
