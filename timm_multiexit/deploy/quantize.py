"""int8 programs beside the fp32 ones: the chain as one graph, quantized once and cut again."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_multiexit.data.batches import LabelCheck, read_batches
from timm_multiexit.deploy.export import write_programs
from timm_multiexit.deploy.manifest import describe_files, read_costs, read_manifest, write_manifest
from timm_multiexit.deploy.programs import check_extra
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_number, check_path
from timm_multiexit.utils.errors import DataError, InvalidValueError, one_line
from timm_multiexit.utils.files import RUN_AGAIN, explain_disk_errors

if TYPE_CHECKING:
    from onnx import ModelProto

PRECISION = 'int8'

_MOST_CALIBRATION = 1024  # images; the ranges of activations change little beyond a few hundred
_PROBE_SIZES = (2, 3)


class QuantizationResult(NamedTuple):
    """What quantization costs, on held-out images.

    Attributes:
        images: How many were looked at.
        fp32: Top-1 of every classifier before, in percent, main last.
        int8: The same after.
        policies: One dict per saved policy: its mean `macs`, its top-1 before (`fp32`) and after (`int8`).
    """

    images: int
    fp32: tuple[float, ...]
    int8: tuple[float, ...]
    policies: tuple[dict[str, float], ...]


def quantize(
    folder: str | os.PathLike[str],
    calibration: Iterable[Any],
    held_out: Iterable[Any],
    *,
    limit: float = 1.0,
) -> QuantizationResult:
    """Add int8 programs to an exported folder, in the forms that it has in fp32; its manifest says what they cost.

    Weights are int8 with a scale per channel, of 7 bits, for products of 8 bits overflow on processors without VNNI;
    activations are uint8, their ranges those of the calibration images. The stages are joined, quantized once and cut
    again at what is uint8: the chain gives what the whole gives, and its states are a quarter of those in fp32.

    Args:
        folder: What `export` wrote, with the form 'stages'.
        calibration: Batches of images and class indices, see `timm_multiexit.data.batches`, as the model takes them;
            some hundred images of all classes. At most 1024 are used.
        held_out: The same of other images, neither of these nor those that results are reported on: what accuracy is
            compared on.
        limit: How much accuracy an exit or a saved policy may lose, in points of percent.

    Raises:
        StateError: A package of the extra `onnx` is missing.
        CheckpointError: The folder is not an exported one, or has changed.
        DataError: A loader is empty, or its images are of another size than the network's.
        InvalidValueError: The folder has no stages; or an exit or a policy loses more than the limit: nothing is
            written.
        DiskError: The disk is full or not writable.
    """
    check_path('folder', folder)
    limit = check_number('limit', limit, 0, 100)
    check_extra()
    folder = Path(folder)
    manifest = read_manifest(folder)
    fp32 = manifest['programs']['fp32']
    if not fp32['stages']:
        raise InvalidValueError(f"{folder} has no stages, of which int8 programs are made: export the form 'stages'.")
    policy = None if manifest['policy'] is None else ExitPolicy.from_dict(manifest['policy'])
    images = _read_calibration(calibration, manifest['preprocessing']['input_size'])
    stages = [folder / path for path in fp32['stages']]
    whole = _prepare_cuts(_quantize(_join(stages), images), images[:1])
    forms = [form for form, programs in fp32.items() if programs]
    with ExitStack() as stack:
        with explain_disk_errors(folder, advice=RUN_AGAIN):
            draft = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix='.int8-'))
            programs = write_programs(whole, Path(draft), forms, policy, below=f'{PRECISION}/')
        made = [Path(draft, path) for path in programs['stages']]
        before, after, targets = _collect(stages, made, held_out, manifest)
        result = _compare(before, after, targets, manifest)
        _refuse_losses(result, manifest, limit)
        _install(Path(draft), folder, manifest, programs, result, limit)
    return result


def _read_calibration(loader: Iterable[Any], size: Sequence[int]) -> np.ndarray:
    """Return the images of a loader, [N, C, H, W]."""
    parts: list[np.ndarray] = []
    for images, _ in read_batches(loader):
        parts.append(_to_array(images, size))
        if sum(map(len, parts)) >= _MOST_CALIBRATION:
            break
    if not parts:
        raise DataError('The loader of calibration images is empty.')
    return np.concatenate(parts)[:_MOST_CALIBRATION]


def _to_array(images: Tensor, size: Sequence[int]) -> np.ndarray:
    if list(images.shape[1:]) != list(size):
        raise DataError(f'Images must be {list(size)}, as those of the exported network, got {list(images.shape[1:])}.')
    array: np.ndarray = images.detach().cpu().float().numpy()
    return array


def _join(stages: Sequence[Path]) -> 'ModelProto':
    """Return the chain as one program: `image` -> the logits of all classifiers, main last."""
    import onnx
    from onnx import compose, helper

    whole: Any = None
    states: list[str] = []
    loaded = [onnx.load(path) for path in stages]
    for idx, stage in enumerate(loaded):
        stage = compose.add_prefix(stage, f'stage_{idx}_')
        if whole is None:
            whole = stage
        else:
            inputs = [value.name for value in stage.graph.input]
            whole = compose.merge_models(whole, stage, io_map=list(zip(states, inputs)))
        states = [value.name for value in stage.graph.output][1:]
    image = whole.graph.input[0].name
    for node in whole.graph.node:
        # All sizes of the batch are read off the image, whose shape stays known.
        if node.op_type == 'Shape':
            node.input[0] = image
        for place, name in enumerate(node.input):
            node.input[place] = 'image' if name == image else name
    whole.graph.input[0].name = 'image'
    names = [value.name for value in whole.graph.output]
    wanted = {name: 'main' if idx == len(stages) - 1 else f'exit_{idx}' for idx, name in enumerate(names)}
    for node in whole.graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = wanted.get(name, name)
    for value in whole.graph.output:
        value.name = wanted[value.name]
    model: ModelProto = helper.make_model(whole.graph, opset_imports=loaded[0].opset_import)
    model.ir_version = loaded[0].ir_version
    return model


def _quantize(whole: 'ModelProto', images: np.ndarray) -> 'ModelProto':
    """Return the program with quantized weights and activations, whose ranges are those of the images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter([images[start : start + 8] for start in range(0, len(images), 8)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            batch = next(batches, None)
            return None if batch is None else {'image': batch}

    place = tempfile.gettempdir()
    with explain_disk_errors(place, advice=RUN_AGAIN), tempfile.TemporaryDirectory() as temporary, _quiet():
        source, prepared, target = (str(Path(temporary, f'{name}.onnx')) for name in ('source', 'prepared', 'target'))
        onnx.save(whole, source)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except OSError:
            raise
        except Exception as error:  # its own kinds have no common base
            if shutil.disk_usage(temporary).free < os.path.getsize(source):  # what it wrote is cut off, it says nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise InvalidValueError(f'The network cannot be quantized: ONNX Runtime says {one_line(error)}.') from error
        return onnx.load(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the tools say to their own developers, on the root logger, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _prepare_cuts(quantized: 'ModelProto', image: np.ndarray) -> 'ModelProto':
    """Return the program in which each reader of a quantized value dequantizes it for itself.

    So it is the uint8 value that crosses a cut, and what a later stage computes of it is what the whole computes.
    """
    from onnx import helper

    _restore_logits(quantized)
    makers = {node.output[0]: node for node in quantized.graph.node if node.op_type == 'DequantizeLinear'}
    nodes, readers = [], dict.fromkeys(makers, 0)
    for node in quantized.graph.node:
        for place, name in enumerate(node.input):
            if name in makers:
                copy = helper.make_node('DequantizeLinear', makers[name].input, [f'{name}_{readers[name]}'])
                copy.attribute.extend(makers[name].attribute)
                readers[name] += 1
                node.input[place] = copy.output[0]
                nodes.append(copy)
        if node.op_type != 'DequantizeLinear':
            nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del quantized.graph.node[:]
    quantized.graph.node.extend(kept)
    _note_shapes(quantized, image)
    return quantized


def _restore_logits(model: 'ModelProto') -> None:
    """Let the logits be floats, as they are computed: of 256 values, confidences would be coarse."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for value in model.graph.output:
        nodes = [makers[value.name]]
        while nodes[-1].op_type in ('DequantizeLinear', 'QuantizeLinear'):
            nodes.append(makers[nodes[-1].input[0]])
        *rounding, maker = nodes
        if rounding:
            source = rounding[-1].input[0]
            for node in model.graph.node:
                for names in (node.input, node.output):
                    names[:] = [value.name if name == source else name for name in names]
            rounding[0].output[0] = f'{value.name}_rounded'  # which nobody reads


def _note_shapes(model: 'ModelProto', image: np.ndarray) -> None:
    """Write the shapes of the values that cross cuts into a program, read off two batches of different size."""
    import onnxruntime
    from onnx import ValueInfoProto, helper

    from timm_multiexit.deploy.graph import ExitGraph

    graph = ExitGraph(model)
    names = sorted({name for label in range(len(graph.exits) - 1) for name in graph.crossing(label)} - {graph.image})
    if not names:
        return
    probe = graph.model
    del probe.graph.output[:]
    probe.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=['CPUExecutionProvider'])
    found = [session.run(names, {graph.image: np.repeat(image, size, axis=0)}) for size in _PROBE_SIZES]
    for name, first, second in zip(names, *found):
        sizes: list[int | str] = []
        for one, other in zip(first.shape, second.shape):
            rows = other - one
            sizes.append(one if rows == 0 else 'batch' if rows == 1 else f'{rows}*batch')
        kept = [value for value in model.graph.value_info if value.name != name]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        kind = helper.np_dtype_to_tensor_dtype(first.dtype)
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, sizes))


def _collect(
    before: Sequence[Path], after: Sequence[Path], loader: Iterable[Any], manifest: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the logits [N, C] of all classifiers by two chains, and the class indices [N]."""
    chains = [_Chain(before), _Chain(after)]
    found: list[list[list[Tensor]]] = [[], []]
    targets: list[Tensor] = []
    labels = LabelCheck()
    for images, target in read_batches(loader):
        array = _to_array(images, manifest['preprocessing']['input_size'])
        targets.append(labels.add(target.cpu(), manifest['num_classes']))
        for chain, parts in zip(chains, found):
            parts.append(chain(array))
    if not targets:
        raise DataError('The loader of held-out images is empty.')
    one, other = ([torch.cat(single) for single in zip(*parts)] for parts in found)
    return one, other, torch.cat(targets)


class _Chain:
    """Stages, as they are run one after the other."""

    def __init__(self, stages: Sequence[Path]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ['CPUExecutionProvider']
        self._sessions = [onnxruntime.InferenceSession(str(stage), options, providers=providers) for stage in stages]

    def __call__(self, images: np.ndarray) -> list[Tensor]:
        """Return the logits of all classifiers."""
        found, state = [], [images]
        for session in self._sessions:
            logits, *state = session.run(None, dict(zip([value.name for value in session.get_inputs()], state)))
            found.append(torch.from_numpy(logits))
        return found


def _compare(
    before: list[Tensor], after: list[Tensor], targets: Tensor, manifest: Mapping[str, Any]
) -> QuantizationResult:
    def top1(logits: Tensor) -> float:
        return round(100.0 * float((logits.argmax(-1) == targets).double().mean()), 4)

    policies = []
    for macs, policy in _saved_policies(manifest, before):
        answers = [apply_policy(policy, logits).logits for logits in (before, after)]
        policies.append({'macs': macs, 'fp32': top1(answers[0]), 'int8': top1(answers[1])})
    return QuantizationResult(len(targets), tuple(map(top1, before)), tuple(map(top1, after)), tuple(policies))


def _saved_policies(manifest: Mapping[str, Any], logits: list[Tensor]) -> list[tuple[float, ExitPolicy]]:
    """Return the policies of the manifest with their mean MACs: those of the budgets, then its own if it is another."""
    found = [(float(point['macs']), ExitPolicy.from_dict(point['policy'])) for point in manifest['budgets']]
    if manifest['policy'] is not None:
        own = ExitPolicy.from_dict(manifest['policy'])
        if own not in [policy for _, policy in found]:
            found.append((read_costs(manifest).mean(own, apply_policy(own, logits).exit_idx), own))
    return found


def _refuse_losses(result: QuantizationResult, manifest: Mapping[str, Any], limit: float) -> None:
    names = [each['name'] for each in manifest['exits']]
    names += [f'the policy of {policy["macs"] / manifest["plain_macs"]:.0%}' for policy in result.policies]
    pairs = [*zip(result.fp32, result.int8), *((policy['fp32'], policy['int8']) for policy in result.policies)]
    lost = [(fp32 - int8, name, fp32, int8) for name, (fp32, int8) in zip(names, pairs)]
    worst = max(lost)
    if worst[0] > limit + 1e-6:
        raise InvalidValueError(
            f'int8 programs must lose at most {limit:g} points of accuracy, got {worst[0]:.2f} at {worst[1]}'
            f' ({worst[2]:.2f} % to {worst[3]:.2f} % on {result.images} images), so no int8 program was written:'
            ' calibrate or compare on more images, or allow more.'
        )


def _install(
    draft: Path,
    folder: Path,
    manifest: dict[str, Any],
    programs: dict[str, Any],
    result: QuantizationResult,
    limit: float,
) -> None:
    """Move the programs into the folder, and say so in its manifest; earlier ones are first taken out of it.

    So the folder is whole at every moment, with int8 programs or without.
    """
    import onnxruntime

    kept = {name: entry for name, entry in manifest['files'].items() if not name.startswith(f'{PRECISION}/')}
    forms = {name: made for name, made in manifest['programs'].items() if name != PRECISION}
    if PRECISION in manifest['programs']:
        write_manifest(folder, {**manifest, 'programs': forms, 'int8': None}, kept)
    with explain_disk_errors(folder, advice=RUN_AGAIN):
        if (folder / PRECISION).exists():
            shutil.rmtree(folder / PRECISION)
        (draft / PRECISION).rename(folder / PRECISION)
    values = {
        **manifest,
        'versions': {**manifest['versions'], 'onnxruntime': onnxruntime.__version__},
        'programs': {**forms, PRECISION: programs},
        'int8': {
            'images': result.images,
            'limit': limit,
            'top1': {'fp32': list(result.fp32), 'int8': list(result.int8)},
            'policies': list(result.policies),
        },
    }
    write_manifest(folder, values, {**kept, **describe_files(folder, f'{PRECISION}/**/*')})
