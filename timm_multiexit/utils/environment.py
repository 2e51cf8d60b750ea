"""What results depend on besides their inputs: a stamp of libraries, commit and hardware, and what a caller has set."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from timm_multiexit.version import __version__

_LIBRARIES = ('timm', 'torch', 'torchvision', 'accelerate', 'safetensors', 'huggingface_hub')


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make new tensors on the CPU, and compute there without autocast, which would round what is counted and traced."""
    with torch.device('cpu'), torch.autocast('cpu', enabled=False):
        yield


def describe_environment() -> dict[str, str]:
    """Return what a measurement must be stamped with: commit, library versions, hardware, CPU threads of torch."""
    threads = torch.get_num_threads()
    hardware = [f'{os.cpu_count()} x {_cpu_name()}']
    if torch.accelerator.is_available():
        hardware.insert(0, f'{torch.accelerator.device_count()} x {_accelerator_name()}')
    versions = [f'python {platform.python_version()}', f'timm_multiexit {__version__}']
    versions += [f'{name} {version(name)}' for name in _LIBRARIES]
    return {
        'commit': _find_commit(Path(__file__)),
        'versions': ', '.join(versions),
        'hardware': ', '.join(hardware),
        'threads': f'{threads} torch thread{"" if threads == 1 else "s"}',
    }


@cache
def _find_commit(path: Path) -> str:
    """Return the commit that a file is of, with '-dirty' where the repository has changes; 'unknown' outside one.

    It is read once, early: what is checked out while a run works is not what runs.
    """
    git = ('git', '-C', str(path.parent))
    try:
        # An installed package may lie inside the repository of somebody else, whose commit says nothing of it.
        subprocess.run((*git, 'ls-files', '--error-unmatch', path.name), capture_output=True, check=True)
        described = subprocess.run(
            (*git, 'describe', '--always', '--dirty', '--abbrev=12'), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return described.stdout.strip()


def _accelerator_name() -> str:
    """Return the name of the current accelerator, or where its backend does not tell it its kind, such as 'mps'."""
    device = torch.accelerator.current_accelerator()
    assert device is not None  # is_available() said so
    get_name = getattr(torch.get_device_module(device), 'get_device_name', None)
    return str(get_name() if get_name else device.type)


def _cpu_name(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
    """Return the CPU's model, or where the system does not tell it the kind of machine, such as 'x86_64'."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, '') or platform.machine()
