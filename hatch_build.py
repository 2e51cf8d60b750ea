"""Build hook of the sdist: it holds the files that git tracks, not what else lies in a clone."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TrackedFiles(BuildHookInterface):
    """Gives hatchling the list of files; an unpacked sdist has no git, and is taken whole."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fill `build_data`, as hatchling calls it."""
        root = Path(self.root)
        if (root / '.git').exists():
            listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, check=True, text=True)
            names = listed.stdout.rstrip('\0').split('\0')
        else:
            names = [path.relative_to(root).as_posix() for path in root.rglob('*')]
        build_data['force_include'] = {
            str(root / name): name for name in names if (root / name).is_file() and name != 'PKG-INFO'
        }
