"""One program for single images that leaves by itself where a policy says so: nested `If` with weights inside."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from timm_multiexit.deploy.graph import BATCH, ExitGraph, rename_values
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy

_TINY = float(np.finfo(np.float32).tiny)


class _Block:
    """Nodes and initializers that are being written, of a graph or of a branch.

    Args:
        suffix: What makes the names of its own values unique.
    """

    def __init__(self, suffix: str):
        self.suffix = suffix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its first output; the others have its number behind."""
        name = f'{op.lower()}_{len(self.nodes)}_{self.suffix}'
        names = [name, *(f'{name}_{idx}' for idx in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return name

    def constant(self, value: Any, kind: type[np.generic]) -> str:
        """Add a constant and return its name."""
        name = f'constant_{len(self.initializers)}_{self.suffix}'
        self.initializers.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def branch(self, outputs: Sequence[ValueInfoProto], values: Sequence[str]) -> GraphProto:
        """Return the block as a branch with these outputs, which have the given values."""
        self.nodes += [helper.make_node('Identity', [value], [output.name]) for value, output in zip(values, outputs)]
        return helper.make_graph(self.nodes, self.suffix, [], outputs, initializer=self.initializers)


class _Conditional:
    """Writes the program.

    Args:
        graph: All classifiers.
        criterion: See `ExitPolicy`.
        combine: See `ExitPolicy`.
    """

    def __init__(self, graph: ExitGraph, criterion: str, combine: str | None):
        self.graph, self.criterion, self.combine = graph, criterion, combine
        self.num_exits = len(graph.exits) - 1
        self._owners: dict[str, str] = {}
        answer = (TensorProto.FLOAT, [1, graph.num_classes])
        one, index = (TensorProto.FLOAT, [1]), (TensorProto.INT64, [1])
        self._memory: dict[str, tuple[int, list[int]]] = {}
        if combine is not None:
            self._memory |= {'total': answer, 'seen': one}
        if criterion == 'patience':
            self._memory |= {'predicted': index, 'streak': one}
        self._visit = {'leaves': (TensorProto.BOOL, [1]), 'answer': answer, **self._memory}
        self._result = {'logits': answer, 'exit_idx': index}

    def build(self) -> tuple[_Block, list[str]]:
        """Return the outermost block and the names of its results."""
        block = _Block('stage_0')
        memory = {}
        for name, (kind, shape) in self._memory.items():
            start = np.full(shape, -1 if name == 'predicted' else 0)
            memory[name] = block.constant(start, helper.tensor_dtype_to_np_dtype(kind).type)
        return block, self._write_stage(block, 0, memory)

    def _write_stage(self, block: _Block, label: int, memory: Mapping[str, str]) -> list[str]:
        """Write all from one tap on, and return the names of the results."""
        graph = self.graph
        own = {idx for idx, owner in graph.labels.items() if owner == label}
        if label == self.num_exits:
            self._copy(block, own)
            answer, _ = self._answer(block, label, graph.exits[label], memory)
            return [answer, block.constant([label], np.int64)]
        trunk = own & graph.cone(*graph.exits[label + 1 :])
        self._copy(block, trunk)
        place = block.constant([label], np.int64)
        threshold = block.add('Gather', 'thresholds', place, axis=0)
        visited = self._write_if(
            block,
            block.add('IsNaN', threshold),
            self._skip(label, memory),
            self._run(label, own - trunk, threshold, memory),
            self._visit,
        )
        memory = {name: visited[name] for name in self._memory}
        leaving = _Block(f'leave_{label}')
        leaving_outputs = self._describe(self._result, leaving.suffix)
        left = leaving.branch(leaving_outputs, [visited['answer'], leaving.constant([label], np.int64)])
        rest = _Block(f'stage_{label + 1}')
        results = self._write_stage(rest, label + 1, memory)
        staying = rest.branch(self._describe(self._result, rest.suffix), results)
        found = self._write_if(block, visited['leaves'], left, staying, self._result)
        return [found['logits'], found['exit_idx']]

    def _skip(self, label: int, memory: Mapping[str, str]) -> GraphProto:
        """Return the branch of an exit that is not used."""
        block = _Block(f'skip_{label}')
        answer = block.constant(np.zeros(self._visit['answer'][1]), np.float32)
        values = [block.constant([False], np.bool_), answer, *(memory[name] for name in self._memory)]
        return block.branch(self._describe(self._visit, block.suffix), values)

    def _run(self, label: int, nodes: Iterable[int], threshold: str, memory: Mapping[str, str]) -> GraphProto:
        """Return the branch of an exit that is used: its head, what it answers, and whether that is enough."""
        block = _Block(f'head_{label}')
        self._copy(block, nodes)
        answer, memory = self._answer(block, label, self.graph.exits[label], memory)
        leaves, memory = self._leaves(block, answer, threshold, memory)
        values = [leaves, answer, *(memory[name] for name in self._memory)]
        return block.branch(self._describe(self._visit, block.suffix), values)

    def _answer(
        self, block: _Block, label: int, logits: str, memory: Mapping[str, str]
    ) -> tuple[str, Mapping[str, str]]:
        """Do `PolicyRun.answer`."""
        place = block.constant([label], np.int64)
        answer = block.add('Div', logits, block.add('Gather', 'temperatures', place, axis=0))
        if self.combine is None:
            return answer, memory
        if self.combine == 'geometric':
            answer = block.add('LogSoftmax', answer, axis=-1)
        total = block.add('Add', memory['total'], answer)
        seen = block.add('Add', memory['seen'], block.constant([1], np.float32))
        return block.add('Div', total, seen), {**memory, 'total': total, 'seen': seen}

    def _leaves(
        self, block: _Block, answer: str, threshold: str, memory: Mapping[str, str]
    ) -> tuple[str, Mapping[str, str]]:
        """Do `PolicyRun.score` and `ExitPolicy.leaves`; NaN leaves too, for whoever asked to find."""
        probs = block.add('Softmax', answer, axis=-1)
        sums = block.add('ReduceSum', probs, block.constant([-1], np.int64), keepdims=0)
        is_broken = block.add('IsNaN', sums)
        if self.criterion == 'patience':
            leaves, memory = self._is_patient(block, answer, threshold, memory)
        else:
            compare = 'GreaterOrEqual' if CRITERIA[self.criterion].leaves_at_least else 'LessOrEqual'
            leaves = block.add(compare, self._score(block, probs), threshold)
        return block.add('Or', leaves, is_broken), memory

    def _score(self, block: _Block, probs: str) -> str:
        if self.criterion == 'entropy':
            logs = block.add('Log', block.add('Max', probs, block.constant(_TINY, np.float32)))
            terms = block.add('Neg', block.add('Mul', probs, logs))
            sums = block.add('ReduceSum', terms, block.constant([-1], np.int64), keepdims=0)
            share = block.add('Div', sums, block.constant(math.log(self.graph.num_classes), np.float32))
            return block.add('Min', share, block.constant(1, np.float32))
        if self.criterion == 'margin':
            top = block.add('TopK', probs, block.constant([2], np.int64), outputs=2, axis=-1)
            first, second = (block.constant([idx], np.int64) for idx in (0, 1))
            gap = block.add('Sub', block.add('Gather', top, first, axis=1), block.add('Gather', top, second, axis=1))
            return block.add('Squeeze', gap, second)
        return block.add('ReduceMax', probs, block.constant([-1], np.int64), keepdims=0)

    def _is_patient(
        self, block: _Block, answer: str, threshold: str, memory: Mapping[str, str]
    ) -> tuple[str, Mapping[str, str]]:
        predicted = block.add('ArgMax', answer, axis=-1, keepdims=0)
        more = block.add('Add', memory['streak'], block.constant([1], np.float32))
        agrees = block.add('Equal', predicted, memory['predicted'])
        streak = block.add('Where', agrees, more, block.constant([0], np.float32))
        return block.add('GreaterOrEqual', streak, threshold), {**memory, 'predicted': predicted, 'streak': streak}

    def _copy(self, block: _Block, nodes: Iterable[int]) -> None:
        """Write nodes of the graph with all the weights that they need.

        Weights and sizes that another block has too are copied: they must lie in the branch that reads them to be
        prepared when the program is loaded.
        """
        graph = self.graph
        order = sorted(nodes)
        support, initializers = graph.support(order)
        made = [name for idx in support for name in graph.nodes[idx].output]
        names = {}
        for name in (*initializers, *made):
            if self._owners.setdefault(name, block.suffix) != block.suffix:
                names[name] = f'{name}_{block.suffix}'
        for name in initializers:
            tensor = graph.initializers[name]
            if name in names:
                tensor = TensorProto()
                tensor.CopyFrom(graph.initializers[name])
                tensor.name = names[name]
            block.initializers.append(tensor)
        for idx in (*support, *order):
            node = graph.nodes[idx]
            if node.output[0] == BATCH:
                name = names.get(BATCH, BATCH)
                block.initializers.append(numpy_helper.from_array(np.array([1], np.int64), name))
            else:
                block.nodes.append(rename_values(node, names))

    def _write_if(
        self, block: _Block, condition: str, then: GraphProto, other: GraphProto, values: Iterable[str]
    ) -> dict[str, str]:
        names = {name: f'{name}_of_{then.name}' for name in values}
        node = helper.make_node('If', [condition], list(names.values()), then_branch=then, else_branch=other)
        block.nodes.append(node)
        return names

    @staticmethod
    def _describe(values: Mapping[str, tuple[int, list[int]]], suffix: str) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(f'{name}_{suffix}', *value) for name, value in values.items()]


def make_conditional(
    graph: ExitGraph, *, criterion: str, combine: str | None, policy: ExitPolicy | None = None
) -> ModelProto:
    """Return the program that leaves at run time.

    Inputs are `image` [1, C, H, W], `thresholds`, one per exit, NaN for an exit whose head is not run, and
    `temperatures`, one per classifier, 1 for none; outputs are `logits` [1, num_classes] and `exit_idx` [1].

    Args:
        graph: All classifiers.
        criterion: See `ExitPolicy`.
        combine: See `ExitPolicy`.
        policy: Whose thresholds and temperatures are written into the file's metadata, as JSON.
    """
    block, (logits, exit_idx) = _Conditional(graph, criterion, combine).build()
    num_exits = len(graph.exits) - 1
    source = graph.info[graph.image].type.tensor_type
    sizes = [dim.dim_value for dim in source.shape.dim][1:]
    inputs = [
        helper.make_tensor_value_info(graph.image, source.elem_type, [1, *sizes]),
        helper.make_tensor_value_info('thresholds', TensorProto.FLOAT, [num_exits]),
        helper.make_tensor_value_info('temperatures', TensorProto.FLOAT, [num_exits + 1]),
    ]
    outputs = [
        helper.make_tensor_value_info('logits', TensorProto.FLOAT, [1, graph.num_classes]),
        helper.make_tensor_value_info('exit_idx', TensorProto.INT64, [1]),
    ]
    for value, name in ((logits, 'logits'), (exit_idx, 'exit_idx')):
        block.nodes.append(helper.make_node('Identity', [value], [name]))
    whole = helper.make_graph(block.nodes, 'conditional', inputs, outputs, initializer=block.initializers)
    model = graph.make_model(whole)
    notes: dict[str, str] = {'criterion': criterion, 'combine': combine or 'none'}
    if policy is not None:
        notes['thresholds'] = json.dumps(policy.thresholds)
        notes['temperatures'] = json.dumps(policy.temperatures or (1.0,) * (num_exits + 1))
    helper.set_model_props(model, notes)
    return model
