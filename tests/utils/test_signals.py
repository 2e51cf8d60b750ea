"""What processes do with signals that are sent to all of them."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from timm_multiexit.utils import signals
from timm_multiexit.utils.signals import Stopper, outlive_signals


def _outlive(ready):
    outlive_signals()
    ready.set()
    time.sleep(60)


def test_loading_process_outlives_the_first_signals_and_a_later_one_ends_it(monkeypatch):
    monkeypatch.setattr(signals, '_SAME_SIGNAL_SECONDS', 0.2)
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    process = context.Process(target=_outlive, args=(ready,))
    process.start()
    ready.wait()
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, sign)
    process.join(0.3)
    assert process.is_alive()
    process.terminate()  # as torch ends processes that hang
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize(
    ('second', 'seconds', 'interrupts'),
    [
        (signal.SIGTERM, 0.0, False),  # of the scheduler and of the launcher
        (signal.SIGTERM, 5.0, True),
        (signal.SIGINT, 0.0, True),
    ],
    ids=['same', 'later', 'ctrl-c'],
)
def test_second_signal_interrupts_if_it_is_another_one(second, seconds, interrupts, monkeypatch):
    stopper = Stopper(SimpleNamespace(num_processes=1))
    with stopper.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.is_asked()
        now = time.monotonic()
        monkeypatch.setattr(signals.time, 'monotonic', lambda: now + seconds)
        if interrupts:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), second)
        else:
            os.kill(os.getpid(), second)
    assert stopper.signal == signal.SIGTERM


def test_signal_that_comes_while_processes_agree_counts_the_next_time():
    """Otherwise the process that got it would stop alone, and the others wait for it in the next step."""

    def gather(asked):
        gathered = torch.cat([asked, torch.tensor([0])])
        stopper.signal = signal.SIGTERM  # the handler's work, after what was sent
        return gathered

    stopper = Stopper(SimpleNamespace(num_processes=2, device=torch.device('cpu'), gather=gather))
    assert not stopper.is_asked()
    assert stopper.is_asked()
