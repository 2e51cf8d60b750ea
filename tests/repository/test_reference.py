"""The authors' published scripts, run beside ours on the same weights and images: the same networks come out.

They are not part of this project. EED_REFERENCE names a checkout of github.com/hjdw2/Exit-Ensemble-Distillation,
BEED_REFERENCE one of github.com/hjdw2/BEED.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from timm_multiexit.cli.build_model import create_regime
from timm_multiexit.cli.build_training import create_task, create_train_optimizer, resolve_lr
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.factory import create_model

RECIPE = Path(__file__).parents[2] / 'hub/recipes/paper200.yaml'
STEPS, BATCH, CLASSES = 3, 4, 100


class NoDistance(nn.Module):
    """Stands for `nn.MSELoss`, and is always zero."""

    def __init__(self, reduction):
        super().__init__()

    def forward(self, student, teacher):
        return 0.0 * student.sum()


@pytest.fixture
def load_script(monkeypatch):
    """Returns the function that gives a checkout's train.py as a module, on the CPU."""

    def load(variable, repo):
        checkout = os.environ.get(variable)
        if not checkout:
            pytest.skip(f"needs the authors' code: set {variable} to a checkout of github.com/hjdw2/{repo}")
        for name in ('resnet', 'data'):
            monkeypatch.setitem(sys.modules, name, None)  # so that they are as before afterwards
            del sys.modules[name]
        # A module that torchvision no longer has, and of which the script uses nothing.
        monkeypatch.setitem(sys.modules, 'torchvision.models.utils', ModuleType('torchvision.models.utils'))
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', os.environ.get('CUDA_VISIBLE_DEVICES', ''))  # the script sets it
        monkeypatch.syspath_prepend(checkout)
        for owner in (torch.Tensor, nn.Module):
            monkeypatch.setattr(owner, 'cuda', lambda self: self)
        spec = importlib.util.spec_from_file_location('published_train', Path(checkout) / 'train.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def our_name(name):
    """The key of ours for one of theirs."""
    layers = {'conv1': '0.conv', 'bn1': '0.bn', 'conv2': '1.conv', 'bn2': '1.bn', 'conv3': '2.conv', 'bn3': '2.bn'}
    head, _, rest = name.partition('.')
    if found := re.fullmatch(r'ex(\d)linear', head):
        return f'exits.{int(found[1]) - 1}.fc.{rest}'
    if found := re.fullmatch(r'ex(\d)(conv|bn)(\d)', head):
        part, _, last = rest.rpartition('.')
        layer = layers[part] if part else found[2]
        return f'exits.{int(found[1]) - 1}.convs.{int(found[3]) - 1}.{layer}.{last}'
    return f'backbone.fc.{rest}' if head == 'linear' else f'backbone.{name}'


def make_batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train_theirs(script, monkeypatch, tmp_path, network, settings):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--epoch', '1', '--save-folder', str(tmp_path)])
    args = script.parse_args()
    vars(args).update(settings, save_path=str(tmp_path))
    monkeypatch.setattr(script, 'ResNet', lambda: network)
    monkeypatch.setattr(script, 'prepare_cifar100_train_dataset', lambda **_: make_batches())
    monkeypatch.setattr(script, 'prepare_cifar100_test_dataset', lambda **_: [])
    monkeypatch.setattr(script, 'validate', lambda *_: 0)
    script.run_training(args)
    return {our_name(name): tensor for name, tensor in network.state_dict().items()}


def train_ours(weights, head, flags):
    args = parse_train_args(
        ['--config', str(RECIPE), '--model', 'cifar_resnet18', '--exits', 'auto', '--exit-head', head, *flags]
    )
    model = create_model('cifar_resnet18', exits='auto', head=head, num_classes=CLASSES).double()
    # Their stem has no activation, as the docstring of CifarResNet says.
    model.backbone.act1 = nn.Identity()
    model.load_state_dict(weights)
    lr, _ = resolve_lr(args, BATCH, 1)
    optimizer = create_train_optimizer(args, model, create_regime(args, model, None), lr=lr)
    task = create_task(args, model, torch.device('cpu')).train()
    for images, target in make_batches():
        optimizer.zero_grad()
        task(images, target)['loss'].backward()
        optimizer.step()
    return model.state_dict()


def check_networks(script, monkeypatch, tmp_path, *, settings, head, flags, count):
    theirs = script.ResNet(num_classes=CLASSES).double()
    start = {our_name(name): tensor.clone() for name, tensor in theirs.state_dict().items()}
    expected = train_theirs(script, monkeypatch, tmp_path, theirs, settings)
    actual = train_ours(start, head, flags)
    assert actual.keys() == expected.keys()
    assert len(expected) == sum(not torch.equal(start[name], tensor) for name, tensor in expected.items()) == count
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('features', [False, True], ids=['outputs', 'features'])
@pytest.mark.parametrize('distance', ['KL', 'MSE'])
@pytest.mark.parametrize('method', ['eed', 'main teaches'])
def test_eed_script_trains_the_same_network(load_script, monkeypatch, tmp_path, method, distance, features):
    script = load_script('EED_REFERENCE', 'Exit-Ensemble-Distillation')
    exit_loss = 'eed' if method == 'eed' else ('byot' if features else 'phuong')
    check_networks(
        script,
        monkeypatch,
        tmp_path,
        settings={'use_EED': method == 'eed', 'loss_output': distance, 'use_feature_dist': features},
        head='paper',
        flags=f'--exit-loss {exit_loss} --exit-output-loss {distance.lower()} --exit-feature-weight {features:d}'.split(),
        count=(20 + 6) * 6 + 8,  # convolutions with their norms, and four linear layers
    )


@pytest.mark.parametrize(
    ('settings', 'flags'),
    [
        ({'mode': 'CE'}, '--exit-loss ce'),
        ({'mode': 'KD'}, '--exit-loss phuong'),
        # With its default, 1.6, its teacher is BEED's in this mode too.
        ({'mode': 'EED', 'beta': 1.0}, '--exit-loss eed --exit-output-weight 1'),
        ({'mode': 'BEED'}, '--exit-loss beed'),
    ],
    ids=['CE', 'KD', 'EED', 'BEED'],
)
def test_beed_script_trains_the_same_network(load_script, monkeypatch, tmp_path, settings, flags):
    script = load_script('BEED_REFERENCE', 'BEED')
    # It distils maps that are not pooled, which ours cannot.
    monkeypatch.setattr(script.nn, 'MSELoss', NoDistance)
    check_networks(
        script,
        monkeypatch,
        tmp_path,
        settings=settings,
        head='bottleneck',
        flags=flags.split(),
        count=(20 + 18) * 6 + 8,
    )
