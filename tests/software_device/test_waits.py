"""How often the host waits for the device in each call: a table, printed, and a stray `.item()` changes it.

`pytest -m slow -rP tests/software_device/test_waits.py` shows it.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers.members import QUICK

import software_device
from benchmarks.inference import force_policy
from benchmarks.training import create_step, create_train_args
from timm_multiexit.cli.launch import create_accelerator
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.text import format_table

pytestmark = pytest.mark.slow  # compiles the device

EVERYBODY, NOBODY = 0.0, 1.0
MODEL = {'model': 'test_resnet', 'img_size': 32, 'batch_size': 8, 'num_classes': 10, 'data_dir': None}


def leave_at(idx):
    """Return the policy by which every image leaves at that exit of three."""
    return ExitPolicy('confidence', [EVERYBODY if at == idx else NOBODY for at in range(3)])


# Call -> what is called with model, images and a policy by which half of the images leave at each exit; its waits.
CALLS = {
    'model(x)': (lambda model, x, half: model(x), {}),
    'model(x, exits=True)': (lambda model, x, half: model(x, exits=True), {}),
    **{f'model(x, exit_idx={idx})': (lambda model, x, half, idx=idx: model(x, exit_idx=idx), {}) for idx in range(3)},
    'model.anytime(x), to its end': (lambda model, x, half: list(model.anytime(x)), {}),
    'model.anytime(x), one exit': (lambda model, x, half: next(iter(model.anytime(x))), {}),
    **{
        f'model.infer(x), all leave at exit {idx}': (
            lambda model, x, half, idx=idx: model.infer(x, leave_at(idx)),
            {'copy to host': idx + 1},
        )
        for idx in range(3)
    },
    'model.infer(x), none leaves': (lambda model, x, half: model.infer(x, leave_at(3)), {'copy to host': 3}),
    'model.infer(x), half leave at each exit': (lambda model, x, half: model.infer(x, half), {'copy to host': 3}),
    'model.infer(x), half leave, buckets': (
        lambda model, x, half: model.infer(x, half, bucket_sizes=(2, 4, 8)),
        {'copy to host': 3},
    ),
    'model.infer(x), exit 1 alone is used': (
        lambda model, x, half: model.infer(x, threshold=(None, 0.5, None)),
        {'copy to host': 1},
    ),
}


def print_table(rows):
    table = [
        {'call': name, 'waits': sum(waits.values()), 'of which': ', '.join(f'{n} {kind}' for kind, n in waits.items())}
        for name, waits in rows.items()
    ]
    print(format_table(table))


@pytest.mark.parametrize('name', QUICK)
@torch.no_grad()
def test_inference_waits_once_for_each_exit_that_decides(name, make_small, device):
    model = make_small(name).eval().to(device)
    images = torch.randn(8, *model.input_size).to(device)
    half = force_policy([logits.cpu() for logits in model(images, exits=True).logits], 0.5)
    model.can_leave  # noqa: B018  # tried once, by forwards whose results are read
    counted = {}
    for call, (run, _) in CALLS.items():
        run(model, images, half)
        with software_device.waits() as counted[call]:
            run(model, images, half)
    print(name)
    print_table(counted)
    assert counted == {call: waits for call, (_, waits) in CALLS.items()}


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_training_step_never_waits(precision, device, monkeypatch):
    monkeypatch.setenv('ACCELERATE_TORCH_DEVICE', 'software')
    batch = torch.randn(8, 3, 32, 32).to(device), (torch.arange(8) % 10).to(device)
    counted = {}
    for loss in (None, *LOSSES):
        args = SimpleNamespace(
            **MODEL,
            exits='auto',
            exit_head='conv',
            channels_last=False,
            torchcompile=False,
            device='cuda',
            amp=precision == 'bfloat16',
        )
        train_args = create_train_args(args, loss)
        step, model = create_step(train_args, create_accelerator(train_args))
        assert next(model.parameters()).device == device
        step(*batch)
        with software_device.waits() as counted[f'training step, {loss or "plain timm"}']:
            step(*batch)
    print_table(counted)
    assert counted == dict.fromkeys(counted, {})


def test_a_stray_item_changes_the_table(make_model, device):
    model = make_model().eval().to(device)
    images = torch.randn(2, 3, 64, 64).to(device)
    model.exits[0].register_forward_hook(lambda module, args, output: bool(output[0].sum() > 0) and None)
    with software_device.waits() as waits:
        model(images, exits=True)
    assert waits == {'item': 1}
