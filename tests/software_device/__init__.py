"""A device in software, for what would go wrong on a GPU alone.

It computes with the CPU's kernels, so that results can be compared with the CPU's to the bit, and is strict where the
CPU is not: tensors of the CPU beside its own are refused; copies to pinned memory that nobody waited for hold rubbish
(NaN, -1); random numbers come from a generator of its own. Streams and events are real, and work can be queued on them:

    device = software_device.device()  # registers it with this process, for good: torch.accelerator is it from now on
    model.to(device)

    with software_device.waits() as waits:  # how often the host waited for the device, by what for
        model(images)
    assert waits == {}

    software_device.queue(0.2)  # 200 ms of work on the current stream (or stream=...), so that
    logits.cpu()                # takes 200 ms, as do torch.accelerator.synchronize() and an event recorded after it

    with software_device.kernel_seconds(1e-3):  # each kernel launched takes 1 ms of its stream
        model(images)

    software_device.read_clock()  # the seconds that the host has waited so far, all in all

    other = torch.Stream(device)
    with software_device.races() as races:  # memory used by two streams of which none waited for the other
        with other:
            images.add_(1)
        model(images)
    assert races != []  # other.wait_stream(...) and events order streams, and so does a wait of the host between them

Kinds of waits: 'item', 'copy to host', 'copy from host' (both but for `non_blocking=True`; to the host that needs
pinned memory, which `tensor.to('cpu', non_blocking=True)` makes itself), 'stream', 'event', 'device', and the names of kernels
whose results have a size that the host must know ('aten::nonzero', by which masks index too). `queue` and
`kernel_seconds` delay only what waits: kernels run at their launch. Time is that of a clock of its own, which waits
alone move, so that what is measured with it is exact on a busy machine: nothing sleeps, and the host's work is free.

Tests that use it live in this folder, whose conftest.py runs each file in a process of its own, since a device that is
registered stays. The source is compiled once (half a minute) and kept with other extensions of torch (environment
variable TORCH_EXTENSIONS_DIR, or a folder for temporary files).
"""

import collections
import contextlib
import fcntl
import functools
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch

NAME = 'software'


def find_obstacle():
    """Return why the device cannot be built here, '' if it can."""
    missing = [tool for tool in (os.environ.get('CXX', 'c++'), 'ninja') if not shutil.which(tool)]
    return f'{" and ".join(missing)} not found, which compile the software device' if missing else ''


@functools.cache
def build():
    """Compile the extension if that has not been done with this torch, and return it."""
    from torch.utils import cpp_extension

    root = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or Path(tempfile.gettempdir()) / 'torch-extensions')
    folder = root / f'software_device-{torch.__version__}-{sys.implementation.cache_tag}'
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'building').open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / 'lock').unlink(missing_ok=True)  # torch's own, which a build that was killed leaves for ever
        source = Path(__file__).with_name('device.cpp')
        return cpp_extension.load(
            'software_device_extension', [str(source)], build_directory=str(folder), extra_cflags=['-O1', '-w']
        )


@functools.cache
def device():
    """Register the device with torch and return it."""
    torch.utils.rename_privateuse1_backend(NAME)
    extension = build()
    module = types.ModuleType(f'torch.{NAME}')
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = torch.accelerator.synchronize
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.manual_seed = module.manual_seed_all = extension.generator().manual_seed
    module.get_rng_state = lambda device=0: extension.generator().get_state()
    module.set_rng_state = lambda state, device=0: extension.generator().set_state(state)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


@contextlib.contextmanager
def _count(read):
    counts, before = collections.Counter(), read()
    yield counts
    counts.update({kind: count - before.get(kind, 0) for kind, count in read().items() if count > before.get(kind, 0)})


def waits():
    """Count the host's waits for the device in the block, by kind: the Counter is filled when it ends."""
    return _count(build().waits)


def launches():
    """Count the kernels launched in the block, by name: the Counter is filled when it ends."""
    return _count(build().launches)


def queue(seconds, stream=None):
    """Queue work of that many seconds on a stream, by default the current one."""
    build().queue(seconds, (stream or torch.accelerator.current_stream()).stream_id)


def read_clock():
    """Return the time of the device in seconds."""
    return build().now()


@contextlib.contextmanager
def kernel_seconds(seconds):
    """Let each kernel that is launched in the block take that many seconds of its stream."""
    before = build().set_kernel_seconds(seconds)
    try:
        yield
    finally:
        build().set_kernel_seconds(before)


@contextlib.contextmanager
def races():
    """List the uses of memory by streams that are not ordered: the list is filled when the block ends."""
    found = []
    build().take_races()
    yield found
    found += build().take_races()
