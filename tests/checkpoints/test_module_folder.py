"""Folders of models around modules that are not timm's: what is in them, the way back, and what is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from helpers import cases, enliven
from helpers.members import assert_same_answers
from torch import nn

import timm_multiexit as tme
from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, InvalidValueError, MissingFileError

SIZE = (3, 16, 16)


def build(width=8, num_classes=4):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, num_classes)).eval()


def attach(exits=('3', '5'), **kwargs):
    torch.manual_seed(0)
    model = tme.attach_exits(enliven(build(**kwargs)), list(exits), input_size=SIZE).eval()
    enliven(model.exits)
    return model


@pytest.fixture
def folder(tmp_path):
    tme.save_pretrained(attach(), tmp_path / 'model', data_config={'mean': (0.5, 0.5, 0.5)}, label_names=list('abcd'))
    return tmp_path / 'model'


def edit(folder, change):
    path = folder / 'config.json'
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_config_says_what_the_module_has_to_be_and_names_no_architecture(folder):
    values = json.loads((folder / 'config.json').read_text())
    assert set(values) == {'num_classes', 'pretrained_cfg', 'label_names', 'multiexit'}
    assert values['pretrained_cfg'] == {'input_size': [3, 16, 16], 'mean': [0.5, 0.5, 0.5]}
    assert values['label_names'] == ['a', 'b', 'c', 'd']
    assert values['multiexit']['module'] == {
        'type': 'torch.nn.modules.container.Sequential',
        'classifiers': ['8'],
        'num_classes': 4,
        'input_size': [3, 16, 16],
    }
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'exits.safetensors', 'model.safetensors']
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    assert state.keys() == build().state_dict().keys()


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_model_comes_back_equal_with_policy_and_budgets(tmp_path, train):
    model, x = attach(), torch.randn(6, *SIZE)
    model.calibrate([(x, torch.arange(6) % 4)], budget='90%')
    tme.save_pretrained(model, tmp_path / 'model')
    loaded = tme.load_exits(build().train(train), tmp_path / 'model')
    assert loaded.training == loaded.exits.training == train
    assert (loaded.policy, loaded.budgets) == (model.policy, model.budgets)
    assert (loaded.input_size, loaded.module_info) == (model.input_size, model.module_info)
    assert_same_answers(loaded.eval(), model, x)
    assert torch.equal(loaded.infer(x).exit_idx, model.infer(x).exit_idx)


def test_dropout_of_the_heads_is_the_modules_unless_given(folder):
    module = build()
    module.drop_rate = 0.25
    assert [head.drop.p for head in tme.load_exits(module, folder).exits] == [0.25, 0.25]
    assert [head.drop.p for head in tme.load_exits(build(), folder).exits] == [0.0, 0.0]
    assert [head.drop.p for head in tme.load_exits(build(), folder, drop_rate=0.5).exits] == [0.5, 0.5]
    with pytest.raises(InvalidValueError, match='drop_rate must be'):
        tme.load_exits(build(), folder, drop_rate=2)


def test_half_precision_comes_back_in_the_modules_dtype(tmp_path):
    model, x = attach().to(torch.bfloat16), torch.randn(2, *SIZE)
    tme.save_pretrained(model, tmp_path / 'model')
    loaded = tme.load_exits(build().to(torch.bfloat16), tmp_path / 'model')
    assert torch.equal(loaded(x.bfloat16(), exit_idx=0), model(x.bfloat16(), exit_idx=0))
    assert {param.dtype for param in loaded.parameters()} == {torch.bfloat16}


def test_model_without_exits_left_comes_back(tmp_path):
    model, x = attach(), torch.randn(2, *SIZE)
    model.drop_exits([0, 1])
    tme.save_pretrained(model, tmp_path / 'model')
    loaded = tme.load_exits(build(), tmp_path / 'model')
    assert len(loaded.exits) == 0
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ('change', 'message'),
    cases(
        {
            'architecture': (lambda v: v['multiexit'].pop('module'), "it is not of a module of one's own"),
            'module': (lambda v: v['multiexit'].update(module=[1]), r'module must be an object, got \[1\]'),
            'names': (
                lambda v: v['multiexit']['module'].update(classifiers='8'),
                'classifiers must be lists of 1 to 8',
            ),
            'no such classifier': (
                lambda v: v['multiexit']['module'].update(classifiers=['fc']),
                "classifier must name a module of Sequential, got 'fc'",
            ),
            'classes': (
                lambda v: v['multiexit']['module'].update(num_classes=True),
                r'num_classes must be integers in',
            ),
            'many classes': (
                lambda v: v['multiexit']['module'].update(num_classes=9),
                'must be that of Sequential, 4, got 9',
            ),
            'size': (lambda v: v['multiexit']['module'].update(input_size=[3, 10**6, 16]), 'input_size must be'),
            'format': (lambda v: v['multiexit'].update(format_version=2), 'multi-exit format 2'),
            'place': (lambda v: v['multiexit']['exits'][0].update(module='99'), "has no module '99'"),
            'no map': (lambda v: v['multiexit']['exits'][0].update(module='8'), 'neither a map nor a grid'),
            'channels': (lambda v: v['multiexit']['exits'][0].update(channels=9), 'channels of the exit at 3 must be'),
            'order': (lambda v: v['multiexit']['exits'].reverse(), 'in order, shallow to deep'),
            'huge': (lambda v: v['multiexit']['exits'][0].update(widths=[16384, 16384]), 'does not fit this model'),
        }
    ),
)
def test_configuration_that_does_not_fit_is_refused_and_changes_nothing(folder, change, message):
    edit(folder, change)
    module = build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        tme.load_exits(module, folder)
    assert '\n' not in str(error.value)
    assert str(folder) in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_weights_of_another_module_are_refused(folder):
    with pytest.raises(CheckpointError, match='channels of the exit at 3 must be that of Sequential, 16, got 8'):
        tme.load_exits(build(width=16), folder)
    with pytest.raises(CheckpointError, match='num_classes must be that of Sequential, 5, got 4'):
        tme.load_exits(build(num_classes=5), folder)
    wider = build()
    wider.append(nn.Identity()).register_buffer('seen', torch.zeros(1))
    with pytest.raises(CheckpointError, match=r'model.safetensors does not fit this model: 1 weights are missing'):
        tme.load_exits(wider, folder)


@pytest.mark.parametrize('name', ['model.safetensors', 'exits.safetensors'])
def test_broken_weights_are_refused_before_the_module_changes(folder, name):
    tensors = safetensors.torch.load_file(folder / name)
    key = next(key for key, tensor in tensors.items() if tensor.is_floating_point() and key.endswith('weight'))
    tensors[key].view(-1)[0] = float('inf')
    safetensors.torch.save_file(tensors, folder / name)
    module = build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=f'{name} contains NaN or inf, at {key}'):
        tme.load_exits(module, folder)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f'has no {name}'):
        tme.load_exits(module, folder)


def test_what_is_no_module_or_folder_is_refused(folder, tmp_path):
    with pytest.raises(MissingFileError, match='is not a model folder'):
        tme.load_exits(build(), tmp_path / 'nowhere')
    with pytest.raises(InvalidTypeError, match='the class Sequential'):
        tme.load_exits(nn.Sequential, folder)
    with pytest.raises(InvalidValueError, match='got a MultiExitModel'):
        tme.load_exits(attach(), folder)


def test_folders_of_timms_models_and_of_modules_name_the_way_to_load_the_other(folder, make_model, tmp_path):
    tme.save_pretrained(make_model(), tmp_path / 'timm')
    with pytest.raises(CheckpointError, match=r"create_model\('local-dir:FOLDER', pretrained=True\) loads timm models"):
        tme.load_exits(build(), tmp_path / 'timm')
    shutil.copytree(folder, tmp_path / 'copy')
    for pretrained in (False, True):
        with pytest.raises(
            CheckpointError, match=r'create, torch.nn.modules.container.Sequential: build it, and call timm_mu'
        ):
            tme.create_model(f'local-dir:{tmp_path / "copy"}', pretrained=pretrained)


def test_module_whose_state_is_not_tensors_is_refused(tmp_path):
    class Counting(nn.Sequential):
        def get_extra_state(self):
            return {'steps': 3}

        def set_extra_state(self, state):
            pass

    model = tme.attach_exits(Counting(*build()), ['3'], input_size=SIZE)
    with pytest.raises(InvalidValueError, match="must hold tensors to be saved, got '_extra_state'"):
        tme.save_pretrained(model, tmp_path / 'model')
    assert not (tmp_path / 'model' / 'config.json').exists()
