"""`export`: the folder, what its programs compute, and what is refused before anything is written."""

import logging
import re
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import cases
from torch import nn

import timm_multiexit as tme
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.runner import Runner

FILES = {f'{form}/{name}.{ending}' for form in ('fixed', 'stages') for name in ('exit_0', 'exit_1', 'exit_2', 'main')
         for ending in ('onnx', 'pt2')} | {'conditional.onnx', 'runner.py', 'manifest.json'}  # fmt: skip


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def tiny():
    """Two convolutions of a module that is not timm's."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return tme.attach_exits(module, ['0'], input_size=(3, 16, 16), head='linear')


def test_folder_has_all_programs(exported):
    model, folder = exported.model, exported.folder
    manifest = read_manifest(folder)
    assert files(folder) == FILES
    assert set(manifest['files']) == FILES - {'manifest.json'}
    names = ['exit_0', 'exit_1', 'exit_2', 'main']
    assert manifest['programs'] == {
        'fp32': {
            'fixed': [f'fixed/{name}.onnx' for name in names],
            'stages': [f'stages/{name}.onnx' for name in names],
            'conditional': {'path': 'conditional.onnx', 'criterion': 'margin', 'combine': 'mean'},
        }
    }
    assert manifest['pt2'] == {form: [f'{form}/{name}.pt2' for name in names] for form in ('fixed', 'stages')}
    assert manifest['policy'] == model.policy.to_dict()
    assert manifest['classes'][3] == 'class 3'


@pytest.mark.parametrize('batch', [1, 2, 7])
def test_programs_say_what_the_model_says(exported, open_program, batch):
    model, folder = exported.model, exported.folder
    images = torch.randn(batch, 3, 64, 64)
    with torch.no_grad():
        expected = [logits.numpy() for logits in model(images, exits=True).logits]
    feed = {'image': images.numpy()}
    for idx, name in enumerate(('exit_0', 'exit_1', 'exit_2', 'main')):
        scale = np.abs(expected[idx]).max()
        alone = open_program(str(folder / f'fixed/{name}.onnx'))
        assert [value.name for value in alone.get_inputs()] == ['image']
        assert np.abs(alone.run(None, {'image': images.numpy()})[0] - expected[idx]).max() <= 1e-5 * scale
        stage = open_program(str(folder / f'stages/{name}.onnx'))
        found = dict(zip([value.name for value in stage.get_outputs()], stage.run(None, feed)))
        assert np.abs(found.pop('logits') - expected[idx]).max() <= 1e-5 * scale
        feed = found
        for form in ('fixed', 'stages'):
            torch.export.load(folder / f'{form}/{name}.pt2')


def test_runner_answers_as_the_model(exported):
    model, folder = exported.model, exported.folder
    images = torch.randn(6, 3, 64, 64)
    expected = model.infer(images)
    found = Runner(folder).infer(images.numpy())
    assert found.exit_idx.tolist() == expected.exit_idx.tolist()
    torch.testing.assert_close(torch.from_numpy(found.logits), expected.logits, rtol=1e-4, atol=1e-5)


def test_model_stays_as_it_is_and_a_module_of_ones_own_is_exported(tiny, tmp_path, open_program):
    tiny.train().to(torch.float64)
    tiny.backbone[1].eval()
    modes = [module.training for module in tiny.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in tiny.modules()]
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    grads = [param.requires_grad for param in tiny.parameters()]
    levels = logging.getLogger('torch.onnx').level
    tme.export(tiny, tmp_path / 'net', forms=['stages'])
    assert [module.training for module in tiny.modules()] == modes
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in tiny.modules()] == hooks
    assert [param.requires_grad for param in tiny.parameters()] == grads
    assert all(value.equal(state[key]) for key, value in tiny.state_dict().items())
    assert logging.getLogger('torch.onnx').level == levels
    manifest = read_manifest(tmp_path / 'net')
    assert files(tmp_path / 'net') == {'stages/exit_0.onnx', 'stages/main.onnx', 'runner.py', 'manifest.json'}
    assert manifest['name'] == 'Sequential'
    assert manifest['programs']['fp32']['conditional'] is None
    image = torch.randn(1, 3, 16, 16)
    logits, state = open_program(str(tmp_path / 'net/stages/exit_0.onnx')).run(None, {'image': image.numpy()})
    with torch.no_grad():
        expected = tiny.eval()(image.double(), exits=True).logits
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-5)
    last = open_program(str(tmp_path / 'net/stages/main.onnx'))
    np.testing.assert_allclose(last.run(None, {'state_0_0': state})[0], expected[1], rtol=1e-4, atol=1e-5)


def test_earlier_export_is_replaced_and_other_folders_stay(tiny, tmp_path):
    folder = tmp_path / 'net'
    tme.export(tiny, folder, formats=['pt2'], forms=['fixed', 'stages'])
    assert len(files(folder)) == 6
    tme.export(tiny, folder, formats=['pt2'], forms=['fixed'])
    assert files(folder) == {'fixed/exit_0.pt2', 'fixed/main.pt2', 'runner.py', 'manifest.json'}
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('mine')
    with pytest.raises(tme.MultiExitError, match='mine holds other files, such as notes.txt: give another folder'):
        tme.export(tiny, tmp_path / 'mine', formats=['pt2'])
    assert files(tmp_path / 'mine') == {'notes.txt'}
    (folder / 'server.py').write_text('mine')
    with pytest.raises(tme.MultiExitError, match='net holds other files, such as server.py: give another folder'):
        tme.export(tiny, folder, formats=['pt2'])
    assert len(files(folder)) == 5
    assert {path.name for path in tmp_path.iterdir()} == {'net', 'mine'}


class Odd(nn.Module):
    """Looks at the numbers of the image, which no trace can follow."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        if not x.is_meta and x.sum() > 0:
            x = -x
        return self.fc(self.second(x).mean((2, 3)))


def test_backbone_that_cannot_be_exported_is_one_line(tmp_path):
    model = tme.attach_exits(Odd(), ['first'], input_size=(3, 8, 8), classifier='fc', head='linear')
    with pytest.raises(tme.MultiExitError) as raised:
        tme.export(model, tmp_path / 'net')
    assert re.fullmatch(r'Odd cannot be exported: torch\.export says .+\.', str(raised.value))
    assert list(tmp_path.iterdir()) == []


def plain():
    return timm.create_model('test_resnet', num_classes=3)


REFUSED = {
    'a plain timm model': ({'model': plain}, TypeError, 'model must be a MultiExitModel, got ResNet. attach_exits'),
    'no path': ({'folder': 3}, TypeError, 'folder must be a path, got 3.'),
    'an unknown form': ({'forms': ['whole']}, ValueError, 'forms must be one of fixed, stages, conditional, got'),
    'one text for forms': ({'forms': 'fixed'}, TypeError, 'forms must be a list of fixed, stages, conditional, got'),
    'no forms': ({'forms': []}, ValueError, 'forms must be one or more of fixed, stages, conditional, got none.'),
    'an unknown format': ({'formats': ['tflite']}, ValueError, "formats must be one of onnx, pt2, got 'tflite'."),
    'a conditional pt2': (
        {'forms': ['conditional'], 'formats': ['pt2']},
        ValueError,
        'forms must have fixed or stages for the format pt2, got conditional alone: torch.export traces one path',
    ),
    'a conditional pt2 beside ONNX': (
        {'forms': ['conditional'], 'formats': ['onnx', 'pt2']},
        ValueError,
        'forms must have fixed or stages for the format pt2, got conditional alone: torch.export traces one path',
    ),
    'two sizes': ({'input_size': (16, 16)}, ValueError, 'input_size must be (channels, height, width), integers >= 1'),
    'other channels': ({'input_size': (1, 16, 16)}, ValueError, 'input_size must be (3, height, width) for this model'),
    'too small images': (
        {'input_size': (3, 2, 2)},
        ValueError,
        'input_size must be one that the model takes, got [3, 2, 2]: ',
    ),
    'too few names': ({'class_names': ['a']}, ValueError, 'class_names must be 3, one per class, got 1.'),
    'numbers as names': ({'class_names': [1, 2, 3]}, TypeError, 'class_names must be a list of texts, got [1, 2, 3].'),
    'a dict for a policy': ({'policy': {}}, TypeError, 'policy must be an ExitPolicy, got dict.'),
    'thresholds of another model': (
        {'policy': tme.ExitPolicy('confidence', (0.5, 0.5))},
        ValueError,
        'The policy must have one threshold for each of the 1 exits of the model, got 2.',
    ),
}


@pytest.mark.parametrize(('changed', 'kind', 'message'), cases(REFUSED))
def test_wrong_arguments_are_one_line_and_nothing_is_written(tiny, tmp_path, changed, kind, message):
    given = {'model': lambda: tiny, 'folder': tmp_path / 'net', **changed}
    model, folder = given.pop('model')(), given.pop('folder')
    with pytest.raises(tme.MultiExitError, match=re.escape(message)) as raised:
        tme.export(model, folder, **given)
    assert isinstance(raised.value, kind)
    assert '\n' not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_models_without_exits_classes_or_data_are_refused(tiny, tmp_path):
    none = tme.MultiExitModel(plain(), [])
    with pytest.raises(tme.StateError, match='must have exits and 2 or more classes to be exported, got 0 and 3'):
        tme.export(none, tmp_path / 'net')
    with torch.device('meta'):
        empty = tme.attach_exits(plain(), [1], input_size=(3, 64, 64))
    with pytest.raises(tme.StateError, match='must have data, got weights on the meta device'):
        tme.export(empty, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_extra_is_named(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(tme.StateError, match=re.escape('pip install "timm-multiexit[onnx]"')):
        tme.export(tiny, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


def test_programs_do_not_depend_on_what_the_caller_has_set(make_model, tmp_path):
    model = make_model().eval()
    images = torch.randn(2, 3, 64, 64)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device('meta'), torch.autocast('cpu', torch.bfloat16):
            tme.export(model, tmp_path / 'net', forms=['fixed'])
    finally:
        torch.set_default_dtype(before)
    found = Runner(tmp_path / 'net')(images.numpy(), 0)
    torch.testing.assert_close(torch.from_numpy(found), model(images, exit_idx=0).detach(), rtol=1e-4, atol=1e-5)
