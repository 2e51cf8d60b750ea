"""Truncation: an exit cut out answers as it does in the model, and has what it needs and nothing else."""

import copy
import pickle

import pytest
import torch
from helpers.families import FAMILIES as ZOO
from helpers.families import make_small
from timm.data import resolve_data_config
from timm.layers import set_reentrant_ckpt
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import prune

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.models.truncation import TruncatedModel, truncate
from timm_multiexit.utils.errors import MultiExitError, StateError

# Batch norms, layer norms, tokens with a class token; keywords make the backbones draw random numbers in training.
FAMILIES = {
    'test_resnet': {'drop_path_rate': 0.2},
    'test_convnext': {'drop_path_rate': 0.2},
    'test_vit': {'drop_path_rate': 0.2, 'img_size': 64},
}


@pytest.fixture
def make(make_backbone):
    def make(name='test_resnet', **kwargs):
        backbone = make_backbone(name, **FAMILIES[name])
        return attach_exits(backbone, input_size=(3, 64, 64), **kwargs)

    return make


@pytest.fixture
def x():
    return torch.randn(3, 3, 64, 64)


def num_params(module):
    return sum(param.numel() for param in module.parameters())


def hooks(module):
    return [hook for child in module.modules() for hook in (child._forward_hooks | child._forward_pre_hooks).values()]


def storages(module):
    tensors = [value for child in module.modules() for value in vars(child).values() if isinstance(value, torch.Tensor)]
    tensors += [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('name', FAMILIES)
def test_truncated_model_gives_the_exits_logits_bit_for_bit(make, x, name, train):
    model = make(name, drop_rate=0.3).train(train)
    for idx in range(len(model.exits) + 1):
        network = truncate(model, idx)
        torch.manual_seed(1)
        expected = copy.deepcopy(model)(x, exit_idx=idx)
        torch.manual_seed(1)
        assert torch.equal(network(x), expected)
        assert expected.std() > 0


@pytest.mark.parametrize('name', FAMILIES)
def test_it_has_as_many_parameters_as_the_cost_says(make, name):
    model = make(name)
    counts = [num_params(truncate(model, idx)) for idx in range(len(model.exits) + 1)]
    assert counts == [cost.fixed.params for cost in model.cost()]
    assert counts[0] < counts[1] < counts[-1] == num_params(model.backbone)


def test_it_has_the_layers_up_to_the_tap_and_no_others(make):
    model = make()
    network = truncate(model, 1)
    assert [spec.module for spec in model.exits.specs] == ['layer1.0', 'layer2.0', 'layer3.0']
    assert network.spec == model.exits.specs[1]
    kept = {name for name, _ in network.named_parameters()}
    expected = {name for name, _ in model.named_parameters()}
    expected = {name for name in expected if name.startswith(('backbone.', 'exits.1.'))}
    expected = {name for name in expected if not name.startswith(('backbone.layer3', 'backbone.layer4', 'backbone.fc'))}
    assert kept == expected
    assert [type(network.backbone.get_submodule(name)) for name in ('layer3.0', 'layer4.0', 'fc')] == [nn.Identity] * 3
    buffers = {name for name, _ in network.named_buffers()}
    kept_modules = {name.rpartition('.')[0] for name in kept}
    assert buffers == {name for name, _ in model.named_buffers() if name.rpartition('.')[0] in kept_modules}
    assert any(name.endswith('num_batches_tracked') for name in buffers)


class Positions(nn.Module):
    """A backbone with a parameter of its own for each of two stages, the second of which shares a bias with the first.

    On the way to the first it may ask whether what only the second needs is there ('has') or what it is ('is').
    """

    def __init__(self, asks=''):
        super().__init__()
        self.asks = asks
        self.num_classes = 5
        self.num_features = self.head_hidden_size = 8
        self.pretrained_cfg = {'input_size': (3, 16, 16)}
        self.feature_info = [
            {'num_chs': 8, 'reduction': 2, 'module': 'first'},
            {'num_chs': 8, 'reduction': 4, 'module': 'second'},
        ]
        self.first_bias = nn.Parameter(torch.randn(3, 1, 1))
        self.second_bias = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer('scale', torch.tensor(2.0))
        self.table = torch.randn(3, 1, 1)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.second.bias = self.first.bias
        self.fc = nn.Linear(8, 5)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        if self.asks == 'has' and self.second_bias is not None:
            x = x * 2
        if self.asks == 'is':
            x = x * self.fc.in_features
        x = self.first((x + self.first_bias + self.table) * self.scale)
        return self.fc(self.second(x + self.second_bias).mean((2, 3)))


def test_parameters_that_the_path_does_not_read_go_and_shared_ones_stay():
    model = attach_exits(Positions(), head='linear').eval()
    network = truncate(model, 0)
    names = [name for name, _ in network.backbone.named_parameters()]
    assert names == ['first_bias', 'first.weight', 'first.bias']
    assert network.backbone.second_bias is None
    assert num_params(network) == model.cost()[0].fixed.params
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x), model(x, exit_idx=0))
    assert not storages(network) & storages(model)


def test_module_of_which_only_a_shared_bias_is_read_keeps_that_alone():
    network = truncate(attach_exits(Positions(), head='linear'), 0)
    assert network.backbone.second.weight is None
    assert network.backbone.second.bias is network.backbone.first.bias


@pytest.mark.parametrize('asks', ['has', 'is'])
def test_backbone_whose_path_depends_on_what_would_go_is_refused_in_one_line(asks):
    model = attach_exits(Positions(asks), head='linear')
    with pytest.raises(MultiExitError, match='Exit 0 cannot be cut out: Positions') as error:
        truncate(model, 0)
    assert '\n' not in str(error.value)


def test_main_is_the_plain_backbone_without_hooks(make, x):
    model = make().eval()
    for exit_idx in (-1, 3):
        network = truncate(model, exit_idx)
        assert isinstance(network, TruncatedModel)
        assert hooks(network) == []
        assert network.backbone.state_dict().keys() == model.backbone.state_dict().keys()
        assert torch.equal(network(x), model(x))
        assert (network.exit_idx, network.spec, network.head) == (3, None, None)
    assert len(hooks(truncate(model, 0))) == 1


@pytest.mark.parametrize(('negative', 'positive'), [(-4, 0), (-3, 1), (-2, 2), (-1, 3)])
def test_negative_index_counts_from_main(make, negative, positive):
    model = make()
    state, expected = truncate(model, negative).state_dict(), truncate(model, positive).state_dict()
    assert state.keys() == expected.keys()


@pytest.mark.parametrize('exit_idx', [-5, 4])
def test_exit_that_is_not_there_is_refused_as_by_the_model(make, x, exit_idx):
    model = make()
    with pytest.raises(MultiExitError) as expected:
        model(x, exit_idx=exit_idx)
    with pytest.raises(MultiExitError) as error:
        truncate(model, exit_idx)
    assert str(error.value) == str(expected.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('exit_idx', [0, 2, -1])
def test_model_stays_as_it_is_and_shares_nothing(make, x, exit_idx):
    model = make().train()
    model.exits[0].eval()
    before = copy.deepcopy(model)
    num_hooks, buffers = len(hooks(model)), storages(model)
    network = truncate(model, exit_idx)
    assert not storages(network) & buffers
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(0)
    assert len(hooks(model)) == num_hooks == 4
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    outputs, expected = model.eval()(x, exits=True).logits, before.eval()(x, exits=True).logits
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


class Counted:
    """Counts how often it is copied."""

    def __init__(self):
        self.num_copies = 0

    def __deepcopy__(self, memo):
        self.num_copies += 1
        return self


def test_what_is_not_needed_is_never_copied(make):
    model = make()
    needed, spared = Counted(), Counted()
    model.backbone.layer1[0].note, model.backbone.layer4[0].note = needed, spared
    truncate(model, 0)
    # Both with the data-free copy of the model; the first in the network and in a data-free copy of that.
    assert (needed.num_copies, spared.num_copies) == (3, 1)


def test_frozen_parts_stay_frozen(make):
    model = make(exits=[1, 2]).train()
    model.backbone.conv1[0].weight.requires_grad_(False)
    expected = {name: param.requires_grad for name, param in model.named_parameters()}
    network = truncate(model, 1)
    assert {name: param.requires_grad for name, param in network.named_parameters()}.items() <= expected.items()
    assert network.train().backbone.training
    model.freeze_backbone()
    network = truncate(model, 1)
    assert {name for name, param in network.named_parameters() if param.requires_grad} == {
        f'exits.1.{name}' for name, _ in model.exits[1].named_parameters()
    }
    assert not network.eval().train().backbone.training
    assert network.training
    assert network.head.training


def test_mode_of_every_module_is_kept(make):
    model = make().train()
    model.backbone.layer1.eval()
    network = truncate(model, 1)
    modes = {name: module.training for name, module in model.named_modules()}
    assert {
        name: module.training for name, module in network.named_modules() if name != 'exits'
    }.items() <= modes.items()
    assert network.training
    assert not network.backbone.layer1[0].training
    assert not any(module.training for module in truncate(model.eval(), 1).modules())


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_gradients_are_those_of_the_exit_in_the_model(make, x, name):
    model = make(name).eval()
    network = truncate(model, 1)
    network(x).square().sum().backward()
    model(x, exit_idx=1).square().sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    for key, param in network.named_parameters():
        assert torch.equal(param.grad, grads[key]), key
    assert sum(grad is not None for grad in grads.values()) == len(list(network.parameters()))


def test_truncated_model_is_trained_with_timm_optimizers_and_layer_decay(make, x):
    network = truncate(make('test_vit').train(), 1)
    optimizer = create_optimizer_v2(network, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scales = {id(param): group['lr_scale'] for group in optimizer.param_groups for param in group['params']}
    decays = {id(param): group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    assert {scales[id(param)] for param in network.head.parameters()} == {1.0}
    assert scales[id(network.backbone.pos_embed)] < 1
    assert decays[id(network.backbone.pos_embed)] == 0
    assert len(scales) == len(list(network.parameters()))
    first = nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2]))
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2]))
        loss.backward()
        optimizer.step()
    assert loss < first


def test_reentrant_checkpointing_is_refused_in_one_line_in_training_alone(make, x):
    network = truncate(make().train(), 1)
    expected = network.eval()(x)
    network.set_grad_checkpointing(True)
    network.train()(x).sum().backward()
    assert network.backbone.conv1[0].weight.grad.abs().sum() > 0
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(MultiExitError, match='reentrant') as error:
            network(x)
        assert '\n' not in str(error.value)
        assert network.eval()(x).shape == expected.shape
    finally:
        set_reentrant_ckpt(False)


# Its surface


def test_it_tells_of_itself_what_timm_asks(make, x):
    model = make().eval()
    network = truncate(model, 1)
    spec = model.exits.specs[1]
    assert (network.num_classes, network.num_features) == (10, spec.channels)
    assert network.head_hidden_size == network.head.fc.in_features == model.exits[1].num_features
    assert network.get_classifier() is network.head.fc
    assert network.pretrained_cfg == model.pretrained_cfg
    assert network.default_cfg == model.default_cfg | {'classifier': 'exits.1.fc'}
    assert resolve_data_config({}, model=network) == resolve_data_config({}, model=model)
    assert get_model_input_config(network)['input_size'] == get_model_input_config(model)['input_size']
    assert network.input_size == model.input_size
    features = network.forward_features(x)
    assert features.shape == (3, spec.channels, 64 // spec.reduction, 64 // spec.reduction)
    assert torch.equal(network.forward_head(features), network(x))
    assert torch.equal(network.forward_head(features, pre_logits=True), model(x, exits=True).features[1])
    main = truncate(model, -1)
    assert (main.num_features, main.head_hidden_size) == (model.num_features, model.head_hidden_size)
    assert main.get_classifier() is main.backbone.fc
    assert torch.equal(main.forward_head(main.forward_features(x)), model(x))


def test_projector_that_training_alone_uses_goes(make, x):
    model = make(head='linear').eval()
    model.add_projectors()
    assert model.exits[0].projector is not None
    network = truncate(model, 0)
    assert num_params(network) == model.cost()[0].fixed.params
    assert not any('projector' in key for key in network.state_dict())
    assert torch.equal(network.train().eval()(x), model(x, exit_idx=0))


# Copies, the disk, compile, export


@pytest.mark.parametrize('exit_idx', [1, -1])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_copies_and_pickles_answer_to_themselves(make, x, name, exit_idx):
    network = truncate(make(name).eval(), exit_idx)
    expected = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), expected)
        assert len(hooks(other)) == len(hooks(network))
        with torch.no_grad():
            other.get_classifier().bias.add_(1)
        torch.testing.assert_close(other(x), expected + 1)
        assert torch.equal(network(x), expected)


def test_state_dict_goes_round_and_is_part_of_the_models(make, x):
    model, other = make().eval(), make().eval()
    network, fresh = truncate(model, 1), truncate(other, 1)
    assert not torch.allclose(fresh(x), network(x))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(x), network(x))
    state = model.state_dict()
    assert network.state_dict().keys() < state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_checkpoint_of_a_shallow_exit_is_smaller(make, tmp_path):
    model = make()
    sizes = []
    for idx in range(4):
        torch.save(truncate(model, idx).state_dict(), tmp_path / 'model.pt')
        sizes.append((tmp_path / 'model.pt').stat().st_size)
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.5 * sizes[-1]


@pytest.mark.slow
def test_it_compiles_without_graph_break_at_three_batch_sizes(make):
    network = truncate(make().eval(), 0)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for size in (1, 2, 3):
            x = torch.randn(size, 3, 64, 64)
            torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'exit_idx', 'strict'),
    [
        ('test_resnet', 1, False),
        ('test_vit', 0, False),
        pytest.param('test_resnet', -1, False, marks=pytest.mark.slow),
        pytest.param('test_resnet', 0, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings('ignore:While compiling, we found certain side effects')
def test_it_exports_to_disk_with_its_own_parameters_alone(make, x, tmp_path, name, exit_idx, strict):
    network = truncate(make(name).eval(), exit_idx)
    program = torch.export.export(network, (torch.randn_like(x),), strict=strict)
    torch.export.save(program, tmp_path / 'model.pt2')
    program = torch.export.load(tmp_path / 'model.pt2')
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)
    assert program.state_dict.keys() == network.state_dict().keys()


def test_truncation_in_inference_mode_gives_parameters_that_train(make, x):
    model = make().eval()
    with torch.inference_mode():
        network = truncate(model, 0)
    network(x).sum().backward()
    assert network.backbone.conv1[0].weight.grad is not None


def test_model_without_data_is_truncated_without_data(make):
    model = make().to('meta')
    network = truncate(model, 1)
    assert {param.device.type for param in network.parameters()} == {'meta'}
    assert num_params(network) == model.cost()[1].fixed.params


# Every family

# Parameters of the first exit that its loss does not reach, by what their names begin with: the tapped module, or one
# on the way to it, computes more than the tap reads.
NOT_REACHED = {
    'CrossVit': ('backbone.blocks.0.projs.1.', 'backbone.blocks.0.fusion.1.', 'backbone.blocks.0.revert_projs.1.'),
    'EfficientViM': ('backbone.stages.0.',),
    'EfficientViMDistilled': ('backbone.stages.0.',),
    'PNASNet5Large': ('backbone.cell_stem_1.conv_prev_1x1.',),
}


@pytest.mark.zoo
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', ZOO)
def test_family_member_is_cut_at_every_exit(family):
    model = make_small(family)
    x = torch.randn(1, *model.input_size)
    costs, keys = model.cost(), model.state_dict().keys()
    with torch.no_grad():
        for idx, cost in enumerate(costs):
            network = truncate(model, idx)
            assert num_params(network) == cost.fixed.params
            assert network.state_dict().keys() <= keys
            assert torch.equal(network(x), model(x, exit_idx=idx))


@pytest.mark.zoo
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', ZOO)
def test_family_member_trains_cut_as_it_does_whole(family):
    model = make_small(family).train()
    x = torch.randn(2, *model.input_size)
    network = truncate(model, 0)
    torch.manual_seed(1)
    logits = network(x)
    torch.manual_seed(1)
    assert torch.equal(logits, model(x, exit_idx=0))
    params = dict(network.named_parameters())
    grads = torch.autograd.grad(logits.square().sum(), list(params.values()), allow_unused=True)
    missed = [name for name, grad in zip(params, grads) if grad is None]
    assert bool(missed) == (family in NOT_REACHED)
    assert all(name.startswith(NOT_REACHED[family]) for name in missed)


def test_pruned_model_is_refused_with_what_to_do(make_model):
    model = make_model(exits=[1, 2])
    conv = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    prune.l1_unstructured(conv, 'weight', 0.5)
    with pytest.raises(StateError, match=r'weight is computed from parameters .*torch\.nn\.utils\.prune\.remove'):
        truncate(model, 0)
    prune.remove(conv, 'weight')
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(truncate(model.eval(), 0)(x), model(x, exit_idx=0), rtol=0, atol=0)
