"""The cut of ONNX graphs, on graphs written by hand: what crosses, who owns which weights, where the batch is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from timm_multiexit.deploy.graph import ExitGraph, read_shape, rename_values
from timm_multiexit.utils.errors import InvalidValueError

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def make_graph(nodes, weights, shapes, exits, symbol='s0', image=(3,)):
    """Return a model: image [s0, ...] -> two-class logits of some names, with the shapes of all inner values."""
    values = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        nodes,
        'whole',
        [helper.make_tensor_value_info('image', FLOAT, [symbol, *image])],
        [helper.make_tensor_value_info(name, FLOAT, [symbol, 2]) for name in exits],
        initializer=[numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return model


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def run(open_program, program, **feed):
    session = open_program(program)
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed)))


def run_chain(open_program, stages, image):
    feed, logits = {'image': image}, []
    for stage in stages:
        found = run(open_program, stage, **feed)
        logits.append(found.pop('logits'))
        feed = found
    assert feed == {}
    return logits


def check_cut(open_program, whole, batches=(1, 2, 5)):
    """Compare all cuts with the whole graph, and return the cut."""
    graph = ExitGraph(whole)
    stages, fixed = graph.stages(), [graph.fixed(idx) for idx in range(len(graph.exits))]
    for batch in batches:
        dims = [dim.dim_value for dim in whole.graph.input[0].type.tensor_type.shape.dim][1:]
        image = random(batch, *dims)
        expected = list(run(open_program, whole, image=image).values())
        for found in (
            run_chain(open_program, stages, image),
            [run(open_program, program, image=image)['logits'] for program in fixed],
        ):
            assert len(found) == len(expected)
            for one, two in zip(found, expected):
                np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    return graph


def names(values):
    return [value.name for value in values]


TWO_EXITS = (
    [
        node('MatMul', 'image w0', 'a'),
        node('Relu', 'a', 'b'),
        node('MatMul', 'b head', 'early'),
        node('MatMul', 'b w1', 'late'),
    ],
    {'w0': random(3, 4), 'head': random(4, 2), 'w1': random(4, 2)},
    {'a': ['s0', 4], 'b': ['s0', 4]},
    ('early', 'late'),
)


def test_stages_pass_what_crosses_and_programs_have_their_own_weights_alone(open_program):
    graph = check_cut(open_program, make_graph(*TWO_EXITS))
    first, last = graph.stages()
    assert (names(first.graph.input), names(first.graph.output)) == (['image'], ['logits', 'state_0_0'])
    assert (names(last.graph.input), names(last.graph.output)) == (['state_0_0'], ['logits'])
    assert [str(dim) for dim in read_shape(last.graph.input[0])] == ['batch', '4']
    assert set(names(first.graph.initializer)) == {'w0', 'head'}
    assert names(last.graph.initializer) == ['w1']
    assert set(names(graph.fixed(0).graph.initializer)) == {'w0', 'head'}
    assert set(names(graph.fixed(1).graph.initializer)) == {'w0', 'w1'}
    assert [len(program.graph.node) for program in (first, last)] == [3, 1]


def test_value_of_an_early_stage_is_passed_through_the_ones_between(open_program):
    nodes, weights, shapes, _ = TWO_EXITS
    nodes = [
        *nodes[:3],
        node('Add', 'a three', 'c'),
        node('MatMul', 'c head', 'middle'),
        node('Mul', 'b image_sum', 'd'),
        node('ReduceSum', 'image one', 'image_sum', keepdims=1),
        node('Add', 'd c', 'e'),
        node('MatMul', 'e w1', 'late'),
    ]
    nodes[5], nodes[6] = nodes[6], nodes[5]
    weights = {**weights, 'three': random(4), 'one': np.array([1])}
    shapes = {**shapes, 'c': ['s0', 4], 'd': ['s0', 4], 'e': ['s0', 4], 'image_sum': ['s0', 1]}
    graph = check_cut(open_program, make_graph(nodes, weights, shapes, ('early', 'middle', 'late')))
    first, second, last = graph.stages()
    # a, b and the image cross the first cut; the image is read again by the last stage, and b passes the second.
    assert graph.crossing(0) == ['a', 'image', 'b']
    assert graph.crossing(1) == ['image', 'b', 'c']
    assert names(second.graph.input) == ['state_0_0', 'state_0_1', 'state_0_2']
    assert names(second.graph.output) == ['logits', 'state_1_0', 'state_1_1', 'state_1_2']
    assert names(last.graph.input) == ['state_1_0', 'state_1_1', 'state_1_2']
    # `head` is read by two stages, and both have it.
    assert all('head' in names(program.graph.initializer) for program in (first, second))


def test_sizes_of_the_batch_are_read_off_the_state(open_program):
    nodes, weights, shapes, exits = TWO_EXITS
    nodes = [
        node('Shape', 'image', 'count', start=0, end=1),
        *nodes[:3],
        node('Shape', 'b', 'all'),
        node('Slice', 'all from to', 'count_again'),
        node('Concat', 'count_again two', 'shape', axis=0),
        node('Expand', 'token shape', 'tokens'),
        node('Concat', 'count two', 'shape2', axis=0),
        node('Reshape', 'tokens shape2', 'same'),
        node('MatMul', 'b w1', 'd'),
        node('Add', 'd same', 'late'),
    ]
    weights = {**weights, 'two': np.array([2]), 'token': random(1, 2), 'from': np.array([0]), 'to': np.array([1])}
    graph = check_cut(open_program, make_graph(nodes, weights, shapes, exits))
    assert graph.crossing(0) == ['b']
    last = graph.stages()[1]
    assert [each.input[0] for each in last.graph.node if each.op_type == 'Shape'] == ['state_0_0']


@pytest.mark.parametrize(
    ('to', 'back', 'shape', 'op'),
    [
        pytest.param([-1, 2], [-1, 4], ['2*s0', 2], 'Reshape', id='two rows of an image'),
        pytest.param([1, 0], [1, 0], [4, 's0'], 'Transpose', id='the batch last'),
    ],
)
def test_state_has_the_batch_first(open_program, to, back, shape, op):
    nodes, weights, shapes, exits = TWO_EXITS
    if op == 'Reshape':
        there, again = node('Reshape', 'b to', 'x'), node('Reshape', 'y back', 'z')
    else:
        there, again = node('Transpose', 'b', 'x', perm=to), node('Transpose', 'y', 'z', perm=back)
    nodes = [
        *nodes[:2],
        there,
        node('Relu', 'x', 'y'),
        again,
        node('MatMul', 'z head', 'early'),
        node('Add', 'y y', 'doubled'),
        node('Transpose' if op == 'Transpose' else 'Reshape', 'doubled' + ' back' * (op == 'Reshape'), 'w',
             **({'perm': back} if op == 'Transpose' else {})),
        node('MatMul', 'w w1', 'late'),
    ]  # fmt: skip
    weights = {**weights, 'to': np.array(to), 'back': np.array(back)}
    shapes = {**shapes, 'x': shape, 'y': shape, 'doubled': shape, 'z': ['s0', 4], 'w': ['s0', 4]}
    graph = check_cut(open_program, make_graph(nodes, weights, shapes, exits))
    assert graph.crossing(0) == ['y']
    state = graph.stages()[0].graph.output[1]
    assert [str(dim) for dim in read_shape(state)] == (['batch', '2', '2'] if op == 'Reshape' else ['batch', '4'])


def test_state_without_the_batch_is_refused():
    nodes, weights, shapes, exits = TWO_EXITS
    nodes = [*nodes[:3], node('ReduceSum', 'b zero', 'sums', keepdims=1), node('Add', 'b sums', 'c')]
    nodes += [
        node('MatMul', 'sums head', 'early2'),
        node('Add', 'early early2', 'first'),
        node('MatMul', 'c w1', 'late'),
    ]
    weights = {**weights, 'zero': np.array([0])}
    shapes = {**shapes, 'c': ['s0', 4], 'early': ['s0', 2], 'sums': [1, 4], 'early2': [1, 2]}
    graph = ExitGraph(make_graph(nodes, weights, shapes, ('first', 'late')))
    with pytest.raises(
        InvalidValueError, match=r'cannot be cut into stages: the value sums, .* has the shape \[1, 4\]'
    ):
        graph.stages()


def test_quantized_graph_is_cut_at_the_integers(open_program):
    """The state is the uint8 value, and both stages turn it back to floats by themselves."""
    nodes = [
        node('MatMul', 'image w0', 'a'),
        node('QuantizeLinear', 'a scale zero', 'q'),
        node('DequantizeLinear', 'q scale zero', 'b'),
        node('MatMul', 'b head', 'early'),
        node('MatMul', 'b w1', 'late'),
    ]
    weights = {**TWO_EXITS[1], 'scale': np.float32(0.05), 'zero': np.uint8(128)}
    model = make_graph(nodes, weights, {'a': ['s0', 4], 'b': ['s0', 4]}, ('early', 'late'))
    graph = check_cut(open_program, model)
    first, last = graph.stages()
    assert first.graph.output[1].type.tensor_type.elem_type == TensorProto.UINT8
    assert [each.op_type for each in last.graph.node] == ['DequantizeLinear', 'MatMul']


def test_shapes_that_are_missing_are_inferred(open_program):
    nodes, weights, _, exits = TWO_EXITS
    graph = check_cut(open_program, make_graph(nodes, weights, {}, exits))
    assert names(graph.stages()[1].graph.input) == ['state_0_0']


def test_branches_are_renamed_with_their_values():
    inner = helper.make_graph([node('Add', 'x y', 'z')], 'then', [], [helper.make_tensor_value_info('z', FLOAT, [1])])
    outer = helper.make_node('If', ['condition'], ['out'], then_branch=inner, else_branch=inner)
    renamed = rename_values(outer, {'x': 'X', 'z': 'Z', 'condition': 'C'})
    assert (list(renamed.input), list(renamed.output)) == (['C'], ['out'])
    for attribute in renamed.attribute:
        assert list(attribute.g.node[0].input) == ['X', 'y']
        assert names(attribute.g.output) == ['Z']
    assert list(outer.input) == ['condition']


def test_traced_network_is_cut_at_one_value_each(graph, small):
    assert graph.exits == ['exit_0', 'exit_1', 'exit_2', 'main']
    stages = graph.stages()
    assert [len(stage.graph.output) - 1 for stage in stages] == [1, 1, 1, 0]
    counts = [
        sum(int(np.prod(value.dims)) for value in graph.fixed(idx).graph.initializer if value.data_type == FLOAT)
        for idx in range(4)
    ]
    # The parameters that each exit reads; norms are folded into convolutions, two numbers a channel fewer.
    for count, cost in zip(counts, small.cost()):
        assert 0.93 * cost.fixed.params < count <= cost.fixed.params
    assert all(value.data_type in (FLOAT, INT) for value in graph.model.graph.initializer)
