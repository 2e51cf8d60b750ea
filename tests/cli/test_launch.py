"""Every way of starting a run: those that are supported come to the same, the others are one line."""

import argparse
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.config import config_args
from accelerate.utils import DistributedType, write_basic_config

from timm_multiexit.cli import train, validate
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.launch import create_accelerator
from timm_multiexit.utils.errors import MultiExitError

VARIABLES = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'ACCELERATE_USE_CPU')
VARIABLES += ('ACCELERATE_USE_FSDP', 'ACCELERATE_USE_DEEPSPEED', 'ACCELERATE_MIXED_PRECISION')
VARIABLES += ('FSDP_VERSION', 'FSDP_CPU_RAM_EFFICIENT_LOADING')  # which Accelerate sets itself
FSDP2 = {'ACCELERATE_USE_FSDP': 'true', 'FSDP_VERSION': '2'}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, '')  # so that what Accelerate sets is taken back
        monkeypatch.delenv(name)


def make_args(**values):
    return argparse.Namespace(
        **{'amp': False, 'amp_dtype': 'float16', 'device': 'cpu', 'device_modules': None, **values}
    )


REFUSED = {
    'fsdp1': ({'ACCELERATE_USE_FSDP': 'true'}, '--fsdp_version must be 2, got 1. Launch with .*--fsdp_version 2'),
    'fsdp-alone': (FSDP2, 'FSDP2 needs processes that were started together, got NO. .*accelerate launch --use_fsdp'),
    'offload': ({**FSDP2, 'FSDP_OFFLOAD_PARAMS': 'true'}, '--fsdp_offload_params is not supported .*got true: leave'),
    'activation-checkpointing': (
        {**FSDP2, 'FSDP_ACTIVATION_CHECKPOINTING': 'true'},
        '--fsdp_activation_checkpointing is not supported .*use --grad-checkpointing',
    ),
    'ignored-modules': ({**FSDP2, 'FSDP_IGNORED_MODULES': 'exits.*'}, '--fsdp_ignored_modules is not supported'),
    'tensor-parallel': (
        {**FSDP2, 'ACCELERATE_USE_PARALLELISM_CONFIG': 'true'},
        '--use_parallelism_config is not supported',
    ),
    'sharded-files': (
        {**FSDP2, 'FSDP_STATE_DICT_TYPE': 'SHARDED_STATE_DICT'},
        '--fsdp_state_dict_type must be FULL_STATE_DICT, got SHARDED_STATE_DICT',
    ),
    'dynamo': ({**FSDP2, 'ACCELERATE_DYNAMO_BACKEND': 'inductor'}, '--dynamo_backend is not supported .*got inductor'),
    'wrap-policy': ({**FSDP2, 'FSDP_AUTO_WRAP_POLICY': 'BLOCKS'}, 'Cannot set up FSDP2: Invalid auto wrap policy'),
    'deepspeed': ({'ACCELERATE_USE_DEEPSPEED': '1'}, 'DEEPSPEED is not supported, .*Leave --use_deepspeed out'),
    'one-of-two': (
        {'ACCELERATE_USE_CPU': 'True', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'},
        'started one of several processes, .*torchrun --nproc-per-node 2 -m timm_multiexit.cli.train',
    ),
}


@pytest.mark.parametrize(('env', 'message'), REFUSED.values(), ids=REFUSED.keys())
def test_launcher_that_is_not_supported_is_one_line(env, message, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MultiExitError, match=message) as error:
        create_accelerator(make_args())
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('precision', 'message'), [('fp16', 'fp16 needs a GPU .*Use bf16'), ('fp8', 'must be no, fp16 or bf16, got fp8')]
)
def test_precision_that_accelerate_cannot_give_is_one_line(precision, message, monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', precision)
    with pytest.raises(MultiExitError, match=message) as error:
        create_accelerator(make_args())
    assert '\n' not in str(error.value)
    # The script's own flag goes before.
    accelerator = create_accelerator(make_args(amp=True, amp_dtype='bfloat16'))
    assert accelerator.mixed_precision == 'bf16'


def test_script_says_so_with_code_2_and_writes_nothing(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    code, out, err = run_script(train.main, '--eed')
    assert code == 2
    assert err.splitlines()[-1].startswith('train.py: error: --fsdp_version must be 2')
    assert 'Traceback' not in err
    assert not out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('value', ['false', '0', 'no'])
def test_variables_that_say_no_are_not_a_launcher(value, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', value)
    monkeypatch.setenv('ACCELERATE_USE_CPU', value)
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')  # some shells of clusters set it always
    assert create_accelerator(make_args()).num_processes == 1


def test_kind_of_processes_that_is_not_supported_is_one_line(monkeypatch):
    monkeypatch.setattr(Accelerator, 'distributed_type', DistributedType.MEGATRON_LM)
    with pytest.raises(MultiExitError, match='one process, DistributedDataParallel or FSDP2, got MEGATRON_LM') as error:
        create_accelerator(make_args())
    assert '\n' not in str(error.value)


def test_fewer_processes_than_launched_are_named(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    # Where Accelerate sees no cluster, each process would train for itself and overwrite the other's files.
    monkeypatch.setattr(Accelerator, 'num_processes', 1)
    monkeypatch.setattr('timm_multiexit.cli.launch.Accelerator', lambda **kwargs: _single())
    with pytest.raises(MultiExitError, match='2 processes were launched, and Accelerate runs 1') as error:
        create_accelerator(make_args())
    assert '\n' not in str(error.value)


def _single():
    return argparse.Namespace(distributed_type=DistributedType.NO, num_processes=1)


@pytest.mark.parametrize('has_gpu', [False, True])
def test_float16_on_a_cpu_is_one_line(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: has_gpu)
    with pytest.raises(MultiExitError, match='--amp in float16 needs a GPU .*--amp-dtype bfloat16') as error:
        create_accelerator(make_args(amp=True))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('values', 'dtype'),
    [({}, torch.float32), ({'amp': True, 'amp_dtype': 'bfloat16'}, torch.bfloat16)],
    ids=['float32', 'bfloat16'],
)
def test_precision_is_that_of_the_flags(values, dtype):
    accelerator = create_accelerator(make_args(**values))
    assert (accelerator.device.type, accelerator.num_processes) == ('cpu', 1)
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(('amp', 'is_fast', 'expected'), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_bfloat16_that_a_cpu_cannot_compute_is_warned_of(amp, is_fast, expected, monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: is_fast)
    create_accelerator(make_args(amp=amp, amp_dtype='bfloat16'))
    assert caplog.text.count('bfloat16 is many times slower than float32 on this CPU') == expected


def test_precision_of_accelerates_own_configuration_holds_without_amp(monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    assert create_accelerator(make_args()).mixed_precision == 'bf16'


def test_backend_module_is_imported_and_a_missing_one_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'my_backend.py').write_text('imported = True\n')
    monkeypatch.syspath_prepend(tmp_path)
    create_accelerator(make_args(device_modules=['my_backend']))
    assert __import__('my_backend').imported
    with pytest.raises(MultiExitError, match="Cannot import 'no_such_backend' of --device-modules") as error:
        create_accelerator(make_args(device_modules=['no_such_backend']))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('script', [train, validate], ids=['train', 'validate'])
@pytest.mark.parametrize('name', ['httpx', 'httpx2'])
def test_log_of_a_script_has_no_addresses_of_the_hubs_client(script, name, run_script, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger(name), 'level', logging.NOTSET)
    monkeypatch.setattr(logging.root, 'level', logging.WARNING)
    caplog.clear()
    run_script(script.main, '--model', 'no_such_model')
    logging.getLogger(name).info('HTTP Request: GET https://cdn/x?signature=abc')
    logging.getLogger(name).warning('a warning')
    logging.getLogger('timm_multiexit.any').info('an event')
    messages = [record.message for record in caplog.records if record.name in (name, 'timm_multiexit.any')]
    assert messages == ['a warning', 'an event']


@pytest.mark.parametrize(('cores', 'warned'), [({0}, True), ({0, 1}, False)], ids=['one-core', 'two-cores'])
def test_more_workers_than_cores_are_warned_of_in_one_line_with_the_fix(
    cores, warned, run_script, image_folder, monkeypatch, recwarn
):
    """And torch, which says so for every loader, not at all; neither does timm say what it loaded as nothing."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: cores)
    flags = ('--eed', '--model', 'test_resnet', '--img-size', 32, '-b', 8, '--epochs', 1, '--warmup-epochs', 0)
    code, out, err = run_script(train.main, *flags, '-j', 2, '--data-dir', image_folder)
    assert code == 0
    lines = [line for line in err.splitlines() if 'worker' in line]
    assert (
        lines == ['WARNING: --workers 2 are more than the 1 CPU core: loading may be slow. Add --workers 1.'] * warned
    )
    assert not [warning for warning in recwarn if 'worker' in str(warning.message)]
    assert 'test_resnet on the validation split' in out
    assert 'from checkpoint' not in out + err


WARMUPS = {
    'default': (('--epochs', 2), '--warmup-epochs 5 .* of --epochs 2: .* Add --warmup-epochs 0.'),
    'equal': (('--epochs', 5), '--warmup-epochs 5 .* of --epochs 5: .* Add --warmup-epochs 1.'),
    'long-run': (('--epochs', 6), None),
    'shorter': (('--epochs', 2, '--warmup-epochs', 1), None),
    'before-the-epochs': (('--epochs', 2, '--warmup-prefix'), None),
    'no-schedule': (('--epochs', 2, '--sched', 'none'), None),
}


@pytest.mark.parametrize(('flags', 'message'), WARMUPS.values(), ids=WARMUPS.keys())
def test_warm_up_that_takes_the_whole_run_is_warned_of_with_the_fix(flags, message, caplog):
    args = parse_train_args(['--data-dir', 'x', '--eed', *map(str, flags)], 'train.py')
    train._warn_of_warmup(args, None)
    assert len(caplog.messages) == (message is not None)
    if message:
        assert re.fullmatch(message, caplog.messages[0])
        fix = caplog.messages[0].rstrip('.').split()[-2:]
        caplog.clear()
        train._warn_of_warmup(parse_train_args(['--data-dir', 'x', '--eed', *map(str, flags), *fix], 'train.py'), None)
        assert not caplog.messages


LAUNCHES = {
    'nothing': ('', False, True),
    'quiet': ('--quiet', False, True),
    'values': ('--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no', False, False),
    'config': ('', True, False),
}


@pytest.mark.parametrize(('flags', 'has_config', 'is_noisy'), LAUNCHES.values(), ids=LAUNCHES.keys())
def test_lines_of_the_launcher_are_gone_as_the_docs_say(flags, has_config, is_noisy, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    path = tmp_path / 'default_config.yaml'
    monkeypatch.setattr(launch, 'default_config_file', str(path))
    monkeypatch.setattr(config_args, 'default_yaml_config_file', str(path))
    monkeypatch.setattr(config_args, 'default_config_file', str(path))
    if has_config:
        write_basic_config(save_location=str(path))
    launch._validate_launch_command(launch.launch_command_parser().parse_args([*flags.split(), 'train.py']))
    assert any('were not passed to `accelerate launch`' in message for message in caplog.messages) == is_noisy
    page = ' '.join((Path(__file__).parents[2] / 'docs/distributed.md').read_text(encoding='utf-8').split())
    assert flags in page
