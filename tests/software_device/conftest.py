"""Runs each file of this folder in a process of its own: a device that is registered with torch stays registered."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import software_device

VARIABLE = 'SOFTWARE_DEVICE_REPORTS'  # in the processes of the files: where to write what tests report
RESULTS = pytest.StashKey()


class ReportWriter:
    """Writes every report of a test as a line of JSON."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[VARIABLE], 'a') as file:
            file.write(json.dumps(data) + '\n')


def pytest_configure(config):
    if VARIABLE in os.environ:
        config.pluginmanager.register(ReportWriter(config))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Report what the test did in the process of its file, in place of running it here."""
    if VARIABLE in os.environ or item.path.parent != Path(__file__).parent:
        return None
    results = item.session.stash.setdefault(RESULTS, {})
    if item.path not in results:
        results[item.path] = run_file(item)
    reports, output = results[item.path]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports.get(item.nodeid) or [report_crash(item, output)]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run_file(item):
    """Run the chosen tests of the item's file; return their reports, {nodeid: [report]}, and what pytest printed."""
    config = item.config
    nodeids = [other.nodeid for other in item.session.items if other.path == item.path]
    command = (sys.executable, '-m', 'pytest', '-n', '0', '-m', '', '-p', 'no:cacheprovider', *nodeids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'reports.jsonl'
        path.touch()
        result = subprocess.run(
            command, cwd=config.rootpath, env={**os.environ, VARIABLE: str(path)}, capture_output=True, text=True
        )
        lines = path.read_text().splitlines()
    reports = {}
    for line in lines:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        reports.setdefault(report.nodeid, []).append(report)
    return reports, result.stdout + result.stderr


def report_crash(item, output):
    """Return the report of a test whose process ended before it."""
    text = f'The process of this file ended without a report of the test:\n{output[-4000:]}'
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), 'failed', text, 'call')


@pytest.fixture(scope='session')
def device():
    """The software device; the test is skipped where it cannot be built."""
    obstacle = software_device.find_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    return software_device.device()
