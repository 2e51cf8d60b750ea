"""The program of all classifiers: traced once by `torch.export`, and made a graph of ONNX."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import on_cpu
from timm_multiexit.utils.errors import InvalidValueError, StateError, one_line

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
EXTRA_MISSING = 'onnx, onnxscript and onnxruntime are not all installed: pip install "timm-multiexit[onnx]".'

MAX_BATCH = 4096
_MAX_PROTO_BYTES = 2 * 10**9  # of a protobuf message, which a file of ONNX is


def check_extra() -> None:
    """Raise unless the packages of the extra `onnx` are there.

    Raises:
        StateError: One is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StateError(EXTRA_MISSING) from error


class _AllLogits(nn.Module):
    """The logits of all classifiers, main last."""

    def __init__(self, model: MultiExitModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits: tuple[Tensor, ...] = self.model(image, exits=True).logits
        return logits


@torch.inference_mode(False)
def copy_for_export(model: MultiExitModel) -> MultiExitModel:
    """Return a copy on the CPU, in float32 and eval mode, without gradient checkpointing; the model stays as it is."""
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise StateError('The model must have data, got weights on the meta device.')
    copy = deepcopy(model).eval().cpu().float()
    for module in copy.modules():
        if getattr(module, 'grad_checkpointing', False):
            vars(module)['grad_checkpointing'] = False
    return copy.requires_grad_(False)


@on_cpu()
@torch.no_grad()
def check_exported_size(model: MultiExitModel, input_size: tuple[int, int, int]) -> None:
    """Raise `InvalidValueError` unless a model takes images of (channels, height, width)."""
    try:
        model(torch.zeros(1, *input_size, dtype=torch.float32), exits=True)
    except Exception as error:
        raise InvalidValueError(
            f'input_size must be one that the model takes, got {list(input_size)}: {one_line(error)}.'
        ) from error


def trace_program(model: MultiExitModel, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Return the program of all classifiers, image [batch, C, H, W] -> one [batch, num_classes] tensor for each.

    Args:
        model: What `copy_for_export` gave.
        input_size: (channels, height, width) of an image.

    Raises:
        InvalidValueError: The model does not take images of this size, or `torch.export` cannot trace it.
    """
    check_exported_size(model, input_size)
    with torch.no_grad(), on_cpu(), _quiet():
        try:
            shapes = ({0: Dim('batch', min=1, max=MAX_BATCH)},)
            program = torch.export.export(
                _AllLogits(model),
                (torch.zeros(2, *input_size, dtype=torch.float32),),
                dynamic_shapes=shapes,
                strict=False,
            )
        except Exception as error:
            raise InvalidValueError(
                f'{type(model.backbone).__name__} cannot be exported: torch.export says {one_line(error)}.'
            ) from error
    simplify_pooling(program)
    return program


def trace_onnx(model: MultiExitModel, input_size: tuple[int, int, int]) -> 'ModelProto':
    """Return the graph of all classifiers, `image` -> `exit_0`, `exit_1`, ..., `main`.

    Arguments and errors are those of `trace_program`; what ONNX has no operators for is an `InvalidValueError` too.
    """
    return convert_program(trace_program(model, input_size), type(model.backbone).__name__)


@on_cpu()
def convert_program(program: ExportedProgram, name: str) -> 'ModelProto':
    """Return a program of all classifiers as a graph of ONNX; `name` is the backbone's, for messages."""
    num_bytes = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if num_bytes > _MAX_PROTO_BYTES:
        raise InvalidValueError(
            f'The weights of a model must have at most {_MAX_PROTO_BYTES:,} bytes to be a file of ONNX, got'
            f" {num_bytes:,}: use formats=('pt2',)."
        )
    flatten_attention(program)
    with _quiet():
        try:
            model = _convert(program)
        except Exception as error:
            raise InvalidValueError(f'{name} cannot be exported to ONNX: {one_line(_root(error))}.') from error
    return model


def _convert(program: ExportedProgram) -> 'ModelProto':
    """Do `convert_program`; errors are raised as they come."""
    import onnx

    num_outputs = len(program.graph_signature.user_outputs)
    names = [*(f'exit_{idx}' for idx in range(num_outputs - 1)), 'main']
    for optimizes in (True, False):
        # Of several clamps of one value onnxscript's optimizer loses the bounds (0.7.2): then the runtime's must do.
        converted: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=['image'],
            output_names=names,
            optimize=optimizes,
            verbose=False,
        )
        model: ModelProto = converted.model_proto
        try:
            onnx.checker.check_model(model)
            break
        except onnx.checker.ValidationError:
            if not optimizes:
                raise
    return model


def flatten_attention(program: ExportedProgram) -> None:
    """Make attention one of four dimensions, the only one that the exporter of ONNX takes.

    Three are images and heads together, and become four of one head each; of five or more the first are taken together.
    """
    graph = program.graph
    for node in list(graph.nodes):
        is_attention = node.op == 'call_function' and node.target is torch.ops.aten.scaled_dot_product_attention.default
        if is_attention and 'val' in node.meta:  # else it was made here
            num_dims, made = node.meta['val'].dim(), None
            with graph.inserting_before(node):
                if num_dims != 4:
                    made = _insert_head(graph, node) if num_dims == 3 else _join_first(graph, node)
            if made is not None:
                node.replace_all_uses_with(made)
                graph.erase_node(node)
    program.graph_module.recompile()


def _insert_head(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return attention over three dimensions as one over four."""
    target: Any = node.target
    parts, rest = list[Any](node.args[:3]), list[Any](node.args[3:])
    if rest and isinstance(rest[0], fx.Node) and rest[0].meta['val'].dim() == 3:  # a mask for each
        rest[0] = graph.call_function(torch.ops.aten.unsqueeze.default, (rest[0], 1))
    flat = [graph.call_function(torch.ops.aten.unsqueeze.default, (part, 1)) for part in parts]
    attended = graph.call_function(target, (*flat, *rest), node.kwargs)
    return graph.call_function(torch.ops.aten.squeeze.dim, (attended, 1))


def _join_first(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return attention over five or more dimensions as one over four; None where it has a mask or sizes that vary."""
    target: Any = node.target
    parts, rest = list[Any](node.args[:3]), list[Any](node.args[3:])
    shape, shapes = node.meta['val'].shape, [part.meta['val'].shape for part in parts]
    has_mask = bool(rest) and rest[0] is not None
    if has_mask or not all(isinstance(size, int) for each in shapes for size in each[1:]):
        return None
    reshape = torch.ops.aten.reshape.default
    flat = [graph.call_function(reshape, (part, [-1, *each[-3:]])) for part, each in zip(parts, shapes)]
    attended = graph.call_function(target, (*flat, *rest), node.kwargs)
    return graph.call_function(reshape, (attended, [-1, *map(int, shape[1:])]))


def simplify_pooling(program: ExportedProgram) -> None:
    """Make means of poolings to one pixel.

    Of a map in channels-last order torch decomposes such a pooling to `as_strided`, which becomes a slow gathering of
    single numbers (torch 2.15).
    """
    for node in program.graph.nodes:
        pools = node.op == 'call_function' and node.target is torch.ops.aten.adaptive_avg_pool2d.default
        if pools and list(node.args[1]) == [1, 1]:
            node.target = torch.ops.aten.mean.dim
            node.args = (node.args[0], [-2, -1], True)
    program.graph_module.recompile()


def _root(error: BaseException) -> BaseException:
    """Return what an error was raised from at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells its own developers from the user."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'onnx_ir', 'torch.export')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
