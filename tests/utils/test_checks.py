"""Checks of arguments: what they return, and the line where they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

from timm_multiexit.utils.checks import (
    check_choice,
    check_image_size,
    check_images,
    check_int,
    check_ints,
    check_number,
    is_list,
)
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, is_integer


@pytest.mark.parametrize('value', [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)], ids=repr)
def test_integers_of_all_libraries_become_ints(value):
    assert is_integer(value)
    number = check_int('n', value, 0, 3)
    assert (type(number), number) == (int, 2)


@pytest.mark.parametrize(
    'value',
    [True, np.True_, torch.tensor(True), 2.0, np.float32(2), '2', None, [2], np.array([2]), torch.tensor([2]), 2j],
    ids=repr,
)
def test_what_only_looks_like_an_integer_is_of_the_wrong_type(value):
    assert not is_integer(value)
    with pytest.raises(InvalidTypeError, match=r'^n must be an integer in \[0, 3\], got .*\. Main is 3\.$'):
        check_int('n', value, 0, 3, hint='Main is 3.')


@pytest.mark.parametrize(
    ('bounds', 'text'), [((3,), ' >= 3'), ((None, 1), ' <= 1'), ((3, 4), r' in \[3, 4\]')], ids=['low', 'high', 'both']
)
def test_range_of_an_integer_is_part_of_the_line(bounds, text):
    with pytest.raises(InvalidValueError, match=f'^n must be an integer{text}, got 2\\.$'):
        check_int('n', 2, *bounds)


def test_list_of_integers_is_any_iterable_but_text():
    for values in (
        [1, 2],
        (1, 2),
        range(1, 3),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        iter([1, 2]),
        {1: 0, 2: 0}.keys(),
    ):
        assert check_ints('n', values, 1) == (1, 2)
    assert check_ints('n', ()) == ()
    for values in ('12', 12, None, {1: 2}, [1, None], np.array(1), [[1]]):
        with pytest.raises(InvalidTypeError, match='^n must be a list of integers >= 1, got '):
            check_ints('n', values, 1)
    with pytest.raises(InvalidValueError, match=r'^n must be a list of integers >= 1, got \[1, 0\]\.$'):
        check_ints('n', [1, 0], 1)
    assert not is_list(torch.tensor(1))


def test_number_is_of_any_real_type_and_in_its_range():
    for value in (0.5, np.float16(0.5), np.float64(0.5)):
        number = check_number('p', value, 0, 1)
        assert (type(number), number) == (float, 0.5)
    assert check_number('p', np.int64(1), 0, 1) == 1.0
    for value, error in ((float('nan'), InvalidValueError), (1, InvalidValueError), ('1', InvalidTypeError)):
        with pytest.raises(error, match=r'^p must be in \(0, 1\), got '):
            check_number('p', value, 0, 1, is_open=True)
    with pytest.raises(InvalidTypeError, match='got True'):
        check_number('p', True, 0, 1)


def test_choice_is_text():
    assert check_choice('unit', 'ms', ('MACs', 'ms')) == 'ms'
    for value, error in (('s', InvalidValueError), (None, InvalidTypeError), (['ms'], InvalidTypeError)):
        with pytest.raises(error, match='^unit must be one of MACs, ms, got '):
            check_choice('unit', value, ('MACs', 'ms'))


def test_image_size_has_channels_first():
    assert check_image_size('size', np.array([3, 224, 192])) == (3, 224, 192)
    assert check_image_size('size', (3, 4, 4)) == (3, 4, 4)
    assert check_image_size('size', (13, 64, 64)) == (13, 64, 64)  # satellites
    with pytest.raises(
        InvalidValueError, match=r'got \(224, 192, 3\), which looks like \(height, width, channels\)\.$'
    ):
        check_image_size('size', (224, 192, 3))
    with pytest.raises(
        InvalidValueError, match=r'^size must be \(3, height, width\) for this model, got \(1, 8, 8\)\.$'
    ):
        check_image_size('size', (1, 8, 8), 3)


def test_images_that_are_traced_are_let_through():
    """Their sizes and types are the tracer's matter."""
    layer = nn.Conv2d(3, 2, 1)

    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            check_images(x, 3, self.layer)
            return self.layer(x)

    x = torch.randn(2, 3, 4, 4)
    expected = layer(x)
    assert torch.equal(torch.fx.symbolic_trace(Checked())(x), expected)
    assert torch.equal(torch.jit.trace(Checked(), x)(x), expected)
    program = torch.export.export(Checked(), (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert torch.equal(program.module()(x), expected)
    assert [node for node in program.graph.nodes if 'sym_constrain' in str(node.target)] == []
    with pytest.raises(InvalidValueError, match=r'\[B, 3, H, W\], got \[2, 4, 4, 4\]'):
        Checked()(torch.randn(2, 4, 4, 4))


def test_device_is_left_to_the_hooks_that_move_images():
    layer = nn.Conv2d(3, 2, 1, device='meta')
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(InvalidValueError, match='^Images must be on meta, where the model is, got cpu: x.to'):
        check_images(x, 3, layer)
    layer._hf_hook = object()  # what accelerate.hooks.add_hook_to_module sets
    check_images(x, 3, layer)
