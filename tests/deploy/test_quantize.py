"""int8 programs: cut from one quantized whole, which they equal; what they cost is said, and limited."""

import json
import shutil
import signal
import tempfile
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.exported import CLASSES, SIZE, make_exported, write_manifest

import timm_multiexit as tme
from timm_multiexit.deploy import quantize as module
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.quantize import _join, quantize
from timm_multiexit.deploy.runner import Runner
from timm_multiexit.utils.errors import DiskError, InvalidValueError

NAMES = ('exit_0', 'exit_1', 'exit_2', 'main')
POLICY = {'criterion': 'confidence', 'thresholds': [0.5, None, 0.6], 'temperatures': [], 'combine': 'mean'}


def draw_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, *SIZE)) + rng.normal(size=(count, SIZE[0], 1, 1))).astype(np.float32)


def load(count, seed, runner):
    """Batches of images with the classes that the network itself would say, most of the time."""
    images = draw_images(count, seed)
    targets = runner(images).argmax(-1)
    targets[::7] = (targets[::7] + 1) % len(CLASSES)
    return list(zip(torch.from_numpy(images).split(20), torch.from_numpy(targets).split(20)))


@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
    """A folder with int8 programs, and what `quantize` said; nobody changes it."""
    budgets = [{'macs': 400 + 100 * idx, 'accuracy': 80.0 + idx, 'policy': POLICY} for idx in range(2)]
    own = {**POLICY, 'criterion': 'margin'}
    folder = make_exported(tmp_path_factory.mktemp('quantized'), policy=own, budgets=budgets)
    runner = Runner(folder)
    return folder, quantize(folder, load(60, 1, runner), load(200, 2, runner), limit=5)


def chain(folder, precision, images):
    return [logits for _, logits in Runner(folder, precision).anytime(images)]


def test_chain_is_the_whole_exactly_and_its_states_are_bytes(quantized):
    folder, _ = quantized
    paths = [folder / f'int8/stages/{name}.onnx' for name in NAMES]
    whole = onnxruntime.InferenceSession(_join(paths).SerializeToString(), providers=['CPUExecutionProvider'])
    for size in (1, 2, 7):
        images = draw_images(size, 3)
        found = chain(folder, 'int8', images)
        assert len(found) == 4
        for one, other in zip(whole.run(None, {'image': images}), found):
            np.testing.assert_array_equal(one, other)
    for path in paths[1:]:
        kinds = [value.type.tensor_type.elem_type for value in onnx.load(path).graph.input]
        assert kinds == [onnx.TensorProto.UINT8] * 2
    weights = [value for path in paths for value in onnx.load(path).graph.initializer if value.data_type == 3]
    assert weights  # int8
    assert all(np.abs(onnx.numpy_helper.to_array(value)).max() <= 64 for value in weights)  # of 7 bits


def test_answers_are_near_and_batches_do_not_matter(quantized):
    folder, _ = quantized
    images = draw_images(30, 4)
    before, after = chain(folder, 'fp32', images), chain(folder, 'int8', images)
    for one, other in zip(before, after):
        assert 0 < np.abs(one - other).mean() < 0.05 * np.abs(one).mean()
    runner = Runner(folder, 'int8')
    np.testing.assert_array_equal(after[-1][3:4], chain(folder, 'int8', images[3:4])[-1])
    answer = runner.infer(images, POLICY)
    expected = tme.apply_policy(tme.ExitPolicy.from_dict(POLICY), [torch.from_numpy(single) for single in after])
    np.testing.assert_array_equal(answer.exit_idx, expected.exit_idx)
    assert len(set(answer.exit_idx.tolist())) == 3


def test_manifest_says_what_it_costs(quantized):
    folder, result = quantized
    manifest = read_manifest(folder)
    images = np.concatenate([batch.numpy() for batch, _ in load(200, 2, Runner(folder))])
    targets = np.concatenate([batch.numpy() for _, batch in load(200, 2, Runner(folder))])
    assert manifest['int8']['images'] == result.images == 200
    assert manifest['int8']['limit'] == 5
    own = {**POLICY, 'criterion': 'margin'}
    for precision, top1 in (('fp32', result.fp32), ('int8', result.int8)):
        by_hand = [100 * (logits.argmax(-1) == targets).mean() for logits in chain(folder, precision, images)]
        assert list(top1) == manifest['int8']['top1'][precision] == pytest.approx(by_hand)
        runner = Runner(folder, precision)
        answers = [runner.infer(images, policy).logits for policy in (POLICY, POLICY, own)]
        by_hand = [100 * (answer.argmax(-1) == targets).mean() for answer in answers]
        assert [row[precision] for row in manifest['int8']['policies']] == pytest.approx(by_hand)
    assert result.fp32 != result.int8
    # Each head has 10 MACs; the own policy does not use that of exit 1.
    exit_idx = Runner(folder).infer(images, own).exit_idx
    costs = np.array([250, 500, 760, 1020])[exit_idx]
    assert [row['macs'] for row in manifest['int8']['policies']] == [400, 500, pytest.approx(costs.mean())]
    assert set(exit_idx) == {0, 2, 3}
    assert manifest['versions']['onnxruntime'] == onnxruntime.__version__
    assert manifest['programs']['int8']['stages'] == [f'int8/stages/{name}.onnx' for name in NAMES]
    assert sorted(path.name for path in folder.iterdir()) == ['int8', 'manifest.json', 'stages']


def test_second_quantization_replaces_the_first(quantized, tmp_path):
    folder = shutil.copytree(quantized[0], tmp_path / 'copy')
    runner = Runner(folder)
    quantize(folder, load(40, 5, runner), load(50, 6, runner), limit=100)
    assert read_manifest(folder)['int8']['images'] == 50


def test_disk_that_fills_up_while_int8_is_replaced_costs_int8_alone(quantized, tmp_path, monkeypatch):
    folder = shutil.copytree(quantized[0], tmp_path / 'copy')
    runner = Runner(folder)
    images = draw_images(3)
    before, write, calls = runner(images), module.write_manifest, []

    def refuse(*args):
        calls.append(args)
        if len(calls) == 2:
            raise DiskError('No space left on device.')
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, 'write_manifest', refuse)
        with pytest.raises(DiskError, match='No space'):
            quantize(folder, load(40, 5, runner), load(50, 6, runner), limit=100)
    assert read_manifest(folder)['int8'] is None
    np.testing.assert_array_equal(Runner(folder)(images), before)
    quantize(folder, load(40, 5, runner), load(50, 6, runner), limit=100)
    assert read_manifest(folder)['int8']['images'] == 50


def test_loss_above_the_limit_is_refused_and_nothing_is_written(quantized, tmp_path):
    folder = make_exported(tmp_path / 'exported')
    runner, before = Runner(folder), (folder / 'manifest.json').read_bytes()
    calibration = [(torch.zeros(4, *SIZE) + 1e-6, torch.zeros(4, dtype=torch.int64))]  # ranges that fit no image
    with pytest.raises(tme.MultiExitError) as caught:
        quantize(folder, calibration, load(100, 2, runner))
    line = str(caught.value)
    assert line.startswith('int8 programs must lose at most 1 points of accuracy, got ')
    assert 'so no int8 program was written' in line
    assert '\n' not in line
    assert (folder / 'manifest.json').read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ['manifest.json', 'stages']


@pytest.mark.parametrize('limit', [100, 9000])
def test_full_disk_is_one_line_and_nothing_is_written(tmp_path, limit):
    resource = pytest.importorskip('resource')
    folder = make_exported(tmp_path / 'exported')
    runner, before = Runner(folder), (folder / 'manifest.json').read_bytes()
    batches = load(40, 5, runner), load(50, 6, runner)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(DiskError) as caught:
            quantize(folder, *batches, limit=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, previous)
    line = 'could not be written: File too large; free disk space, then run it again.'
    assert str(caught.value) == f'{tempfile.gettempdir()} {line}'
    assert (folder / 'manifest.json').read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ['manifest.json', 'stages']


def test_full_disk_is_told_from_a_network_that_cannot_be_quantized(tmp_path, monkeypatch):
    folder = make_exported(tmp_path / 'exported')
    batches = load(40, 5, Runner(folder)), load(50, 6, Runner(folder))

    def refuse(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(module, 'write_programs', refuse)
        with pytest.raises(DiskError, match=f'^{folder} could not be written: No space left on device; free disk'):
            quantize(folder, *batches, limit=100)

    def fail(*args, **kwargs):
        raise RuntimeError('Wire format was corrupt')  # what half a file gives

    monkeypatch.setattr('onnxruntime.quantization.quantize_static', fail)
    with pytest.raises(InvalidValueError, match='cannot be quantized: ONNX Runtime says Wire format was corrupt'):
        quantize(folder, *batches, limit=100)
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=0))
    with pytest.raises(DiskError, match='could not be written: No space left on device; free disk space'):
        quantize(folder, *batches, limit=100)
    assert sorted(path.name for path in folder.iterdir()) == ['manifest.json', 'stages']


def test_bad_input_is_one_line(quantized, tmp_path):
    folder = make_exported(tmp_path / 'exported')
    good = load(20, 1, Runner(folder))
    wrong_size, far_class = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())], [(good[0][0], good[0][1] + 5)]
    for arguments, kwargs, line in (
        ((folder, [], good), {}, 'loader of calibration images is empty'),
        ((folder, good, []), {'limit': 100}, 'loader of held-out images is empty'),
        ((folder, wrong_size, good), {}, r'Images must be \[3, 8, 10\], as those of the exported network, got'),
        ((folder, good, wrong_size), {}, r'Images must be \[3, 8, 10\]'),
        ((folder, good, far_class), {}, r'Class indices must be in \[0, 4\]'),
        ((folder, good, good), {'limit': -1}, r'limit must be in \[0, 100\]'),
        ((tmp_path / 'none', good, good), {}, 'is not an exported folder'),
        ((5, good, good), {}, 'folder must be a path'),
    ):
        with pytest.raises(tme.MultiExitError, match=line) as caught:
            quantize(*arguments, **kwargs)
        assert '\n' not in str(caught.value)
    manifest = json.loads((folder / 'manifest.json').read_text())
    programs = manifest['programs']['fp32']
    programs.update(fixed=programs['stages'], stages=[])
    write_manifest(folder, manifest)
    with pytest.raises(tme.MultiExitError, match='has no stages, of which int8 programs are made'):
        quantize(folder, good, good)
    (folder / 'stages/main.onnx').write_bytes(b'')
    with pytest.raises(tme.MultiExitError, match=r'main\.onnx must have'):
        quantize(folder, good, good)


@pytest.mark.slow
def test_all_forms_of_a_real_network_agree(make_model, tmp_path):
    model, folder = make_model('test_resnet', [0, 2]).eval(), tmp_path / 'net'
    model.policy = tme.ExitPolicy('margin', (0.1, 0.2), combine='geometric')
    tme.export(model, folder)
    images = torch.randn(24, 3, 64, 64)
    with torch.no_grad():
        targets = model(images).argmax(-1)
    quantize(folder, [(images, targets)], [(images, targets)], limit=100)
    runner = Runner(folder, 'int8')
    stages = [folder / path for path in read_manifest(folder)['programs']['int8']['stages']]
    whole = onnxruntime.InferenceSession(_join(stages).SerializeToString(), providers=['CPUExecutionProvider'])
    for size in (1, 2, 7):
        part = images[:size].numpy()
        found = [logits for _, logits in runner.anytime(part)]
        for idx, logits in enumerate(whole.run(None, {'image': part})):
            np.testing.assert_array_equal(logits, found[idx])
            np.testing.assert_allclose(runner(part, exit_idx=idx), logits, rtol=1e-5, atol=1e-5)
    shares = [torch.from_numpy(logits).softmax(-1).topk(2).values for _, logits in runner.anytime(images.numpy())]
    medians = [float((single[:, 0] - single[:, 1]).median()) for single in shares[:2]]
    policy = {'criterion': 'margin', 'combine': 'geometric', 'thresholds': medians}
    answer = runner.infer(images.numpy(), policy)
    runner._programs = {**runner._programs, 'stages': []}  # so that the conditional program answers
    each = runner.infer(images.numpy(), policy)
    np.testing.assert_array_equal(each.exit_idx, answer.exit_idx)
    np.testing.assert_allclose(each.logits, answer.logits, rtol=1e-4, atol=1e-5)
    assert len(set(answer.exit_idx.tolist())) > 1
