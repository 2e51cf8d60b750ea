"""Fixtures of all tests: seeded, one thread, off the network, small models with lively weights."""
# ruff: noqa: E402

import logging
import os
import tempfile
from types import SimpleNamespace

from hub_server.guard import NetworkGuard, environment, replace_environment
from hub_server.server import Server
from hub_server.state import Hub

# huggingface_hub reads its environment when it is imported, and timm imports it: so this comes first. Each process has
# a server of its own, and child processes inherit its address.
HOME = tempfile.TemporaryDirectory(prefix='hub-home-')
SERVER = Server(Hub())
replace_environment(environment(SERVER.hub, HOME.name))
GUARD = NetworkGuard()
GUARD.install()

# Tests start hundreds of processes. One that may not write bytecode compiles torch and timm anew, which takes longer than
# to import them. So bytecode goes to a folder of this run instead.
if os.environ.pop('PYTHONDONTWRITEBYTECODE', None):
    os.environ['PYTHONPYCACHEPREFIX'] = os.path.join(HOME.name, 'bytecode')

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers import enliven, write_images
from helpers.members import MEMBERS
from helpers.zoo_sample import draw_sample, find_commit

from timm_multiexit.models.attach import attach_exits

# Two busy cores make a second OpenMP thread wait more than it works: 30 times slower, measured.
torch.set_num_threads(1)


def pytest_addoption(parser):
    group = parser.getgroup('zoo', 'tests of every family of timm (-m zoo)')
    group.addoption('--zoo-sample', type=int, metavar='N', help='test N families and N chunks of the registry')
    group.addoption('--zoo-seed', metavar='TEXT', help='what the sample is drawn by (default: the commit)')


def pytest_configure(config):
    count = config.getoption('zoo_sample')
    if count is not None and count < 1:
        raise pytest.UsageError(f'--zoo-sample must be >= 1, got {count}')
    try:
        config.zoo_sample = count and draw_sample(count, config.getoption('zoo_seed') or find_commit())
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config):
    return str(config.zoo_sample) if config.zoo_sample else None


def pytest_terminal_summary(terminalreporter, config):
    if config.zoo_sample:  # the header is not shown with -q
        terminalreporter.write_line(str(config.zoo_sample))


def pytest_collection_modifyitems(config, items):
    if config.zoo_sample:
        is_zoo = {item: item.get_closest_marker('zoo') and hasattr(item, 'callspec') for item in items}
        left_out = [item for item in items if is_zoo[item] and not config.zoo_sample.has(item.callspec.params)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which keeps a stack trace for each kind of device


@pytest.fixture(autouse=True)
def accelerate_state():
    """Each test, and each process that it forks, begins as a new process does: without the Accelerator of another."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def network_guard():
    """Fails a test that wanted to leave this machine, also where the code under test swallowed the error."""
    GUARD.take_attempts()
    yield GUARD
    assert GUARD.take_attempts() == [], 'a test wanted to reach other machines'


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """The Hub of this process (`hub_server.state.Hub`), empty, with empty caches of the client and of child processes.

    The client does not wait between its tries, which would be 23 seconds where the Hub is down.
    """
    SERVER.hub.clear()
    caches = tmp_path_factory.mktemp('hub')
    for name in ('HF_HUB_CACHE', 'HF_XET_CACHE'):
        monkeypatch.setenv(name, str(caches / name.lower()))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(caches / 'hf_hub_cache'))
    monkeypatch.setattr('huggingface_hub.utils._http.time', SimpleNamespace(sleep=lambda seconds: None))
    yield SERVER.hub
    leaks = [entry for entry in SERVER.hub.log if entry.method == 'LEAK']
    SERVER.hub.clear()
    assert not leaks, 'the access token was sent to the host of large files'


@pytest.fixture
def make_backbone():
    """Return a function that makes a plain timm model of ten classes."""

    def make(name='test_resnet', *, num_classes=10, **kwargs):
        return enliven(timm.create_model(name, num_classes=num_classes, **kwargs))

    return make


@pytest.fixture
def make_empty():
    """Return a function that makes a timm model without data, on the meta device."""

    def make(name, **kwargs):
        with torch.device('meta'):
            return timm.create_model(name, **kwargs)

    return make


@pytest.fixture
def make_model(make_backbone):
    """Return a function that makes a multi-exit model; keywords go to `attach_exits`."""

    def make(name='test_resnet', exits='auto', *, num_classes=10, input_size=(3, 64, 64), **kwargs):
        backbone = make_backbone(name, num_classes=num_classes)
        return enliven(attach_exits(backbone, exits, input_size=input_size, **kwargs))

    return make


@pytest.fixture
def make_small(make_backbone):
    """Return a function that makes a member of the table with exits; further keywords go to timm."""

    def make(name, *, num_classes=10, **kwargs):
        row = MEMBERS[name]
        backbone = make_backbone(name, num_classes=num_classes, **{**row.kwargs, **kwargs})
        model = attach_exits(backbone, input_size=(kwargs.get('in_chans', 3), row.size, row.size))
        enliven(model.exits)
        return model

    return make


@pytest.fixture
def image_folder(tmp_path):
    """A folder of two classes that a network can tell apart: 12 images each to train on, 5 and 6 to validate on."""
    return write_images(tmp_path / 'images')


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """Return a function that runs a script's main(argv) in an empty folder and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(main, *argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        handlers = logging.root.handlers[:]
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as error:  # argparse
            code = error.code
        finally:
            logging.disable(logging.NOTSET)
            logging.root.handlers[:] = handlers  # the script's own write to a stream that ends with this test
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
