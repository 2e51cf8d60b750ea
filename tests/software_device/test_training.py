"""Training, resuming and validation on the software device give what they give on the CPU."""

import csv
import json

import pytest
import torch
from helpers import cases, write_images
from helpers.runs import run_script
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import timm_multiexit as tme
from timm_multiexit.cli import train, validate
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.training.trainer import Trainer

pytestmark = pytest.mark.slow  # compiles the device

# No dropout: each device draws by a generator of its own.
FLAGS = '--img-size 32 -b 8 -j 0 --epochs 2 --opt sgd --lr 0.01 --momentum 0.9'
EXITS = '--model test_resnet --exits 1,3'

RUNS = {
    'plain': '--model test_resnet',
    **{
        f'loss {name}': f'{EXITS} --exit-loss {name}{" --exit-projectors" if row.get("feature_weight") else ""}'
        for name, row in LOSSES.items()
    },
    'mixing, EMA, accumulation and clipping': (
        f'{EXITS} --eed --mixup 0.4 --cutmix 1.0 --smoothing 0.1 --model-ema --model-ema-decay 0.5'
        ' --grad-accum-steps 2 --clip-grad 1'
    ),
    'external teacher': f'{EXITS} --eed --kd-model-name {{teacher}}',
    'frozen backbone': f'{EXITS} --eed --freeze-backbone --initial-checkpoint {{weights}}',
    'backbone first': f'{EXITS} --eed --regime mixed --backbone-epochs 1',
    'channels_last': f'{EXITS} --eed --channels-last --clip-mode agc --clip-grad 0.1',
    'vision transformer': '--model test_vit --eed --exits 1',
}


@pytest.fixture(autouse=True)
def same_attention(device):
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's attention is computed by another way than other devices'
        yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of images, and a plain network that teaches or is started from."""
    folder = tmp_path_factory.mktemp('runs')
    write_images(folder / 'images')
    torch.manual_seed(5)
    model = tme.create_model('test_resnet', exits=1, num_classes=2, input_size=(3, 32, 32))
    tme.save_pretrained(model, folder / 'teacher')
    return folder


def fit(folder, name, device, flags):
    """Train and return the run's folder."""
    flags = flags.format(teacher=f'local-dir:{folder}/teacher', weights=folder / 'teacher/model.safetensors')
    places = ('--data-dir', folder / 'images', '--output', folder / 'out', '--experiment', name)
    run_on(device, train, folder, *FLAGS.split(), *flags.split(), *places)
    return folder / 'out' / name


def run_on(device, script, folder, *flags):
    """Run a script on 'cpu' or on the software device."""
    with pytest.MonkeyPatch.context() as patch:
        if device != 'cpu':
            patch.setenv('ACCELERATE_TORCH_DEVICE', device)
        run_script(script, folder, *flags, '--device', 'cpu' if device == 'cpu' else 'cuda')


def read_weights(run):
    return {
        f'{file.name}: {key}': value
        for file in sorted((run / 'best').glob('*.safetensors'))
        for key, value in load_file(file).items()
    }


def read_summary(run):
    with open(run / 'summary.csv') as file:
        return [{key: float(value or 'nan') for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same_run(actual, expected, *, rtol, atol):
    """Compare the best weights, and all numbers of all epochs."""
    torch.testing.assert_close(read_weights(actual), read_weights(expected), rtol=rtol, atol=atol)
    assert read_summary(actual) == [
        pytest.approx(row, rel=rtol, abs=atol, nan_ok=True) for row in read_summary(expected)
    ]


@pytest.mark.parametrize('flags', cases(RUNS))
def test_a_run_ends_as_on_the_cpu(flags, folder, request, capfd):
    name = request.node.callspec.id.replace(' ', '-')
    on_cpu = fit(folder, f'{name}-on-cpu', 'cpu', flags)
    assert '1 x cpu' in capfd.readouterr().err
    on_device = fit(folder, f'{name}-on-device', 'software', flags)
    assert '1 x software' in capfd.readouterr().err
    assert len(read_summary(on_device)) == 2
    assert_same_run(on_device, on_cpu, rtol=1e-4, atol=1e-4)


def test_bfloat16_trains_as_on_the_cpu_to_its_precision(folder):
    flags = f'{EXITS} --eed --amp --amp-dtype bfloat16'
    runs = [fit(folder, f'bfloat16-{device}', device, flags) for device in ('software', 'cpu')]
    assert_same_run(*runs, rtol=0.05, atol=0.5)


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(folder, monkeypatch):
    flags = f'{EXITS} --eed --model-ema --mixup 0.2'
    whole = fit(folder, 'whole', 'software', flags)
    step = Trainer._step

    def kill(trainer):
        if trainer.num_updates == 4:  # the second of the second epoch
            raise KeyError('killed')
        step(trainer)

    flags += ' --recovery-interval 1'
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_step', kill)
        with pytest.raises(KeyError, match='killed'):
            fit(folder, 'parts', 'software', flags)
    parts = fit(folder, 'parts', 'software', f'{flags} --resume auto')
    assert_same_run(parts, whole, rtol=0, atol=0)


def test_validation_reports_what_it_reports_on_the_cpu(folder):
    run = fit(folder, 'validated', 'cpu', f'{EXITS} --eed')
    reports = []
    for device in ('cpu', 'software'):
        out = folder / f'{device}.json'
        flags = '-b 8 -j 0 --split validation --calib-split train --budget 90% --time-rounds 0'
        places = ('--model', f'local-dir:{run}/best', '--data-dir', folder / 'images', '--results-file', out)
        run_on(device, validate, folder, *flags.split(), '--results-format', 'json', *places)
        reports.append(json.loads(out.read_text()))
    for name in ('rows', 'curve', 'dynamic', 'failure_auroc', 'overthinking', 'monotonicity'):
        expected, actual = (json.dumps(report[name]) for report in reports)
        assert round_numbers(actual) == round_numbers(expected), name


def round_numbers(text):
    """Return JSON whose numbers have four digits."""
    return json.loads(text, parse_float=lambda number: float(f'{float(number):.4g}'))
