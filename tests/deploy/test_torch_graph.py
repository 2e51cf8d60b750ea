"""The cut of programs of `torch.export`: bit-equal to the model."""

import pytest
import torch

from timm_multiexit.deploy.torch_graph import TorchGraph


@pytest.fixture(scope='module')
def parts(exported):
    graph = TorchGraph(exported.program)
    return [graph.fixed(idx) for idx in range(4)], graph.stages()


def run_chain(stages, images):
    state, logits = (images,), []
    for stage in stages:
        found, *state = stage(*state)
        logits.append(found)
    assert not state
    return logits


@pytest.mark.parametrize('batch', [1, 2, 7])
def test_fixed_programs_and_chain_are_the_model(parts, small, batch):
    fixed, stages = ([part.module() for part in group] for group in parts)
    images = torch.randn(batch, 3, 64, 64)
    with torch.no_grad():
        expected = small(images, exits=True).logits
        assert len(expected) == len(fixed) == len(stages) == 4
        for idx, logits in enumerate(run_chain(stages, images)):
            assert logits.equal(expected[idx])
            assert fixed[idx](images)[0].equal(expected[idx])


def test_some_rows_go_on_and_the_state_of_the_host_stays(parts, small):
    stages = [part.module() for part in parts[1]]
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        _, state = stages[0](images)
        before = state.clone()
        logits, *_ = stages[1](state[[0, 3]])
        assert state.equal(before)
        torch.testing.assert_close(logits, small(images[[0, 3]], exits=True).logits[1])


def test_parameters_are_those_that_the_exit_reads(parts, small):
    params = dict(small.named_parameters())
    for idx, (part, cost) in enumerate(zip(parts[0], small.cost())):
        names = {name.removeprefix('model.') for name in part.graph_signature.inputs_to_parameters.values()}
        assert sum(params[name].numel() for name in names) == cost.fixed.params, idx


def test_inputs_are_named(parts):
    fixed, stages = parts
    assert [part.graph_signature.user_inputs for part in fixed] == [('image',)] * 4
    assert [part.graph_signature.user_inputs for part in stages] == [
        ('image',),
        ('state_0_0',),
        ('state_1_0',),
        ('state_2_0',),
    ]
