"""timm's own tests pass on models with exits. Marker `compat`: it fetches timm's sdist, where they are.

Not run, since they cannot apply:

- encoders without a classifier and `features_only` models (test_model_forward_features, test_features_*): there is
  nothing that an exit could be an early answer of;
- test_prune_*, test_*_pruned_*: pruning removes blocks that exits and main read;
- *_torchscript: TorchScript compiles neither hooks nor keyword-only arguments;
- test_model_load_pretrained, test_model_inference: they load weights from the Hub;
- tests of one family's inside (test_naflexvit_*, test_swin_family_*, ...): they read modules that a wrapped model has
  one level below.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import timm
from compat.timm_suite import TESTS

pytestmark = pytest.mark.compat

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def timm_tests(request):
    """The folder of timm's tests, of the installed version; kept in pytest's cache."""
    folder = request.config.cache.mkdir('timm-sdist') / timm.__version__
    if not folder.exists():
        command = [
            'uv',
            'tool',
            'run',
            'pip',
            'download',
            f'timm=={timm.__version__}',
            '--no-deps',
            '--no-binary',
            'timm',
        ]
        subprocess.run([*command, '--dest', folder.parent], check=True)
        (path,) = folder.parent.glob(f'timm-{timm.__version__}.tar.gz')
        with tarfile.open(path) as archive:
            members = [member for member in archive.getmembers() if member.name.split('/')[1:2] == ['tests']]
            archive.extractall(folder, members, filter='data')
    return next(folder.glob('*/tests'))


@pytest.fixture(scope='module')
def outcomes(timm_tests, tmp_path_factory):
    """What became of each test of timm: (test, network) -> 'passed', 'skipped' or a message."""
    folder = tmp_path_factory.mktemp('timm')
    options = ['-p', 'compat.timm_suite', '--import-mode=importlib', '-c', os.devnull, '-o', f'cache_dir={folder}']
    report = folder / 'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', *options, f'--junitxml={report}', timm_tests / 'test_models.py']
    # Not from the repository's root, whose settings are for its own tests.
    environment = {**os.environ, 'PYTHONPATH': str(FOLDER), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = {}
    for case in ET.parse(report).iter('testcase'):
        test, _, parameters = case.get('name').partition('[')
        problem = next(iter(case), None)
        name = parameters.rstrip(']').removeprefix('1-').removeprefix('2-')
        found[test, name] = 'passed' if problem is None else f'{problem.tag}: {problem.get("message")}'
    return found


@pytest.mark.parametrize('test', TESTS)
def test_timms_own_test_passes_on_models_with_exits(outcomes, test):
    wrong = {name: outcome for (kind, name), outcome in outcomes.items() if kind == test and outcome != 'passed'}
    assert wrong == {}


def test_fifty_networks_are_tried(outcomes):
    counts = Counter(test for test, _ in outcomes)
    assert counts['test_model_forward'] >= 50
    assert counts['test_model_backward'] >= 50
    assert counts['test_model_default_cfgs'] + counts['test_model_default_cfgs_non_std'] >= 50
