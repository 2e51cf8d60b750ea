"""The graph of all classifiers, cut into one program per exit and into a chain of stages."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import sympy
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from timm_multiexit.utils.errors import InvalidValueError

BATCH = 'batch'  # name of the dimension, and of the value of one integer that has its size

# What a value depends on: weights alone, also the size of the batch, or the image.
_CONSTANT, _SIZE, _DATA = range(3)


def graph_inputs(node: NodeProto) -> list[str]:
    """Return the values that a node reads, also in its branches, of the graph that it is in."""
    names = [name for name in node.input if name]
    for graph in _subgraphs(node):
        inner = {name for each in graph.node for name in each.output}
        inner |= {value.name for value in (*graph.input, *graph.initializer)}
        read = [name for each in graph.node for name in graph_inputs(each)] + [value.name for value in graph.output]
        names += [name for name in read if name not in inner]
    return names


def rename_values(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Return a copy of a node with other names for some values, also in its branches."""
    node = copy.deepcopy(node)
    for values in (node.input, node.output):
        for idx, name in enumerate(values):
            values[idx] = names.get(name, name)
    for graph in _subgraphs(node):
        nodes = [rename_values(each, names) for each in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        for value in graph.output:
            value.name = names.get(value.name, value.name)
    return node


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    graphs = []
    for attribute in node.attribute:
        graphs += [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
    return graphs


class ExitGraph:
    """The graph of all classifiers, each node labelled with the shallowest classifier that needs it.

    What depends on weights or the batch size alone belongs to nobody: every program has its own copy of what it needs.

    Args:
        model: One input, [batch, C, H, W], and the logits of all classifiers as outputs, main last.

    Attributes:
        exits: Names of the outputs, shallow to deep.
        image: Name of the input.
    """

    def __init__(self, model: ModelProto):
        self.model = _normalize(model)
        graph = self.graph = self.model.graph
        self.initializers = {value.name: value for value in graph.initializer}
        self.image = graph.input[0].name
        self.exits = [value.name for value in graph.output]
        self.info = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self._index(list(graph.node))
        self._index(self._repeat_dequantizers())

    def _index(self, nodes: list[NodeProto]) -> None:
        self.nodes = nodes
        self.producers = {name: idx for idx, node in enumerate(nodes) for name in node.output if name}
        self._kinds = self._find_kinds()
        self.labels: dict[int, int] = {}
        for label, name in enumerate(self.exits):
            for idx in self.cone(name):
                self.labels.setdefault(idx, label)

    def _repeat_dequantizers(self) -> list[NodeProto]:
        """Return the nodes with a `DequantizeLinear` for each stage that reads one, so that integers cross a cut."""
        nodes: list[NodeProto] = []
        repeated: dict[int, dict[int, NodeProto]] = {}
        for idx, node in enumerate(self.nodes):
            label, names = self.labels.get(idx, -1), {}
            for name in graph_inputs(node):
                source = self.producers.get(name, -1)
                is_dequantizer = source >= 0 and self.nodes[source].op_type == 'DequantizeLinear'
                if not is_dequantizer or not -1 < self.labels.get(source, -1) < label:
                    continue
                names[name] = f'{name}_{label}'
                copies = repeated.setdefault(source, {})
                if label not in copies:
                    copies[label] = rename_values(self.nodes[source], {name: names[name]})
                    copies[label].name = f'{copies[label].name}_{label}'
            nodes.append(rename_values(node, names) if names else node)
        return [each for idx, node in enumerate(nodes) for each in (node, *repeated.get(idx, {}).values())]

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return int(self.info[self.exits[0]].type.tensor_type.shape.dim[1].dim_value)

    def _find_kinds(self) -> dict[str, int]:
        kinds = dict.fromkeys(self.initializers, _CONSTANT) | {self.image: _DATA}
        for node in self.nodes:
            kind = max((kinds.get(name, _CONSTANT) for name in graph_inputs(node)), default=_CONSTANT)
            if node.op_type == 'Shape' and node.output[0] == BATCH:
                kind = _SIZE
            kinds.update(dict.fromkeys(node.output, kind))
        return kinds

    def is_data(self, name: str) -> bool:
        """Return whether a value depends on what the image shows."""
        return self._kinds.get(name, _CONSTANT) == _DATA

    def cone(self, *names: str) -> set[int]:
        """Return the nodes that these values need, those of weights and sizes alone apart."""
        found: set[int] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            idx = self.producers.get(name)
            if idx is not None and idx not in found and self.is_data(name):
                found.add(idx)
                stack += graph_inputs(self.nodes[idx])
        return found

    def support(self, nodes: Iterable[int]) -> tuple[list[int], list[str]]:
        """Return the nodes of weights and sizes that others need, in order, and the initializers of all of them."""
        found: set[int] = set()
        initializers: dict[str, None] = {}
        stack = [name for idx in nodes for name in graph_inputs(self.nodes[idx])]
        while stack:
            name = stack.pop()
            if name in self.initializers:
                initializers[name] = None
            idx = self.producers.get(name)
            if idx is None or idx in found or self.is_data(name):
                continue
            found.add(idx)
            if name != BATCH:
                stack += graph_inputs(self.nodes[idx])
        return sorted(found), sorted(initializers)

    def crossing(self, label: int) -> list[str]:
        """Return the values that stages up to this one make and later ones read, in order of their first reading."""
        names: dict[str, None] = {}
        for idx, node in enumerate(self.nodes):
            if self.labels.get(idx, -1) > label:
                for name in graph_inputs(node):
                    made_by = self.labels[self.producers[name]] if name in self.producers and self.is_data(name) else -1
                    if self.is_data(name) and made_by <= label:
                        names[name] = None
        later = [name for idx, name in enumerate(self.exits) if idx > label]
        for name in later:  # a classifier whose logits are those of a shallower one
            if self.labels.get(self.producers.get(name, -1), -1) <= label:
                names[name] = None
        return list(names)

    def fixed(self, label: int) -> ModelProto:
        """Return one classifier alone: image -> logits."""
        name = self.exits[label]
        return self._program(self.cone(name), {self.image: 'image'}, {'logits': name})

    def stages(self) -> list[ModelProto]:
        """Return the chain: stage k takes what stage k-1 gives beside its logits, by the same names.

        Raises:
            InvalidValueError: A value that crosses does not have the batch in one dimension.
        """
        programs = []
        inputs = {self.image: 'image'}
        for label in range(len(self.exits)):
            crossing = self.crossing(label) if label < len(self.exits) - 1 else []
            states = {f'state_{label}_{idx}': name for idx, name in enumerate(crossing)}
            nodes = {idx for idx, owner in self.labels.items() if owner == label}
            programs.append(self._program(nodes, inputs, {'logits': self.exits[label], **states}))
            inputs = {name: state for state, name in states.items()}
        return programs

    def _program(self, nodes: Iterable[int], inputs: Mapping[str, str], outputs: Mapping[str, str]) -> ModelProto:
        """Return the program of some nodes.

        `inputs` are the values of this graph that it takes, and their names outside; `outputs` the names outside, and
        the values that they have.
        """
        order = sorted(nodes)
        support, needed = self.support(order)
        extra: list[TensorProto] = []
        given = [_cross(self._value(name), outside, extra, is_input=True) for name, outside in inputs.items()]
        made = [_cross(self._value(name), outside, extra, is_input=False) for outside, name in outputs.items()]
        batch = helper.make_node('Shape', [given[0][0].name], [BATCH], start=0, end=1)
        graph = helper.make_graph(
            [
                *(node for _, node in given),
                *(batch if self.nodes[idx].output[0] == BATCH else self.nodes[idx] for idx in support),
                *(self.nodes[idx] for idx in order),
                *(node for _, node in made),
            ],
            'program',
            [value for value, _ in given],
            [value for value, _ in made],
            initializer=[*(self.initializers[name] for name in needed), *extra],
        )
        return self.make_model(_without_identities(graph))

    def make_model(self, graph: GraphProto) -> ModelProto:
        """Return a model of a graph, of the same operators as the whole."""
        model = helper.make_model(graph, opset_imports=self.model.opset_import, producer_name='timm_multiexit')
        model.ir_version = self.model.ir_version
        return model

    def _value(self, name: str) -> ValueInfoProto:
        """Return type and shape of a value."""
        source = self.nodes[self.producers[name]] if name in self.producers else None
        if name not in self.info and source is not None and source.op_type == 'QuantizeLinear':
            value = copy.deepcopy(self._value(source.input[0]))
            value.name = name
            value.type.tensor_type.elem_type = self.initializers[source.input[2]].data_type
            return value
        if name not in self.info:
            raise InvalidValueError(f'The model cannot be cut into stages: the shape of the value {name} is not known.')
        return self.info[name]


def read_shape(value: ValueInfoProto) -> list[Any]:
    """Return the dimensions of a value: integers, and expressions of the symbol `batch`."""
    dims = []
    for dim in value.type.tensor_type.shape.dim:
        dims.append(int(dim.dim_value) if dim.HasField('dim_value') else sympy.sympify(dim.dim_param or 'unknown'))
    return dims


def _batch_place(value: ValueInfoProto) -> tuple[int, int, list[int]]:
    """Return which dimension has the batch, how many rows of an image it has, and the others' sizes (0 for it).

    Raises:
        InvalidValueError: None has it, or several have.
    """
    dims = read_shape(value)
    places = [idx for idx, dim in enumerate(dims) if not isinstance(dim, int)]
    if len(places) == 1:
        rows = dims[places[0]] / sympy.Symbol(BATCH)
        if rows.is_Integer and (rows == 1 or places[0] == 0):
            return places[0], int(rows), [dim if isinstance(dim, int) else 0 for dim in dims]
    raise InvalidValueError(
        f'The model cannot be cut into stages: the value {value.name}, which later stages need, has the shape {dims},'
        ' not the batch in one dimension.'
    )


def _cross(
    value: ValueInfoProto, outside: str, extra: list[TensorProto], *, is_input: bool
) -> tuple[ValueInfoProto, NodeProto]:
    """Return the input or output of a program that is a value with the batch first, and the node between them.

    A constant that the node reads is added to `extra`.
    """
    place, rows, sizes = _batch_place(value)
    source, target = (outside, value.name) if is_input else (value.name, outside)
    others = [size for idx, size in enumerate(sizes) if idx != place]
    if place:
        order = [place, *(idx for idx in range(len(sizes)) if idx != place)]
        perm = [order.index(idx) for idx in range(len(order))] if is_input else order
        node = helper.make_node('Transpose', [source], [target], perm=perm)
    elif rows > 1:
        shape = numpy_helper.from_array(
            np.array([-1, *others] if is_input else [-1, rows, *others]), f'{outside}_shape'
        )
        extra.append(shape)
        node = helper.make_node('Reshape', [source, shape.name], [target])
        others = [rows, *others]
    else:
        node = helper.make_node('Identity', [source], [target])
    return helper.make_tensor_value_info(outside, value.type.tensor_type.elem_type, [BATCH, *others]), node


def _without_identities(graph: GraphProto) -> GraphProto:
    """Return a graph that reads inputs and writes outputs directly where an `Identity` stands between."""
    names: dict[str, str] = {}
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    for node in graph.node:
        if node.op_type == 'Identity':
            source, target = node.input[0], node.output[0]
            if source in inputs and target not in outputs:
                names[target] = source
            elif target in outputs and source not in names and source not in inputs and source not in outputs:
                names[source] = target
    nodes = []
    for node in graph.node:
        node = rename_values(node, names)
        if node.op_type != 'Identity' or node.input[0] != node.output[0]:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return graph


def _normalize(model: ModelProto) -> ModelProto:
    """Return a copy in which weights are initializers, and sizes are one value, `batch`."""
    model = onnx.inliner.inline_local_functions(model) if model.functions else copy.deepcopy(model)
    graph = model.graph
    _name_batch(graph)
    if any(name not in {value.name for value in graph.value_info} for node in graph.node for name in node.output):
        model = onnx.shape_inference.infer_shapes(model)
        graph = model.graph
    info = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    nodes: list[NodeProto] = []
    reads_batch = False
    for node in graph.node:
        if node.op_type == 'Constant':
            graph.initializer.append(_constant(node))
        elif node.op_type == 'Shape':
            made, needs_batch = _sizes(node, info, graph.initializer.append)
            nodes += made
            reads_batch |= needs_batch
        else:
            nodes.append(node)
    if reads_batch:
        nodes.insert(0, helper.make_node('Shape', [graph.input[0].name], [BATCH], start=0, end=1))
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _name_batch(graph: GraphProto) -> None:
    """Call the first dimension of the input `batch` wherever it is part of a shape."""
    dim = graph.input[0].type.tensor_type.shape.dim[0]
    symbol = dim.dim_param
    if not symbol or symbol == BATCH:
        return
    for value in (*graph.value_info, *graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                expression = sympy.sympify(dim.dim_param)
                dim.dim_param = str(expression.subs(sympy.Symbol(symbol), sympy.Symbol(BATCH)))


def _constant(node: NodeProto) -> TensorProto:
    """Return the value of a `Constant` as an initializer of its name."""
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == 'value':
        tensor = copy.deepcopy(value)
        tensor.name = node.output[0]
        return tensor
    kind = {'f': np.float32, 'i': np.int64}[attribute.name.removeprefix('value_')[0]]
    return numpy_helper.from_array(np.array(value, kind), node.output[0])


def _sizes(
    node: NodeProto, info: Mapping[str, ValueInfoProto], add: Callable[[TensorProto], None]
) -> tuple[list[NodeProto], bool]:
    """Return nodes that give what a `Shape` node gives, made of constants and the batch size, and if they need it."""
    value = info.get(node.input[0])
    at = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    dims = read_shape(value)[at.get('start', 0) : at.get('end')] if value is not None else [sympy.Symbol('unknown')]
    name = node.output[0]
    parts, nodes = [], []
    for idx, dim in enumerate(dims):
        if isinstance(dim, int):
            add(numpy_helper.from_array(np.array([dim], np.int64), f'{name}_{idx}'))
            parts.append(f'{name}_{idx}')
            continue
        rows = dim / sympy.Symbol(BATCH)
        if not rows.is_Integer:
            raise InvalidValueError(
                f'The model cannot be exported: the size {dim} of {node.input[0]} is not a multiple of the batch.'
            )
        add(numpy_helper.from_array(np.array([int(rows)], np.int64), f'{name}_{idx}_rows'))
        nodes.append(helper.make_node('Mul', [BATCH, f'{name}_{idx}_rows'], [f'{name}_{idx}']))
        parts.append(f'{name}_{idx}')
    nodes.append(helper.make_node('Concat', parts, [name], axis=0))
    return nodes, len(nodes) > 1
