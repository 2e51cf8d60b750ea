"""Flags under FSDP2, and what cannot be sharded; test_fsdp.py trains."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.sharding import SHARDED_OPTIMIZERS, check_flags, shard_task
from timm_multiexit.utils.errors import InvalidValueError, MultiExitError

FLAGS_OF_WHOLE_MODELS = {
    'compile': ({'torchcompile': 'inductor'}, '--torchcompile is not supported with FSDP2'),
    'channels-last': ({'channels_last': True}, '--channels-last is not supported with FSDP2'),
    'average-on-cpu': ({'model_ema_force_cpu': True}, '--model-ema-force-cpu is not supported with FSDP2'),
    'optimizer': ({'opt': 'adamp'}, '--opt must be one of sgd, .* with FSDP2, got adamp'),
    'clipping': ({'clip_grad': 1.0, 'clip_mode': 'agc'}, '--clip-mode must be norm or value with FSDP2, got agc'),
    'features': ({'kd_model_name': 'resnet18', 'kd_distill_type': 'feature'}, '--kd-distill-type feature is not'),
    'statistics': ({'dist_bn': ''}, '--dist-bn must be reduce or broadcast with FSDP2'),
}


@pytest.mark.parametrize(('values', 'message'), FLAGS_OF_WHOLE_MODELS.values(), ids=FLAGS_OF_WHOLE_MODELS.keys())
def test_flags_that_need_whole_parameters_are_one_line_under_fsdp2(values, message):
    args = parse_train_args(['--eed'])
    check_flags(args)
    assert set(values) <= set(vars(args))
    with pytest.raises(MultiExitError, match=message) as error:
        check_flags(Namespace(**vars(args) | values))
    assert '\n' not in str(error.value)


def test_optimizers_of_sharded_models_are_timms():
    assert set(SHARDED_OPTIMIZERS) <= set(list_optimizers())


def test_module_that_cannot_be_sharded_is_one_line():
    def prepare(*args):
        raise ValueError('Could not find the transformer layer class NoSuchBlock in the model.')

    task = SimpleNamespace(trainable_module=nn.Linear(2, 2))
    optimizer = torch.optim.SGD(task.trainable_module.parameters())
    with pytest.raises(InvalidValueError, match='Cannot shard the model: .* layer class NoSuchBlock') as error:
        shard_task(task, optimizer, SimpleNamespace(prepare=prepare))
    assert '\n' not in str(error.value)
