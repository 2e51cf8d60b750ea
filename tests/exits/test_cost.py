"""Costs: MACs and parameters against numbers worked by hand and an independent count."""

import copy

import pytest
import torch
from torch import nn

from timm_multiexit.exits.cost import Cost, CostMeter, ExitCost, combine_costs, meta_copy
from timm_multiexit.models.attach import attach_exits


class TinyNet(nn.Module):
    """Two convolutions, the second grouped, and a linear classifier; with what timm models tell of themselves."""

    def __init__(self):
        super().__init__()
        self.num_classes = 5
        self.num_features = self.head_hidden_size = 8
        self.pretrained_cfg = self.default_cfg = {'input_size': (3, 16, 16)}
        self.feature_info = [
            {'num_chs': 8, 'reduction': 2, 'module': 'conv1'},
            {'num_chs': 8, 'reduction': 4, 'module': 'conv2'},
        ]
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False)
        self.fc = nn.Linear(8, 5)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).mean((2, 3)))


# Of one 16x16 image. conv1 gives 8x8: 64 places x 8 channels x (3 x 3 x 3) inputs; 8 x 27 weights, 8 biases.
CONV1 = Cost(macs=64 * 8 * 27, params=8 * 27 + 8)
# conv2 gives 4x4, each channel reads the 2 of its group: 16 places x 8 channels x (2 x 3 x 3); 8 x 18 weights.
CONV2 = Cost(macs=16 * 8 * 18, params=8 * 18)
# 8 features to 5 classes; 40 weights, 5 biases.
LINEAR = Cost(macs=40, params=45)
# The exit after conv1, of type 'linear': weight and bias of a norm over 8 channels, then 8 features to 5 classes.
HEAD = Cost(macs=40, params=16 + 45)


def add(*costs):
    return Cost(sum(cost.macs for cost in costs), sum(cost.params for cost in costs))


def test_hand_worked_numbers_are_these():
    assert (CONV1.macs, CONV2.macs, CONV1.params, CONV2.params) == (13824, 2304, 224, 144)


def test_meter_counts_convolution_grouped_convolution_and_linear_as_by_hand():
    net = TinyNet().eval()
    with CostMeter(net) as meter:
        net(torch.randn(1, 3, 16, 16))
    assert meter.read() == add(CONV1, CONV2, LINEAR)


def test_meter_counts_macs_of_the_whole_batch_and_parameters_once():
    net = TinyNet().eval()
    with CostMeter(net) as meter:
        net(torch.randn(3, 3, 16, 16))
    assert meter.read() == Cost(3 * (13824 + 2304 + 40), 224 + 144 + 45)


def test_meter_can_be_read_on_the_way_and_counts_only_what_was_read():
    net = TinyNet().eval()
    with CostMeter(net) as meter:
        single = net.conv1(torch.randn(1, 3, 16, 16))
        first = meter.read()
        net.conv2(single)
        second = meter.read()
    assert first == CONV1
    assert second == add(CONV1, CONV2)


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, layer)
    with CostMeter(net) as meter:
        net(torch.randn(1, 4))
    assert meter.read() == Cost(macs=2 * 16, params=16 + 4)


def test_costs_of_a_model_are_those_worked_by_hand():
    model = attach_exits(TinyNet(), head='linear')
    assert [spec.module for spec in model.exits.specs] == ['conv1']
    assert model.cost() == (
        ExitCost(head=HEAD, fixed=add(CONV1, HEAD), sequential=add(CONV1, HEAD)),
        ExitCost(head=Cost(), fixed=add(CONV1, CONV2, LINEAR), sequential=add(CONV1, CONV2, LINEAR, HEAD)),
    )


def test_combined_costs_charge_shallower_heads_in_sequential_alone():
    # Paths 100, 300, 700 and heads 10, 20: fixed adds an exit's own head, sequential those before it as well.
    paths = [Cost(100, 5), Cost(300, 15), Cost(700, 35)]
    heads = [Cost(10, 1), Cost(20, 2)]
    assert combine_costs(paths, heads) == (
        ExitCost(head=Cost(10, 1), fixed=Cost(110, 6), sequential=Cost(110, 6)),
        ExitCost(head=Cost(20, 2), fixed=Cost(320, 17), sequential=Cost(330, 18)),
        ExitCost(head=Cost(0, 0), fixed=Cost(700, 35), sequential=Cost(730, 38)),
    )


def test_combining_without_a_path_for_main_is_an_error():
    with pytest.raises(ValueError, match='longer'):
        combine_costs([Cost(1), Cost(2)], [Cost(3), Cost(4)])


def layer_costs(model, forward):
    """Return (module name, MACs, own parameters) of every layer in the order the forward calls them, by its shapes."""
    calls = []

    def note(name):
        def hook(module, args, output):
            macs = 0
            if isinstance(module, nn.Conv2d):
                inputs = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                macs = output[0].numel() * inputs
            elif isinstance(module, nn.Linear):
                macs = module.in_features * module.out_features
            params = sum(param.numel() for param in module.parameters(recurse=False))
            calls.append((name, macs, params))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    forward()
    for handle in handles:
        handle.remove()
    return calls


def up_to(calls, name):
    """Return the cost of the calls that had ended when the module of this name ended."""
    names = [call[0] for call in calls]
    assert names.count(name) == 1
    done = calls[: names.index(name) + 1]
    return Cost(sum(macs for _, macs, _ in done), sum(params for _, _, params in done))


@pytest.mark.parametrize('head', ['conv', 'paper', 'bottleneck', 'linear'])
@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv3_small_050', 'regnetx_002'])
def test_costs_equal_a_count_by_layer_shapes(make_model, name, head):
    model = make_model(name, head=head).eval()
    x = torch.randn(1, 3, 64, 64)
    calls = layer_costs(model, lambda: model(x, exits=True))
    heads = [
        add(*(Cost(macs, params) for call, macs, params in calls if f'{call}.'.startswith(f'exits.{idx}.')))
        for idx in range(3)
    ]
    backbone = [call for call in calls if call[0].startswith('backbone.')]
    paths = [up_to(backbone, f'backbone.{spec.module}') for spec in model.exits.specs]
    paths.append(add(*(Cost(macs, params) for _, macs, params in backbone)))
    costs = model.cost()
    assert len(costs) == len(paths) == 4
    for idx, cost in enumerate(costs):
        own = heads[idx] if idx < 3 else Cost()
        assert cost.head == own
        assert cost.fixed == add(paths[idx], own)
        assert cost.sequential == add(paths[idx], *heads[: idx + 1])


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'test_efficientnet', 'test_byobnet'])
def test_main_reads_every_parameter_of_the_backbone(make_model, name):
    model = make_model(name)
    assert model.cost()[-1].fixed.params == sum(param.numel() for param in model.backbone.parameters())
    heads = [sum(param.numel() for param in head.parameters()) for head in model.exits]
    assert [cost.head.params for cost in model.cost()[:-1]] == heads


def test_cost_of_resnet18_at_its_own_size_is_the_published_one(make_model):
    # He et al., table 1: 1.8 GFLOPs (multiply-adds); torchvision: 1.814 GMACs and 11,689,512 parameters.
    main = make_model('resnet18', num_classes=1000, input_size=None).cost()[-1].fixed
    assert round(main.macs / 1e9, 3) == 1.814
    assert main.params == 11_689_512


def test_cost_at_another_size_scales_with_the_pixels(make_model):
    model = make_model('resnet18', input_size=(3, 64, 64))
    small, large = model.cost(), model.cost((3, 128, 128))
    linear = [head.fc.weight.numel() for head in model.exits] + [model.backbone.fc.weight.numel()]
    assert model.cost((3, 64, 64)) == small
    for idx in range(4):
        # Convolutions cost four times as much on twice the side, the linear layer the same.
        assert large[idx].fixed.macs - linear[idx] == 4 * (small[idx].fixed.macs - linear[idx])
        assert large[idx].fixed.params == small[idx].fixed.params
    assert large[-1].sequential.macs - sum(linear) == 4 * (small[-1].sequential.macs - sum(linear))


def test_cost_is_reported_for_the_size_given_at_attaching(make_model):
    small, large = (make_model(input_size=(3, side, side)) for side in (64, 128))
    assert large.cost()[-1].fixed.macs == small.cost((3, 128, 128))[-1].fixed.macs > small.cost()[-1].fixed.macs


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_cost_leaves_the_model_untouched(make_model, train):
    model = make_model('resnet18').train(train)
    model.backbone.bn1.train(not train)
    model.backbone.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    with torch.enable_grad():
        model.cost()
        assert torch.is_grad_enabled()
    state = before.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert [param.requires_grad for param in model.parameters()] == [
        param.requires_grad for param in before.parameters()
    ]
    assert all(param.grad is None and param.device.type == 'cpu' for param in model.parameters())


def test_data_free_copy_holds_no_data_and_shares_nothing(make_model):
    model = make_model('resnet18').train()
    other = meta_copy(model)
    assert {tensor.device.type for tensor in other.state_dict().values()} == {'meta'}
    assert not any(module.training for module in other.modules())
    assert not any(param.requires_grad for param in other.parameters())
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in other.state_dict().items()} == shapes
    assert {value.device.type for value in model.state_dict().values()} == {'cpu'}


def test_data_free_copy_keeps_tied_parameters_tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    other = meta_copy(net)
    assert other[1].weight is other[0].weight
    assert len(list(other.parameters())) == 3
