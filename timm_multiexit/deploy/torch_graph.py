"""The program of all classifiers, cut into programs of `torch.export`: one per exit, and a chain of stages."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from timm_multiexit.deploy.programs import MAX_BATCH
from timm_multiexit.utils.environment import on_cpu
from timm_multiexit.utils.errors import InvalidValueError, one_line


class TorchGraph:
    """The graph of all classifiers, each node labelled with the shallowest classifier that needs it.

    As `ExitGraph` is for ONNX; what depends on weights or the batch size alone is part of every program that needs it.

    Args:
        program: What `trace_program` gave.
    """

    def __init__(self, program: ExportedProgram):
        # Nothing is decomposed but what changes a tensor in place, which would be the state of the host.
        self.module = program.run_decompositions({}).module()
        graph: fx.Graph = self.module.graph
        self.order = {node: idx for idx, node in enumerate(graph.nodes)}
        self.image = next(node for node in graph.nodes if node.op == 'placeholder')
        output = next(node for node in graph.nodes if node.op == 'output')
        self.exits: list[fx.Node] = list(output.args[0])
        self._data = {self.image}
        for node in graph.nodes:
            if not _is_size(node) and any(source in self._data for source in node.all_input_nodes):
                self._data.add(node)
        self.labels: dict[fx.Node, int] = {}
        for label, node in enumerate(self.exits):
            for found in self._cone(node):
                self.labels.setdefault(found, label)

    def _cone(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes that one needs, itself included, those of weights and sizes alone apart."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self._data and node not in found and node is not self.image:
                found.add(node)
                stack += node.all_input_nodes
        return found

    def fixed(self, label: int) -> ExportedProgram:
        """Return one classifier alone: image -> (logits,)."""
        node = self.exits[label]
        return self._program(self._cone(node), [self.image], ['image'], [node])

    def stages(self) -> list[ExportedProgram]:
        """Return the chain: stage k takes what stage k-1 gives behind its logits, in that order."""
        programs = []
        inputs, names = [self.image], ['image']
        for label, node in enumerate(self.exits):
            states = self._crossing(label) if label < len(self.exits) - 1 else []
            nodes = [found for found, owner in self.labels.items() if owner == label]
            programs.append(self._program(nodes, inputs, names, [node, *states]))
            inputs, names = states, [f'state_{label}_{idx}' for idx in range(len(states))]
        return programs

    def _crossing(self, label: int) -> list[fx.Node]:
        """Return what stages up to this one make and later ones read, in order of their first reading."""
        found: dict[fx.Node, None] = {}
        for node in self.order:
            if self.labels.get(node, -1) > label:
                sources = (source for source in node.all_input_nodes if source in self._data)
                found.update((source, None) for source in sources if self.labels.get(source, -1) <= label)
        deeper = self.exits[label + 1 :]
        found.update((node, None) for node in deeper if self.labels.get(node, -1) <= label)
        return list(found)

    def _program(
        self, nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], names: Sequence[str], outputs: Sequence[fx.Node]
    ) -> ExportedProgram:
        """Return the program of some nodes, from inputs under these names to outputs."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(name) for node, name in zip(inputs, names)}

        def fetch(node: fx.Node) -> fx.Node:
            """Return a copy of a node of weights or sizes, with all that it needs."""
            if node not in copies:
                if _is_batch(node):
                    copies[node] = self._read_batch(graph, node, inputs, copies)
                else:
                    copies[node] = graph.node_copy(node, fetch)
            return copies[node]

        for node in sorted(nodes, key=self.order.__getitem__):
            copies[node] = graph.node_copy(node, fetch)
        graph.output(tuple(copies[node] for node in outputs))
        module = fx.GraphModule(self.module, graph)
        module.graph.eliminate_dead_code()
        return _trace(module, inputs)

    def _read_batch(
        self, graph: fx.Graph, node: fx.Node, inputs: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """Return the size that a node reads off a tensor, read off an input instead."""
        wanted = node.meta['val'].node.expr
        for source in inputs:
            for dim, size in enumerate(source.meta['val'].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    return graph.call_function(torch.ops.aten.sym_size.int, (copies[source], dim))
                if isinstance(size, torch.SymInt) and (wanted / size.node.expr).is_Integer:
                    read = graph.call_function(torch.ops.aten.sym_size.int, (copies[source], dim))
                    return graph.call_function(torch.mul, (read, int(wanted / size.node.expr)))
        raise InvalidValueError(f'The model cannot be cut into stages: the size {wanted} is not that of its state.')


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get('val'), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_batch(node: fx.Node) -> bool:
    return node.op == 'call_function' and node.target is torch.ops.aten.sym_size.int


@on_cpu()
def _trace(module: fx.GraphModule, inputs: Sequence[fx.Node]) -> ExportedProgram:
    """Return a module as a program; the batch of its inputs is of any size."""
    examples, shapes = [], []
    for node in inputs:
        value: Any = node.meta['val']
        dynamic = [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        if dynamic != [0] or value.shape[0].node.hint != 2:
            raise InvalidValueError(
                f'The model cannot be cut into stages: {node.name}, which later stages need, has the shape'
                f' {list(value.shape)}, not one row per image.'
            )
        sizes = [2, *map(int, value.shape[1:])]
        examples.append(torch.zeros(sizes, dtype=value.dtype))
        shapes.append({0: Dim('batch', min=1, max=MAX_BATCH)})
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(examples), dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:
        raise InvalidValueError(f'The model cannot be cut: torch.export says {one_line(error)}.') from error
