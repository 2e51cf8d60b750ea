"""`timm-multiexit publish --onnx`: programs beside the weights, and a card that says how to use them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.runs import PREPARATION, REPO, make_run, measure_run

import timm_multiexit as tme
from timm_multiexit.cli import publish
from timm_multiexit.deploy.fetch import fetch_export
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.runner import Runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    torch.manual_seed(0)
    return measure_run(make_run(tmp_path_factory.mktemp('trained'), *PREPARATION.split()))


@pytest.fixture
def call(run_script):
    """Return a function that runs the command and returns exit code, stdout and stderr."""
    return lambda *argv: run_script(publish.main, *argv)


def test_flags_that_do_not_go_together_are_one_line(call, tmp_path):
    for flags, line in (
        (['--int8'], '--int8 is for the programs of --onnx: give both.'),
        (['--onnx', '--calib-data', 'digits'], '--calib-data is for --int8: give both, or neither.'),
        (['--onnx', '--int8', '--calib-images', '0'], '--calib-images must be >= 1, got 0'),
    ):
        code, out, err = call(tmp_path, *flags)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert line in err


@pytest.mark.slow
def test_programs_are_published_used_and_taken_back(call, trained, hub, tmp_path):
    run = shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('*.pth.tar'))
    for flags, line in (
        (('--calib-images', 11), '--calib-images must be less than the 11 images of the split validation'),
        (('--calib-data', tmp_path / 'nowhere'), 'nowhere'),
    ):
        code, _, err = call(run, REPO, '--onnx', '--int8', *flags)
        assert (code, err.count('\n')) == (2, 1)
        assert line in err
        assert not (run / 'publication').exists()
    int8 = ('--int8', '--calib-images', 6, '--int8-limit', 100)
    code, out, err = call(run, REPO, '--yes', '--onnx', *int8)
    assert (code, err) == (0, '')
    assert 'On 5 held-out images:' in out
    repository = hub.repositories[REPO]
    files = {path for path in repository.find('main').files if path.startswith('onnx/')}
    names = ('exit_0', 'exit_1', 'main')
    programs = {f'{form}/{name}.onnx' for form in ('fixed', 'stages') for name in names} | {'conditional.onnx'}
    papers = {'onnx/manifest.json', 'onnx/runner.py'}
    assert files == papers | {f'onnx/{below}{name}' for below in ('', 'int8/') for name in programs}

    # What comes back answers as the model does.
    fetch_export(REPO, tmp_path / 'net')
    manifest = read_manifest(tmp_path / 'net')
    assert manifest['classes'] == ['cat', 'dog']
    assert manifest['preprocessing']['mean'] == [0.4, 0.5, 0.6]
    model = tme.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    images = torch.randn(5, 3, 32, 32)
    answer, expected = Runner(tmp_path / 'net').infer(images.numpy()), model.infer(images)
    np.testing.assert_array_equal(answer.exit_idx, expected.exit_idx)
    np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-4)
    assert Runner(tmp_path / 'net', 'int8').infer(images.numpy()).logits.shape == (5, 2)

    # The card says it from metrics.json alone, and its commands run.
    metrics = json.loads(hub.content(repository.find('main').files['metrics.json']))
    assert metrics['onnx']['int8']['images'] == 5
    card = hub.content(repository.find('main').files['README.md']).decode()
    section = card[card.index('## Without PyTorch') : card.index('## Training')]
    assert f'hf download {REPO} --include "onnx/*" --local-dir net' in section
    assert "Runner('net/onnx', precision='int8')" in section
    rows = re.findall(r'^\| `(\w+)` \| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|$', section, re.MULTILINE)
    assert [row[0] for row in rows] == ['0', '1', 'main']
    sizes = [manifest['files'][f'fixed/{name}.onnx']['size'] / 1e3 for name in names]
    assert [float(row[1]) for row in rows] == pytest.approx(sizes, abs=0.06)
    assert [float(row[4]) for row in rows] == pytest.approx(manifest['int8']['top1']['int8'], abs=0.01)

    # Without --onnx they would be those of other weights one day: they go, and what others put there stays.
    hub.add(REPO, {'onnx/model.onnx': b'of others'})
    code, out, _ = call(run, REPO, '--yes')
    assert code == 0
    assert {path for path in repository.find('main').files if path.startswith('onnx/')} == {'onnx/model.onnx'}
    assert 'Without PyTorch' not in hub.content(repository.find('main').files['README.md']).decode()
