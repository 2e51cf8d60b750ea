"""Fixtures of the tests of the Hub's client."""

import logging

import pytest
from helpers.hub import CARD, PLOT, SECRET, WEIGHTS, noise, write


@pytest.fixture
def secret(hub, monkeypatch, caplog):
    """The token that the server takes; no record of any library may have it, at any level."""
    monkeypatch.setattr(hub, 'token', SECRET)
    monkeypatch.setenv('HF_TOKEN', SECRET)
    monkeypatch.setattr(logging.getLogger('huggingface_hub'), 'propagate', True)
    caplog.set_level(logging.DEBUG)
    for name in ('huggingface_hub', 'timm_multiexit', 'httpx', 'httpx2', 'httpcore', 'httpcore2'):
        caplog.set_level(logging.DEBUG, logger=name)
    yield SECRET
    records = caplog.get_records('call')
    assert not [record for record in records if SECRET in f'{record.getMessage()} {record.exc_info}']


@pytest.fixture
def folder(tmp_path):
    """A publication: small files and weights that go by LFS, one in a folder, and what must not go."""
    contents = {'README.md': CARD, 'config.json': b'{"a": 1}', 'metrics.json': b'{}', PLOT: b'\x89PNG'}
    contents |= {WEIGHTS: noise(300_000), 'exits.safetensors': noise(5_000, b'exits'), 'notes/recipe.txt': b'of mine'}
    return write(tmp_path / 'run', {**contents, '.cache/state': b'hidden', '.token': SECRET.encode()})
