"""The program of all classifiers, and what of it ONNX takes badly."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import timm_multiexit as tme
from timm_multiexit.deploy.programs import convert_program, copy_for_export, flatten_attention, trace_program


def attach(trunk, channels=4):
    """Return a model of a convolution, which has an exit, and a trunk that gives `channels` at 8 x 8 pixels."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    return tme.attach_exits(module, ['0'], input_size=(3, 8, 8), head='linear').eval()


def convert(model):
    return convert_program(trace_program(copy_for_export(model), (3, 8, 8)), 'model')


def check(model, whole, open_program):
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = model(images, exits=True).logits
        found = open_program(whole).run(None, {'image': images.numpy()})
        assert len(found) == len(expected) == 2
        for one, two in zip(found, expected):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Attention of each row of a map to itself, in two heads: five dimensions."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).unflatten(3, (2, 2)).transpose(2, 3)  # [B, rows, heads, columns, 2]
        x = F.scaled_dot_product_attention(x, x * 2, x + 1)
        return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


class JoinedAttention(nn.Module):
    """Attention of each row of a map to itself, rows and images together: three dimensions, a mask for each or all."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B * rows, columns, 4]
        mask = {'none': None, 'each': rows @ rows.mT, 'all': torch.eye(8, device=x.device)}[self.mask]
        attended = F.scaled_dot_product_attention(rows, rows * 2, rows + 1, attn_mask=mask)
        return attended.unflatten(0, (-1, 8)).permute(0, 3, 1, 2)


ATTENTION = {
    'five-dimensions': Attention(),
    **{f'three-dimensions-mask-{mask}': JoinedAttention(mask) for mask in ('none', 'each', 'all')},
}


@pytest.mark.parametrize('trunk', ATTENTION.values(), ids=ATTENTION)
def test_attention_over_other_dimensions_than_four(trunk, open_program):
    model = attach(trunk)
    program = trace_program(copy_for_export(model), (3, 8, 8))
    images = torch.randn(5, 3, 8, 8)
    expected = program.module()(images)
    flatten_attention(program)
    for one, two in zip(program.module()(images), expected):
        torch.testing.assert_close(one, two)
    check(model, convert_program(program, 'model'), open_program)


class Clamps(nn.Module):
    """Clamps one value three times, by bounds that are buffers, as Gemma's layers do."""

    def __init__(self):
        super().__init__()
        for idx in range(3):
            self.register_buffer(f'low{idx}', torch.tensor(-1.0 - idx))
            self.register_buffer(f'high{idx}', torch.tensor(0.5 + idx))

    def forward(self, x):
        x = x * 3
        return sum(torch.clamp(x, getattr(self, f'low{idx}'), getattr(self, f'high{idx}')) for idx in range(3))


def test_several_clamps_of_one_value(open_program):
    model = attach(Clamps())
    check(model, convert(model), open_program)


def test_pooling_of_a_channels_last_map_is_a_mean(open_program):
    class ChannelsLast(nn.Module):
        def forward(self, x):
            return x.contiguous(memory_format=torch.channels_last) * 2

    model = attach(ChannelsLast())
    whole = convert(model)
    kinds = {node.op_type for node in whole.graph.node}
    assert 'ReduceMean' in kinds
    assert not kinds & {'Gather', 'GatherND', 'Loop', 'GlobalAveragePool'}
    check(model, whole, open_program)


def test_copy_is_in_float32_in_eval_mode_and_does_not_checkpoint(make_model):
    model = make_model().half().train()
    model.set_grad_checkpointing(True)
    copy = copy_for_export(model)
    assert not any(module.training for module in copy.modules())
    assert {param.dtype for param in copy.parameters()} == {torch.float32}
    assert not any(getattr(module, 'grad_checkpointing', False) for module in copy.modules())
    assert model.training
    assert model.backbone.grad_checkpointing
    assert next(model.parameters()).dtype == torch.half
    assert not {param.data_ptr() for param in copy.parameters()} & {param.data_ptr() for param in model.parameters()}


def test_weights_beyond_a_file_of_onnx_are_refused(monkeypatch):
    program = trace_program(copy_for_export(attach(nn.Identity())), (3, 8, 8))
    monkeypatch.setattr('timm_multiexit.deploy.programs._MAX_PROTO_BYTES', 100)
    with pytest.raises(tme.MultiExitError, match=r'must have at most 100 bytes to be a file of ONNX, got \d+'):
        convert_program(program, 'model')
