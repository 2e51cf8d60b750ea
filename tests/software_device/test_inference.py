"""What a model answers on the software device is what it answers on the CPU, and nothing of it is on two devices."""

import copy

import pytest
import torch
from helpers.members import MEMBERS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from benchmarks.inference import force_policy
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy

pytestmark = pytest.mark.slow  # compiles the device

# Kernels are the CPU's, so results are equal to the bit, but for what the CPU computes by another way than other
# devices do: its attention (not here, see `same_attention`) and products of three-dimensional tensors.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


@pytest.fixture(autouse=True)
def same_attention():
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield


@pytest.fixture
def pair(make_small, device):
    """Return a function that makes a network on the CPU and its copy on the device, with images for both."""

    def make(name, batch_size=6):
        model = make_small(name).eval()
        images = torch.randn(batch_size, *model.input_size) * torch.linspace(0.2, 3, batch_size).view(-1, 1, 1, 1)
        return (model, images), (copy.deepcopy(model).to(device), images.to(device))

    return make


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.device.type == 'software'
        torch.testing.assert_close(one.cpu(), other, **CLOSE)


# In efficientvim_m1 a score lies so near the threshold that rounding decides.
@pytest.mark.parametrize('name', [name for name in MEMBERS if name != 'efficientvim_m1'])
def test_every_call_answers_as_on_the_cpu(name, pair):
    (model, images), (other, moved) = pair(name)
    expected = model(images, exits=True)
    actual = other(moved, exits=True)
    assert_same(actual.logits + actual.features, expected.logits + expected.features)
    assert_same([other(moved)], [model(images)])
    for idx in range(len(model.exits)):
        assert_same([other(moved, exit_idx=idx)], [model(images, exit_idx=idx)])
    assert_same([logits for _, logits in other.anytime(moved)], [logits for _, logits in model.anytime(images)])
    policy = force_policy(expected.logits, 0.5)
    for sizes in (None, (2, 4)):
        wanted, got = model.infer(images, policy, bucket_sizes=sizes), other.infer(moved, policy, bucket_sizes=sizes)
        assert wanted.exit_idx.unique().numel() > 1
        assert torch.equal(got.exit_idx.cpu(), wanted.exit_idx)
        assert_same([got.logits], [wanted.logits])
    assert other.can_leave == model.can_leave
    assert [cost.fixed for cost in other.cost()] == [cost.fixed for cost in model.cost()]


def test_a_convolutional_network_answers_as_on_the_cpu_to_the_bit(pair):
    (model, images), (other, moved) = pair('test_resnet')
    for one, wanted in zip(other(moved, exits=True).logits, model(images, exits=True).logits, strict=True):
        assert torch.equal(one.cpu(), wanted)


@pytest.mark.parametrize('combine', [None, 'mean', 'geometric'])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_every_policy_decides_as_on_the_cpu(criterion, combine, pair):
    (model, images), (other, moved) = pair('test_resnet', 32)
    threshold = 1 if criterion == 'patience' else 0.4
    policy = ExitPolicy(criterion, (threshold,) * 3, temperatures=(1.0, 0.5, 0.5, 1.0), combine=combine)
    wanted, got = model.infer(images, policy), other.infer(moved, policy)
    assert torch.equal(got.exit_idx.cpu(), wanted.exit_idx)
    assert_same([got.logits], [wanted.logits])


@pytest.mark.parametrize('choice', [{'max_drop': 0.3, 'delta': 0.3}])
def test_calibration_finds_the_cpus_policy(choice, pair):
    (model, images), (other, _) = pair('test_resnet', 64)
    targets = model(images).argmax(-1)
    loader = DataLoader(TensorDataset(images, targets), batch_size=16)
    assert other.calibrate(loader, **choice) == model.calibrate(loader, **choice)
    assert other.budgets == model.budgets


def test_prediction_by_a_deadline_is_of_the_exit_it_names(pair):
    (model, images), (other, moved) = pair('test_resnet')
    for deadline in (1e-3, 1e5):
        prediction = other.predict(moved, deadline_ms=deadline)
        idx = int(prediction.exit_idx[0])
        assert idx == (0 if deadline < 1 else 3)
        assert_same([prediction.logits], [model(images) if idx == 3 else model(images, exit_idx=idx)])


def test_a_network_is_saved_from_the_device_and_truncated_there(pair, tmp_path):
    (model, images), (other, moved) = pair('test_resnet')
    assert_same([tme.truncate(other, 1)(moved)], [model(images, exit_idx=1)])
    other.freeze_backbone()
    tme.save_pretrained(other, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path}/net', pretrained=True).eval()
    assert next(loaded.parameters()).device.type == 'cpu'
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_evaluation_measures_what_the_cpu_measures(pair):
    (model, images), (other, _) = pair('test_resnet', 32)
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=12)
    assert str(tme.evaluate(other, loader)) == str(tme.evaluate(model, loader))
