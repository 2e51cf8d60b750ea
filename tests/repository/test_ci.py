"""The workflow of the repository's host and `.ci/run` are the same checks."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]

SCRIPT = (ROOT / '.ci/run').read_text()
WORKFLOW = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())


def is_check(command):
    return command.startswith(('uv run ', 'uv tool install ', 'pip install ', 'npm ', 'OMP_NUM_THREADS='))


def test_workflow_runs_the_commands_of_the_script():
    script = {re.sub(r'\s+# .*', '', line.strip()) for line in SCRIPT.splitlines()}
    steps = [step['run'] for job in WORKFLOW['jobs'].values() for step in job['steps'] if 'run' in step]
    assert {command for command in steps if is_check(command)} == {line for line in script if is_check(line)}


def test_every_job_waits_for_lint_but_lint():
    jobs = WORKFLOW['jobs']
    assert {name for name, job in jobs.items() if 'needs' not in job} == {'lint'}
    nightly = {name for name, job in jobs.items() if 'if' in job}
    assert nightly == {'slow', 'hub', 'page', 'zoo'}


def test_hooks_before_a_commit_are_the_checks_of_lint():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    assert [repo['repo'] for repo in hooks] == ['local']
    entries = {hook['entry'].replace('--fix ', '').replace('format', 'format --check') for hook in hooks[0]['hooks']}
    lint = {step['run'].removesuffix(' .') for step in WORKFLOW['jobs']['lint']['steps'] if 'run' in step}
    assert entries == lint - {'pip install uv'}
