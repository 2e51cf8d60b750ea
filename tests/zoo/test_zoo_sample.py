"""The sample of the zoo: drawn by the seed alone, different from commit to commit, and all of it in the end."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.families import FAMILIES
from helpers.zoo_sample import NUM_CHUNKS, draw_sample, find_commit

ROOT = Path(__file__).parents[2]


def collect(*options):
    """Return the ids of the zoo's tests that a run with these options has, and all that it prints."""
    command = [sys.executable, '-m', 'pytest', '-n', '0', '-m', 'zoo', '--collect-only', 'tests/zoo', *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in done.stdout.splitlines() if '::' in line]
    return ids, done.stdout + done.stderr


def test_sample_depends_on_the_seed_alone_and_has_the_size_that_was_asked():
    sample = draw_sample(5, 'a commit')
    assert sample == draw_sample(5, 'a commit')
    assert (len(sample.families), len(sample.chunks)) == (5, 5)
    assert sample.families <= set(FAMILIES)
    assert sample.chunks <= set(range(NUM_CHUNKS))
    assert sample.families != draw_sample(5, 'another commit').families


def test_a_sample_of_more_than_there_is_is_all():
    sample = draw_sample(1000, '')
    assert (sample.families, sample.chunks) == (set(FAMILIES), set(range(NUM_CHUNKS)))


def test_every_family_and_chunk_has_its_turn():
    samples = [draw_sample(10, f'commit {idx}') for idx in range(100)]
    assert set().union(*(sample.families for sample in samples)) == set(FAMILIES)
    assert set().union(*(sample.chunks for sample in samples)) == set(range(NUM_CHUNKS))


def test_tests_without_a_family_are_in_every_sample():
    sample = draw_sample(1, '')
    (family,), (chunk,) = sample.families, sample.chunks
    assert sample.has({'family': family})
    assert not sample.has({'family': 'VGG' if family != 'VGG' else 'ResNet'})
    assert sample.has({'chunk': chunk})
    assert not sample.has({'chunk': (chunk + 1) % NUM_CHUNKS})
    assert sample.has({'other': 1})


@pytest.mark.slow
def test_run_has_the_sample_and_says_how_to_repeat_it():
    ids, printed = collect('--zoo-sample', '2', '--zoo-seed', 'some text')
    sample = draw_sample(2, 'some text')
    expected = {str(value) for value in (*sample.families, *sample.chunks)}
    assert {name.split('[')[1].rstrip(']') for name in ids if '[' in name} == expected
    assert len([name for name in ids if '[' in name]) == 2 + 2 * 7  # chunks, and seven tests of each family
    assert "repeat with --zoo-sample 2 --zoo-seed 'some text'" in printed
    assert len(collect()[0]) > len(FAMILIES) * 7
    assert '--zoo-sample must be >= 1, got 0' in collect('--zoo-sample', '0')[1]


def test_commit_of_this_checkout_is_the_seed():
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    assert len(find_commit()) == 40
