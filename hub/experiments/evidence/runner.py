"""Works through a plan: several runs of `train.py` at a time, which survive that it is stopped at any moment."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.plan import PlannedRun, find_data
from evidence.results import check_extra, check_flags, collect_result, is_done, write_result
from timm_multiexit.utils.errors import MultiExitError
from timm_multiexit.utils.files import write_text

_POLL_SECONDS = 0.1

_SECONDS_BETWEEN_NOTES = 30.0


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
        if self.jobs < 1 or self.threads < 1:
            raise MultiExitError(f'--jobs is {self.jobs} and --threads {self.threads}, allowed are 1 and more.')


@dataclass
class _Job:
    """A run that is claimed: its process, None once it has ended, and what is noted of it."""

    run: PlannedRun
    claim: int
    process: subprocess.Popen | None
    notes: dict[str, Any]
    seconds_before: float
    started: float
    noted: float


class Runner:
    """Starts the runs of a plan that have no results yet, and writes the results of those that end.

    A run is claimed by a lock on a file that its process inherits. So two runners can share a folder, and processes
    that outlive their runner, which was killed, are neither started a second time nor lost: they go on, and the next
    runner waits for them and takes what they leave.

    Args:
        runs: In order.
        config: How.
        say: Takes a line for people.

    Attributes:
        failed: Names of runs that ended with an error.
        signal: The number of the signal that stopped it, 0 for none.
    """

    def __init__(self, runs: Iterable[PlannedRun], config: RunnerConfig, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.pending = [run for run in runs if not is_done(run, config.results, config.extra)]
        self.data = {run.data: find_data(config.data_dir, run.data) for run in self.pending}
        self.jobs: list[_Job] = []
        self.failed: list[str] = []
        self.signal = 0

    def work(self) -> int:
        """Do all runs and return the exit code: 0, 1 if one failed, 128 + N after signal N.

        Raises:
            MultiExitError: The folders cannot be written.
        """
        try:
            self.config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MultiExitError(f'{self.config.output} cannot be made: {error.strerror}.') from error
        with self._listening():
            while self.jobs or (self.pending and not self.signal):
                for job in list(self.jobs):
                    self._attend(job)
                if not self.signal:
                    self._start_more()
                time.sleep(_POLL_SECONDS)
        if self.signal:
            return 128 + self.signal
        return 1 if self.failed else 0

    def _start_more(self) -> None:
        # Runs that a killed runner left behind use the machine as ours do.
        orphans = sum(map(self._is_orphan, self.pending))
        for run in list(self.pending):
            if self.signal or len(self.jobs) + orphans >= self.config.jobs:
                return
            claim = _claim(self._path(run, 'lock'))
            if claim is None:
                continue
            self.pending.remove(run)
            try:
                if is_done(run, self.config.results):
                    os.close(claim)  # by another runner, meanwhile
                    continue
                self.jobs.append(self._start(run, claim))
            except (MultiExitError, OSError) as error:
                os.close(claim)
                self._fail(run, str(error))
            if self.signal:
                self._hand_on()  # it came while the run was being started

    def _start(self, run: PlannedRun, claim: int) -> _Job:
        config, folder = self.config, self.config.output / run.name
        notes = self._check_begun(run, folder)
        notes |= {'flags': run.flags, 'extra': list(config.extra), 'runner': os.getpid()}
        process, finished = None, folder / 'results.json'
        if finished.exists():
            # Left by a process that outlived its runner.
            outlived = finished.stat().st_mtime - notes.get('begun', math.inf)
            notes['seconds'] = max(notes['seconds'], notes.get('before', 0.0) + outlived)
        else:
            notes |= {'begun': time.time(), 'before': notes['seconds']}
            flags = self._path(run, 'yaml')
            write_text(flags, run.format_flags())
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
                    pass_fds=(claim,),
                    start_new_session=True,  # a Ctrl-C comes from us, once
                )
            self.say(f'{run.name}: started, {len(self.pending)} wait, log in {self._path(run, "log")}')
        now = time.monotonic()
        return _Job(run, claim, process, notes, notes['seconds'], started=now, noted=now)

    def _check_begun(self, run: PlannedRun, folder: Path) -> dict[str, Any]:
        """Return the notes of a run, and check that what is in its folder is of the flags that are planned."""
        if not folder.exists():
            return {'seconds': 0.0}
        path = self._path(run, 'json')
        notes = _read_notes(path)
        if not {'flags', 'extra', 'seconds'} <= notes.keys():
            raise MultiExitError(f'{path} does not say of what flags {folder} is: remove that folder.')
        check_flags(run, notes['flags'], folder)
        check_extra(self.config.extra, notes['extra'], folder)
        return notes

    def _attend(self, job: _Job) -> None:
        """Note the time of a job that runs; bring one that has ended to its end."""
        code = 0 if job.process is None else job.process.poll()
        if code is None:
            if time.monotonic() - job.noted > _SECONDS_BETWEEN_NOTES:
                self._note(job)
            return
        if job.process is not None:
            self._note(job)
        self.jobs.remove(job)
        run, config = job.run, self.config
        try:
            if code == 0:
                seconds = job.notes['seconds']
                result = collect_result(run, config.output / run.name, seconds=seconds, extra=config.extra)
                write_result(config.results, run, result)
                self.say(f'{run.name}: {describe_top1(result)}, {seconds / 60:.1f} min')
            elif self.signal:
                self.say(f'{run.name}: stopped')
            else:
                self._fail(run, f'exit code {code}: {_last_line(self._path(run, "log"))}')
        except (MultiExitError, OSError) as error:
            self._fail(run, str(error))
        finally:
            os.close(job.claim)

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.failed.append(run.name)
        self.say(f'{run.name}: FAILED, {reason}')

    def _note(self, job: _Job) -> None:
        job.noted = time.monotonic()
        if job.process is not None:
            job.notes['seconds'] = round(job.seconds_before + job.noted - job.started, 1)
        try:
            write_text(self._path(job.run, 'json'), json.dumps(job.notes))
        except MultiExitError as error:
            self.say(f'{job.run.name}: its time is not noted, {error}')  # the run itself goes on

    def _path(self, run: PlannedRun, kind: str) -> Path:
        return self.config.output / f'{run.name}.{kind}'

    def _is_orphan(self, run: PlannedRun) -> bool:
        pid = _read_notes(self._path(run, 'json')).get('runner')
        return pid is not None and not _is_alive(pid) and _is_claimed(self._path(run, 'lock'))

    def _hand_on(self) -> None:
        for job in self.jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Hand SIGTERM and SIGINT on to the runs, which save and stop at the first, and end at the second."""

        def stop(number: int, frame: Any) -> None:
            self.signal = number
            self._hand_on()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def describe_top1(result: dict[str, Any]) -> str:
    """Return the accuracies of a result in one line.

    >>> describe_top1({'classifiers': [{'exit': '0', 'top-1': 61.234}, {'exit': 'main', 'top-1': 70.0}]})
    '0 61.23 main 70.00'
    """
    return ' '.join(f'{row["exit"]} {row["top-1"]:.2f}' for row in result['classifiers'])


def describe_state(run: PlannedRun, config: RunnerConfig) -> str:
    """Return 'done', 'running', 'begun' or 'planned'.

    Raises:
        MultiExitError: Its results are of other flags.
    """
    if is_done(run, config.results):
        return 'done'
    lock = config.output / f'{run.name}.lock'
    if not lock.exists():
        return 'planned'
    return 'running' if _is_claimed(lock) else 'begun'


def _claim(path: Path) -> int | None:
    """Return an open file that nobody else has locked, None if somebody has."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _is_claimed(path: Path) -> bool:
    claim = _claim(path)
    if claim is not None:
        os.close(claim)
    return claim is None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read_notes(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        notes = json.loads(path.read_text(encoding='utf-8'))
        return notes if isinstance(notes, dict) else {}
    return {}


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'nothing in its log')
