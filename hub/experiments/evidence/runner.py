"""Works through a plan: several runs of `train.py` at a time, which can be stopped at any moment and started again."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evidence.plan import PlannedRun, find_data
from evidence.results import check_extra_flags, check_same_flags, collect_result, is_done, write_result
from timm_multiexit.utils.errors import CheckpointError, DiskError, InvalidValueError, MultiExitError
from timm_multiexit.utils.files import write_text
from timm_multiexit.utils.signals import handling_signals

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RunnerConfig:
    """How a plan is worked through.

    Attributes:
        data_dir: Holds a folder for each data set, or is that of the only one.
        output: Where the runs' folders and logs are.
        results: Where a file for each finished run is.
        script: `train.py`.
        jobs: Runs at a time.
        threads: CPU threads of each.
        extra: Flags for all runs, after all others.
    """

    data_dir: Path
    output: Path
    results: Path
    script: Path
    jobs: int = 1
    threads: int = 1
    extra: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ('jobs', 'threads'):
            if getattr(self, name) < 1:
                raise InvalidValueError(f'--{name} must be >= 1, got {getattr(self, name)}.')


@dataclass
class _Job:
    """A run in progress."""

    run: PlannedRun
    process: subprocess.Popen
    notes: dict[str, Any]


class Runner:
    """Starts the runs of a plan that have no results yet, and writes the results of those that end.

    A run's process holds a lock for as long as it lives. So two runners can share a folder, and a process that outlives
    its runner, which was killed, is not started a second time: the next runner waits for it and takes what it leaves.

    Args:
        runs: In order.
        config: How.
        say: Takes a line for people.

    Attributes:
        failed: Names of runs that ended with an error.
        signal: The number of the last signal that stopped it, 0 for none.
    """

    def __init__(self, runs: Iterable[PlannedRun], config: RunnerConfig, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.pending = [run for run in runs if not is_done(run, config.results, config.extra)]
        self.data = {run.data: find_data(config.data_dir, run.data) for run in self.pending}
        self.failed: list[str] = []
        self.signal = 0
        self._jobs: list[_Job] = []
        self._is_signal_new = False

    def work(self) -> int:
        """Do all runs and return the exit code: 0, 1 if one failed, 128 + N after signal N.

        Signals are passed on to the runs, which save and stop at the first and end at the second.

        Raises:
            DiskError: The output folder cannot be created.
        """
        try:
            self.config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f'Cannot create {self.config.output}: {error.strerror}.') from error
        with handling_signals(self._note_signal):
            while self._jobs or (self.pending and not self.signal):
                self._start_pending()
                self._pass_on_signal()
                for job in [job for job in self._jobs if job.process.poll() is not None]:
                    self._finish(job)
                time.sleep(_POLL_SECONDS)
        if self.signal:
            return 128 + self.signal
        return 1 if self.failed else 0

    def _note_signal(self, number: int, frame: Any) -> None:
        self.signal, self._is_signal_new = number, True

    def _pass_on_signal(self) -> None:
        if self._is_signal_new:
            self._is_signal_new = False
            for job in self._jobs:
                job.process.send_signal(signal.SIGTERM)

    def _start_pending(self) -> None:
        for run in list(self.pending):
            if self.signal or len(self._jobs) >= self.config.jobs:
                return
            lock = _acquire_lock(self._path(run, 'lock'))
            if lock is None:
                continue  # another process trains it
            self.pending.remove(run)
            with lock:  # its process inherits it
                try:
                    self._start(run, lock)
                except (MultiExitError, OSError) as error:
                    self._fail(run, str(error))

    def _start(self, run: PlannedRun, lock: IO[str]) -> None:
        config = self.config
        if is_done(run, config.results):
            return  # by another runner, meanwhile
        notes = self._check_begun(run) | {'flags': run.flags, 'extra': list(config.extra)}
        if (config.output / run.name / 'results.json').exists():
            self._collect(run, notes)  # it has ended, and nobody took its results
            return
        flags = self._path(run, 'yaml')
        write_text(flags, run.format_flags())
        notes['begun'] = time.time()
        write_text(self._path(run, 'json'), json.dumps(notes))
        command = [sys.executable, str(config.script), '--config', str(flags)]
        command += ['--data-dir', str(self.data[run.data]), '--output', str(config.output)]
        command += ['--experiment', run.name, '--resume', 'auto', *config.extra]
        with self._path(run, 'log').open('ab') as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': str(config.threads)},
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # a Ctrl-C comes from us, once
            )
        self._jobs.append(_Job(run, process, notes))
        self.say(f'{run.name}: started, {len(self.pending)} wait, log in {self._path(run, "log")}')

    def _check_begun(self, run: PlannedRun) -> dict[str, Any]:
        """Return the notes of a run, and check that its folder was made with the flags that are planned."""
        folder, path = self.config.output / run.name, self._path(run, 'json')
        if not folder.exists():
            return {'seconds': 0.0}
        try:
            notes = json.loads(path.read_text(encoding='utf-8'))
            flags, extra, seconds = notes['flags'], notes['extra'], float(notes['seconds'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f'{path} does not say which flags {folder} was made with. Remove that folder.'
            ) from error
        check_same_flags(run, flags, folder)
        check_extra_flags(self.config.extra, extra, folder)
        if 'begun' in notes:  # no runner saw its end, the log did
            seconds += max(0.0, self._path(run, 'log').stat().st_mtime - notes['begun'])
        return {'seconds': seconds}

    def _finish(self, job: _Job) -> None:
        self._jobs.remove(job)
        run, code = job.run, job.process.returncode
        job.notes['seconds'] = round(job.notes['seconds'] + time.time() - job.notes.pop('begun'), 1)
        try:
            write_text(self._path(run, 'json'), json.dumps(job.notes))
            if code == 0:
                self._collect(run, job.notes)
            elif self.signal:
                self.say(f'{run.name}: stopped')
            else:
                self._fail(run, f'exit code {code}: {_last_line(self._path(run, "log"))}')
        except (MultiExitError, OSError) as error:
            self._fail(run, str(error))

    def _collect(self, run: PlannedRun, notes: dict[str, Any]) -> None:
        config, seconds = self.config, notes['seconds']
        result = collect_result(run, config.output / run.name, seconds=seconds, extra=config.extra)
        write_result(config.results, run, result)
        self.say(f'{run.name}: {describe_top1(result)}, {seconds / 60:.1f} min')

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.failed.append(run.name)
        self.say(f'{run.name}: FAILED, {reason}')

    def _path(self, run: PlannedRun, kind: str) -> Path:
        return self.config.output / f'{run.name}.{kind}'


def describe_top1(result: dict[str, Any]) -> str:
    """Return the accuracies of a result in one line.

    >>> describe_top1({'classifiers': [{'exit': '0', 'top-1': 61.234}, {'exit': 'main', 'top-1': 70.0}]})
    '0 61.23 main 70.00'
    """
    return ' '.join(f'{row["exit"]} {row["top-1"]:.2f}' for row in result['classifiers'])


def describe_state(run: PlannedRun, config: RunnerConfig) -> str:
    """Return 'done', 'running', 'begun' or 'planned'.

    Raises:
        InvalidValueError: Its results are of other flags.
    """
    if is_done(run, config.results):
        return 'done'
    path = config.output / f'{run.name}.lock'
    if not path.exists():
        return 'planned'
    lock = _acquire_lock(path)
    if lock is None:
        return 'running'
    lock.close()
    return 'begun'


def _acquire_lock(path: Path) -> IO[str] | None:
    """Return an open file that no other process has locked, None if one has."""
    file = path.open('a')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'nothing in its log')
