"""The program that leaves at run time, against `apply_policy` on the model's own logits."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import timm_multiexit as tme
from benchmarks.exporting import compare_policies, feed_policy
from timm_multiexit.deploy.conditional import make_conditional
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA

KINDS = [(criterion, combine) for criterion in CRITERIA for combine in (None, *COMBINATIONS)]


@pytest.fixture(scope='module')
def images():
    # Of many contrasts, so that the network is sure of some of them.
    return (
        torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-1, 1, 24)[:, None, None, None]
    )


@pytest.fixture(scope='module')
def logits(small, images):
    with torch.no_grad():
        return [single.numpy() for single in small(images, exits=True).logits]


@pytest.mark.parametrize(('criterion', 'combine'), KINDS)
def test_answers_and_exits_are_those_of_the_policy(graph, images, logits, criterion, combine):
    count = 12
    report = compare_policies(graph, images.numpy(), logits, count=count, kinds=[(criterion, combine)], seed=3)
    assert report['policies'] == report['equal'] == count
    assert report['largest difference'] < 1e-5
    assert len(report['left at']) >= 3  # of four classifiers


def test_answers_and_exits_of_500_policies(graph, images, logits):
    report = compare_policies(graph, images.numpy(), logits, count=500, kinds=KINDS, seed=4)
    assert report['policies'] == report['equal'] == 500
    assert set(report['left at']) == {0, 1, 2, 3}
    assert report['with unused exits'] > 100


def branches(graph):
    """Yield a graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from branches(attribute.g)


def weights_of(graph):
    """Return the names of the large weights of a graph, those of its branches apart."""
    return {value.name for value in graph.initializer if value.data_type == TensorProto.FLOAT and len(value.dims) == 4}


def test_weights_lie_in_the_branch_that_reads_them(graph):
    program = make_conditional(graph, criterion='confidence', combine=None)
    found = {part.name: weights_of(part) for part in branches(program.graph)}
    assert {name for name, weights in found.items() if weights} == {
        'conditional', 'stage_1', 'stage_2', 'stage_3', 'head_0', 'head_1', 'head_2'
    }  # fmt: skip
    every = [name for weights in found.values() for name in weights]
    assert len(every) == len(set(every))
    assert sorted(every) == sorted(weights_of(graph.model.graph))
    # A network of one file: about as large as the whole.
    assert program.ByteSize() < 1.05 * graph.model.ByteSize()


def test_heads_that_are_not_used_are_not_run(graph, open_program, images, small):
    """Weights of NaN in a head show wherever it is run."""
    program = make_conditional(graph, criterion='confidence', combine='mean')
    for part in branches(program.graph):
        if part.name == 'head_1':
            for value in part.initializer:
                if value.data_type == TensorProto.FLOAT and value.dims:
                    value.raw_data = np.full(list(value.dims), np.nan, np.float32).tobytes()
    session = open_program(program)
    image = images[:1]
    with torch.no_grad():
        expected = small(image, exits=True).logits
    for thresholds, expected_idx, is_nan in (((1.0, None, 1.0), 3, False), ((1.0, 1.0, 1.0), 1, True)):
        answer, exit_idx = session.run(None, feed_policy(image.numpy(), tme.ExitPolicy('confidence', thresholds)))
        assert exit_idx.tolist() == [expected_idx]
        assert np.isnan(answer).any() == is_nan
        if not is_nan:
            policy = tme.ExitPolicy('confidence', thresholds, combine='mean')
            np.testing.assert_allclose(answer, tme.apply_policy(policy, expected).logits, rtol=1e-4, atol=1e-5)


def test_thresholds_are_in_the_metadata(graph):
    policy = tme.ExitPolicy('entropy', (0.5, None, 0.25), combine='geometric')
    program = make_conditional(graph, criterion='entropy', combine='geometric', policy=policy)
    notes = {entry.key: entry.value for entry in program.metadata_props}
    assert notes == {
        'criterion': 'entropy',
        'combine': 'geometric',
        'thresholds': '[0.5, null, 0.25]',
        'temperatures': '[1.0, 1.0, 1.0, 1.0]',
    }
    assert json.loads(notes['thresholds']) == list(policy.thresholds)
    plain = make_conditional(graph, criterion='margin', combine=None)
    assert {entry.key: entry.value for entry in plain.metadata_props} == {'criterion': 'margin', 'combine': 'none'}


def test_wrong_count_of_thresholds_is_refused_by_the_runtime(graph, open_program, images):
    session = open_program(make_conditional(graph, criterion='confidence', combine=None))
    feed = feed_policy(images[:1].numpy(), tme.ExitPolicy('confidence', (0.5, 0.5)))
    with pytest.raises(Exception, match='thresholds'):
        session.run(None, feed)


@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('combine', [None, 'mean', 'geometric'])
def test_logits_that_are_no_numbers_leave_where_they_are_seen(criterion, combine, graph, open_program):
    session = open_program(make_conditional(graph, criterion=criterion, combine=combine))
    image = np.full((1, 3, 64, 64), np.nan, np.float32)
    never = {'patience': 1000, 'entropy': 0.0}.get(criterion, 1.0)
    for thresholds, expected in (((never,) * 3, 0), ((None, never, never), 1), ((None, None, None), 3)):
        answer, exit_idx = session.run(None, feed_policy(image, tme.ExitPolicy(criterion, thresholds)))
        assert exit_idx.tolist() == [expected]
        assert np.isnan(answer).all()
