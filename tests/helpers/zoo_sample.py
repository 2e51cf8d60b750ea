"""Which part of the zoo a run tests: all of it, or a sample that another commit draws anew."""

import random
import shlex
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.families import FAMILIES

NUM_CHUNKS = 32  # of timm's registry


class ZooSample(NamedTuple):
    """A part of the zoo.

    Attributes:
        families: Names of families.
        chunks: Indices of chunks of the registry.
        seed: What they were drawn by.
    """

    families: Collection[str]
    chunks: Collection[int]
    seed: str

    def __str__(self) -> str:
        size = f'{len(self.families)} of {len(FAMILIES)} families, {len(self.chunks)} of {NUM_CHUNKS} chunks'
        return f'zoo: {size}, repeat with --zoo-sample {len(self.families)} --zoo-seed {shlex.quote(self.seed)}'

    def has(self, parameters: dict) -> bool:
        """Whether a test with these parameters is in the sample; one of neither kind is."""
        family, chunk = parameters.get('family'), parameters.get('chunk')
        return (family is None or family in self.families) and (chunk is None or chunk in self.chunks)


def draw_sample(count: int, seed: str) -> ZooSample:
    """Return `count` families and as many chunks, all where there are fewer; equal for equal seeds."""
    draw = random.Random(seed)

    def pick(values: Sequence) -> frozenset:
        return frozenset(draw.sample(values, min(count, len(values))))

    return ZooSample(pick(list(FAMILIES)), pick(range(NUM_CHUNKS)), seed)


def find_commit() -> str:
    """Return the commit that is checked out.

    Raises:
        ValueError: There is none.
    """
    command = ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f'--zoo-sample needs a git checkout, or --zoo-seed TEXT: {error}') from error
