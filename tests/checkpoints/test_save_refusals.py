"""What is saved comes back equal, or it is refused before anything is written, with the step to take."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import timm_multiexit as tme
from timm_multiexit.utils.errors import DiskError, InvalidTypeError, InvalidValueError


@pytest.fixture
def model(make_model):
    return make_model().eval()


def prune_one(model):
    prune.l1_unstructured(model.backbone.conv1[0], 'weight', 0.5)


def prune_head(model):
    prune.l1_unstructured(model.exits[0].fc, 'weight', 0.5)


def parametrize_one(model):
    parametrize.register_parametrization(model.backbone.fc, 'weight', nn.Identity())


def count_operations(model):
    """Do as thop does, a profiler."""
    for module in model.modules():
        module.register_buffer('total_ops', torch.zeros(1))
        module.register_buffer('total_params', torch.zeros(1))


class Adapted(nn.Module):
    """A linear layer as PEFT's LoRA wraps it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({'default': nn.Linear(base_layer.in_features, 2, bias=False)})


CHANGES = {
    'pruning': (prune_one, 'torch.nn.utils.prune.remove'),
    'pruned head': (prune_head, 'torch.nn.utils.prune.remove'),
    'parametrization': (parametrize_one, 'remove_parametrizations'),
    'weight norm': (lambda model: nn.utils.weight_norm(model.backbone.fc), 'remove_weight_norm'),
    'spectral norm': (lambda model: nn.utils.spectral_norm(model.backbone.fc), 'remove_spectral_norm'),
    'new spectral norm': (
        lambda model: nn.utils.parametrizations.spectral_norm(model.backbone.fc),
        'remove_parametrizations',
    ),
    'profiler': (count_operations, 'del module.total_ops, module.total_params'),
    'adapter': (lambda model: setattr(model.backbone, 'fc', Adapted(model.backbone.fc)), 'merge_and_unload'),
    'compiled part': (
        lambda model: setattr(model.backbone, 'layer1', torch.compile(model.backbone.layer1)),
        '_orig_mod',
    ),
    'wrapped part': (
        lambda model: setattr(model.backbone, 'layer1', nn.DataParallel(model.backbone.layer1)),
        r'its \.module',
    ),
    'other classifier': (lambda model: setattr(model.backbone, 'fc', nn.Linear(96, 4)), 'have another shape'),
    'other head': (lambda model: setattr(model.exits[0], 'fc', nn.Linear(96, 4)), 'have another shape'),
    'a layer more': (
        lambda model: model.backbone.add_module('more', nn.Linear(2, 2)),
        r'2 weights are new, 0 are gone',
    ),
    'a layer less': (
        lambda model: setattr(model.backbone, 'layer1', nn.Identity()),
        r'0 weights are new, \d+ are gone',
    ),
    'whole numbers': (
        lambda model: setattr(model.backbone.bn1, 'running_mean', model.backbone.bn1.running_mean.long()),
        'have another shape or type',
    ),
    'nan': (lambda model: nn.init.constant_(model.exits[1].fc.bias, float('nan')), 'contains NaN or inf'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_model_that_would_not_come_back_is_refused_before_anything_is_written(change, model, tmp_path):
    apply, hint = CHANGES[change]
    apply(model)
    with pytest.raises(tme.CheckpointError, match=hint) as error:
        tme.save_pretrained(model, tmp_path / 'deep' / 'net')
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_refusal_leaves_the_folder_that_was_there(model, tmp_path):
    tme.save_pretrained(model, tmp_path / 'net')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    prune_one(model)
    with pytest.raises(tme.CheckpointError, match='Nothing was written'):
        tme.save_pretrained(model, tmp_path / 'net')
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


UNDO = {
    'pruning': lambda model: prune.remove(model.backbone.conv1[0], 'weight'),
    'parametrization': lambda model: parametrize.remove_parametrizations(model.backbone.fc, 'weight'),
    'weight norm': lambda model: nn.utils.remove_weight_norm(model.backbone.fc),
    'spectral norm': lambda model: nn.utils.remove_spectral_norm(model.backbone.fc),
    'compiled part': lambda model: setattr(model.backbone, 'layer1', model.backbone.layer1._orig_mod),
    'wrapped part': lambda model: setattr(model.backbone, 'layer1', model.backbone.layer1.module),
}


@pytest.mark.parametrize('change', UNDO)
def test_step_that_the_message_names_lets_the_model_come_back_equal(change, model, tmp_path):
    CHANGES[change][0](model)
    UNDO[change](model)
    tme.save_pretrained(model, tmp_path)
    loaded = tme.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert all(map(torch.equal, loaded(x, exits=True).logits, model(x, exits=True).logits))


def test_profiled_model_comes_back_once_its_buffers_are_deleted(model, tmp_path):
    count_operations(model)
    for module in model.modules():
        del module.total_ops, module.total_params
    tme.save_pretrained(model, tmp_path)
    loaded = tme.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


class Peft(nn.Module):
    """What PEFT's models are like: they hand on every attribute of what they wrap."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base

    def merge_and_unload(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


WRAPPERS = {
    'compiled': (torch.compile, 'model must not be compiled: pass model._orig_mod'),
    'data parallel': (nn.DataParallel, 'model must not be wrapped in DataParallel: use model.module'),
    'peft': (Peft, 'use model.merge_and_unload'),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('kind', ['model', 'timm'])
def test_wrapped_model_is_refused_with_what_is_inside(wrapper, kind, model, tmp_path):
    wrap, hint = WRAPPERS[wrapper]
    with pytest.raises(InvalidTypeError, match=hint):
        tme.save_pretrained(wrap(model if kind == 'model' else model.backbone), tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrapped_backbone_is_refused_with_what_is_inside(wrapper, model, tmp_path):
    model.backbone = WRAPPERS[wrapper][0](model.backbone)
    with pytest.raises(InvalidTypeError, match=r'model\.backbone must not be'):
        tme.save_pretrained(model, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('value', [None, 'test_resnet', {'weight': torch.ones(2)}, 7, nn.Linear], ids=str)
def test_what_is_not_a_model_is_refused(value, tmp_path):
    with pytest.raises(InvalidTypeError, match=r'model must be a MultiExitModel or a timm model, got '):
        tme.save_pretrained(value, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'own', [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 3))], ids=lambda own: type(own).__name__
)
def test_module_that_timm_did_not_make_is_refused_and_leaves_no_folder(own, tmp_path):
    with pytest.raises(InvalidTypeError, match=r'must be made by timm.create_model .* torch.save'):
        tme.save_pretrained(own, tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


def test_model_without_data_is_refused(make_empty, tmp_path):
    with pytest.raises(tme.StateError, match='must have data, got weights on the meta device'):
        tme.save_pretrained(make_empty('test_resnet'), tmp_path / 'net')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('value', [None, 7, ['a'], b'net'], ids=str)
def test_folder_that_is_not_a_path_is_refused(value, model):
    with pytest.raises(InvalidTypeError, match='directory must be a path, got'):
        tme.save_pretrained(model, value)


@pytest.mark.parametrize('place', ['file', 'file/net', 'file/deep/net'])
def test_file_where_the_folder_should_be_is_refused_and_stays(place, model, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(DiskError, match=r'directory must be a folder, got the file .*file\.'):
        tme.save_pretrained(model, tmp_path / place)
    assert [path.name for path in tmp_path.rglob('*')] == ['file']
    assert (tmp_path / 'file').read_text() == 'mine'


def test_folder_that_cannot_be_written_is_an_error_of_the_disk(model):
    with pytest.raises(DiskError, match='could not be written'):
        tme.save_pretrained(model, '/proc/net-of-a-test')


@pytest.mark.parametrize(
    'saved',
    [
        {'label_names': ['a'] * 9},
        {'label_names': 'abc'},
        {'label_names': list(range(10))},
        {'data_config': {'input_size': 7}},
        {'data_config': {'input_size': (3, 64, -1)}},
        {'data_config': {'std': (0, 0, 0)}},
        {'data_config': {'crop_pct': 'much'}},
    ],
    ids=str,
)
def test_what_no_folder_may_say_is_refused_when_it_is_saved(saved, model, tmp_path):
    with pytest.raises((InvalidValueError, tme.CheckpointError)) as error:
        tme.save_pretrained(model, tmp_path / 'net', **saved)
    assert '\n' not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_with_their_values(dtype, model, tmp_path):
    tme.save_pretrained(copy.deepcopy(model).to(dtype), tmp_path)
    loaded = tme.create_model(f'local-dir:{tmp_path}', pretrained=True)
    expected = model.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(
            tensor, expected[key].to(dtype).to(tensor.dtype) if tensor.is_floating_point() else expected[key]
        )


def test_model_that_was_compiled_in_place_is_saved(model, tmp_path):
    model.compile()
    tme.save_pretrained(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 10


@pytest.mark.parametrize('value', [nn.Linear(2, 2), torch.ones(1)], ids=['module', 'buffer'])
def test_weights_beside_backbone_and_exits_are_refused(value, model, tmp_path):
    if isinstance(value, nn.Module):
        model.extra = value
    else:
        model.register_buffer('extra', value)
    with pytest.raises(tme.CheckpointError, match="backbone and exits alone to be saved, got 'extra"):
        tme.save_pretrained(model, tmp_path / 'net')
    assert not any(tmp_path.iterdir())


def test_layer_of_another_kind_is_refused(model, tmp_path):
    name = next(name for name, module in model.backbone.named_modules() if isinstance(module, nn.ReLU))
    model.backbone.set_submodule(name, nn.Tanh())
    with pytest.raises(tme.CheckpointError, match=f'backbone.{name} must be a ReLU, as it was created, .* got Tanh'):
        tme.save_pretrained(model, tmp_path / 'net')
    assert not any(tmp_path.iterdir())


def test_layers_that_only_training_has_are_no_change(tmp_path):
    """Their rates are not saved: the model comes back without them."""
    model = tme.create_model('test_resnet', exits=[1], num_classes=10, drop_path_rate=0.2).eval()
    x = torch.randn(2, 3, 64, 64)
    tme.save_pretrained(model, tmp_path)
    assert torch.equal(tme.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_precision_comes_back_where_it_is_asked_for(dtype, model, tmp_path):
    model = model.to(dtype).eval()
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    tme.save_pretrained(model, tmp_path)
    loaded = tme.create_model(f'local-dir:{tmp_path}', pretrained=True, dtype=dtype).eval()
    for one, other in zip(loaded(x, exits=True).logits, model(x, exits=True).logits):
        assert torch.equal(one, other)
