"""What exported programs take: the chain against the whole, an exit against a network cut by hand, and policies."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.exporting import compare_policies, open_program, run_chain
from timm_multiexit.deploy.conditional import make_conditional
from timm_multiexit.deploy.graph import ExitGraph
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.programs import OPSET, copy_for_export, trace_onnx
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.models.truncation import truncate
from timm_multiexit.policies.budgets import PolicyResult
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA, ExitPolicy
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.timing import describe_ratios, time_interleaved

_NEVER = {'confidence': 2.0, 'margin': 2.0, 'entropy': -1.0, 'patience': 1e6}
_AT_ONCE = {'confidence': 0.0, 'margin': 0.0, 'entropy': 2.0, 'patience': 0.0}
_MIN_SECONDS = 0.02  # of one turn


def cut_and_export(model: MultiExitModel, idx: int) -> onnxruntime.InferenceSession:
    """Return the program of a classifier that was cut out as a network of its own, and then exported."""
    alone = truncate(model, idx).eval()
    shapes = ({0: torch.export.Dim('batch', min=1, max=4096)},)
    program = torch.export.export(alone, (torch.zeros(2, *model.input_size),), dynamic_shapes=shapes, strict=False)
    exported: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    return open_program(exported.model_proto)


def force_exit(policy: ExitPolicy, place: int, image: np.ndarray) -> dict[str, np.ndarray]:
    """Return inputs of a conditional program that leaves at a place, with the exits before it that a policy uses."""
    thresholds = [
        np.nan if value is None else (_NEVER if idx < place else _AT_ONCE)[policy.criterion]
        for idx, value in enumerate(policy.thresholds)
    ]
    ones = np.ones(len(thresholds) + 1, np.float32)
    return {'image': image, 'thresholds': np.array(thresholds, np.float32), 'temperatures': ones}


class ExportBenchmark:
    """Programs of one model, side by side, for single images.

    Args:
        model: In eval mode, on the CPU.
    """

    def __init__(self, model: MultiExitModel):
        self.model = model
        self.image = np.random.default_rng(0).standard_normal((1, *model.input_size)).astype(np.float32)
        whole = trace_onnx(copy_for_export(model), model.input_size)
        self.graph = ExitGraph(whole)
        self.num_exits = len(model.exits)
        self.whole, self.whole_again = open_program(whole), open_program(whole)
        self.stages = [open_program(stage) for stage in self.graph.stages()]
        self.fixed = [open_program(self.graph.fixed(idx)) for idx in range(self.num_exits + 1)]
        self.criterion = 'confidence' if model.policy is None else model.policy.criterion
        self.combine = None if model.policy is None else model.policy.combine
        self.conditional = open_program(make_conditional(self.graph, criterion=self.criterion, combine=self.combine))
        self.every = ExitPolicy(self.criterion, (1,) * self.num_exits, combine=self.combine)

    def _run(self, session: onnxruntime.InferenceSession) -> Callable[[], object]:
        return partial(session.run, None, {session.get_inputs()[0].name: self.image})

    def _leave(self, policy: ExitPolicy, place: int) -> Callable[[], object]:
        return partial(self.conditional.run, None, force_exit(policy, place, self.image))

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Return a row for each ratio: its median and quartiles, and those of a program against itself."""
        calls: dict[str, Callable[[], object]] = {
            'whole': self._run(self.whole),
            'whole again': self._run(self.whole_again),
            'chain': partial(run_chain, self.stages, self.image),
            'conditional, to main': self._leave(self.every, self.num_exits),
        }
        pairs = [(name, 'whole') for name in ('whole again', 'chain', 'conditional, to main')]
        for idx in range(self.num_exits + 1):
            name = 'main' if idx == self.num_exits else f'exit {idx}'
            cut = cut_and_export(self.model, idx)
            calls[f'{name}, cut by hand'], calls[f'{name}, cut by hand again'] = self._run(cut), self._run(cut)
            calls[f'{name}, fixed'] = self._run(self.fixed[idx])
            pairs += [(f'{name}, {kind}', f'{name}, cut by hand') for kind in ('cut by hand again', 'fixed')]
        times = take_turns(calls, rounds)
        return [describe_pair(name, reference, times) for name, reference in pairs]

    def measure_savings(self, points: list[PolicyResult], rounds: int) -> list[dict[str, Any]]:
        """Return for each policy the share of main's MACs and time that it saves.

        Time is that of the conditional program leaving at each exit, weighted by the shares of images that do.
        """
        plain = self.model.cost()[-1].fixed.macs
        calls: dict[Any, Callable[[], object]] = {'plain': self._run(self.fixed[-1])}
        keys = []
        for point in points:
            places = [*point.policy.used, self.num_exits]
            keys.append([(point.policy.used, place, point.shares[place]) for place in places])
            for place in places:
                calls[point.policy.used, place] = self._leave(point.policy, place)
        times = take_turns(calls, rounds)
        rows = []
        for point, parts in zip(points, keys):
            mean = sum(share * np.array(times[used, place]) for used, place, share in parts)
            ratio, spread = describe_ratios(mean, times['plain'])
            promised = 1 - (point.macs or 0) / plain
            rows.append(
                {
                    'policy of MACs, %': 100 * (1 - promised),
                    'time, %': 100 * ratio,
                    'quartiles': spread,
                    'saving kept, %': 100 * (1 - ratio) / promised if promised > 0 else None,
                }
            )
        return rows

    @torch.no_grad()
    def compare_policies(self, count: int, images: np.ndarray) -> dict[str, Any]:
        """Return whether so many random policies of all criteria say what the simulation says."""
        logits = [single.numpy() for single in self.model(torch.from_numpy(images), exits=True).logits]
        kinds = [(criterion, combine) for criterion in CRITERIA for combine in (None, *COMBINATIONS)]
        return compare_policies(self.graph, images, logits, count=count, kinds=kinds)


def read_int8(folder: str) -> dict[str, Any]:
    """Return the manifest of an exported folder.

    Raises:
        CheckpointError: The folder is not what `export` wrote.
        InvalidValueError: It has no int8 programs.
    """
    manifest = read_manifest(folder)
    if 'int8' not in manifest['programs']:
        raise InvalidValueError(f'--int8 must be a folder with int8 programs, got {folder}: export it with --int8.')
    return manifest


def measure_int8(folder: str, manifest: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Return a row for the chain and each fixed exit of an exported folder: int8, and fp32 again, against fp32."""
    image = np.random.default_rng(0).standard_normal((1, *manifest['preprocessing']['input_size'])).astype(np.float32)
    calls: dict[str, Callable[[], object]] = {}
    pairs = []
    kinds = {'fp32': 'fp32', 'fp32 again': 'fp32', 'int8': 'int8'}
    for kind, precision in kinds.items():
        programs = manifest['programs'][precision]
        stages, fixed = (
            [open_program(str(Path(folder, path))) for path in programs[form]] for form in ('stages', 'fixed')
        )
        own = {'chain': partial(run_chain, stages, image)} if stages else {}
        for exit_, session in zip(manifest['exits'], fixed):
            own[exit_['name']] = partial(session.run, None, {'image': image})
        calls |= {f'{name}, {kind}': call for name, call in own.items()}
        pairs += [(f'{name}, {kind}', f'{name}, fp32') for name in own if kind != 'fp32']
    times = take_turns(calls, rounds)
    return [describe_pair(name, reference, times) for name, reference in sorted(pairs)]


def describe_int8(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the programs of an exported folder classify correctly, in percent of its held-out images."""
    found = manifest['int8']
    names = [exit_['name'] for exit_ in manifest['exits']]
    rows = [dict(zip(('of', 'fp32', 'int8'), row)) for row in zip(names, found['top1']['fp32'], found['top1']['int8'])]
    if found['policies']:
        worst = max(found['policies'], key=lambda policy: policy['fp32'] - policy['int8'])
        share = worst['macs'] / manifest['plain_macs']
        rows.append({'of': f'saved policy that loses most, {share:.0%}', 'fp32': worst['fp32'], 'int8': worst['int8']})
    return [{**row, 'lost': row['fp32'] - row['int8'], 'images': found['images']} for row in rows]


def take_turns(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Return the seconds of each call in each round; in a turn it is called as often as the clock needs."""
    device = torch.device('cpu')
    torch.set_num_threads(1)
    once = time_interleaved(calls, 5, device)
    repeats = {
        name: max(1, round(_MIN_SECONDS / max(statistics.median(values), 1e-6))) for name, values in once.items()
    }
    turns = {name: partial(_repeat, call, repeats[name]) for name, call in calls.items()}
    times = time_interleaved(turns, rounds, device)
    return {name: [value / repeats[name] for value in values] for name, values in times.items()}


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def describe_pair(name: str, reference: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return the row of a program against another one."""
    ratio, spread = describe_ratios(times[name], times[reference])
    return {
        'program': name,
        'ms': 1e3 * statistics.median(times[name]),
        'against': reference,
        'time ratio': ratio,
        'quartiles': spread,
    }
