"""Folders that are written by somebody else, and what loading them may do."""

import contextlib
import json
import re
import resource
from pathlib import Path

import safetensors.torch
import torch

import timm_multiexit as tme

MIB = 1 << 20


def write_good_folder(path):
    """Write a small calibrated model; its table of budgets is cut to two points."""
    torch.manual_seed(1234)  # not that of the tests: their fresh layers must differ
    model = tme.create_model('test_resnet', num_classes=10, input_size=(3, 64, 64)).eval()
    images = torch.randn(20, 3, 64, 64)
    model.calibrate([(images, model(images).argmax(-1))], budget='99%')
    tme.save_pretrained(model, path, label_names=[f'class {idx}' for idx in range(10)])
    config = json.loads((path / 'config.json').read_text())
    del config['multiexit']['budgets']['points'][2:]
    (path / 'config.json').write_text(json.dumps(config))
    return path


def memory(key):
    """Return bytes of a line of /proc/self/status: VmSize, VmRSS, or VmHWM, the largest VmRSS so far."""
    return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


@contextlib.contextmanager
def limited_memory(limit=100 * MIB, reserve=1024 * MIB):
    """Fail if more than `limit` bytes become resident; allocating `reserve` bytes raises at once."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_AS)
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew
    before = memory('VmRSS')
    resource.setrlimit(resource.RLIMIT_AS, (memory('VmSize') + reserve, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert memory('VmHWM') - before < limit


def load(folder, **kwargs):
    return tme.create_model(f'local-dir:{folder}', **{'pretrained': True, **kwargs})


def is_faithful(model, folder, *, with_exits=True, fresh=()):
    """Return whether a model has the very weights of its files, but for fresh layers."""
    files = ['model.safetensors', 'exits.safetensors'][: 1 + with_exits]
    saved = {key: tensor for name in files for key, tensor in safetensors.torch.load_file(folder / name).items()}
    own = {key.removeprefix('backbone.'): tensor for key, tensor in model.state_dict().items()}
    own = {key: tensor for key, tensor in own.items() if with_exits or not key.startswith('exits.')}
    return own.keys() == saved.keys() and all(
        torch.equal(tensor, saved[key].to(tensor.dtype))
        for key, tensor in own.items()
        if not key.endswith(tuple(f'{layer}.{kind}' for layer in fresh for kind in ('weight', 'bias')))
    )


def check_refusal(error):
    """Check that a refusal is of one short line that a terminal can show, and did not come of memory running out."""
    message = str(error)
    assert isinstance(error, tme.MultiExitError)
    assert message.isprintable()
    assert 20 < len(message) < 500
    while error:
        assert not isinstance(error, MemoryError)
        assert 'allocate' not in str(error)
        error = error.__cause__ or error.__context__


LONG = 'x' * 100_000


CONTROL = 'two\nlines\x1b[2J\u2028\ud800'
