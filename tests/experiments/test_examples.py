"""Examples in the docstrings of what stands outside the package, which pytest does not collect."""

import doctest
import importlib
import pkgutil

import evidence

import benchmarks


def test_examples_hold():
    counts = {}
    for package in (evidence, benchmarks):
        for info in pkgutil.iter_modules(package.__path__, f'{package.__name__}.'):
            result = doctest.testmod(importlib.import_module(info.name), optionflags=doctest.NORMALIZE_WHITESPACE)
            assert not result.failed, info.name
            counts[info.name] = result.attempted
    assert sum(counts.values()) >= 15, counts
    assert counts['evidence.differences'] > 5
