"""Whether exported programs say what the model says: one member of each of timm's families, and the paper's networks."""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from timm_multiexit.deploy.conditional import make_conditional
from timm_multiexit.deploy.graph import ExitGraph
from timm_multiexit.deploy.programs import copy_for_export, trace_onnx
from timm_multiexit.factory import create_model
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import one_line
from timm_multiexit.utils.files import write_text

BATCHES = (1, 2, 7)
LIMIT = 1e-5  # of the largest logit
CIFAR_NETWORKS = tuple(
    """
    cifar_resnet8 cifar_resnet20 cifar_resnet32 cifar_resnet56 cifar_resnet18 cifar_resnet50 cifar_resnet101
    cifar_resnet152 cifar_resnext29_4x64d cifar_vgg19_bn cifar_wide_resnet28_10 cifar_pyramidnet110_270
    """.split()
)
COLUMNS = ('fixed', 'stages', 'conditional')


def list_networks() -> dict[str, Callable[[], MultiExitModel]]:
    """Return what makes each network, by the name of its family, or of the network for the paper's."""
    from tests.helpers import enliven
    from tests.helpers.families import FAMILIES, make_small

    def make(family: str) -> MultiExitModel:
        model: MultiExitModel = enliven(make_small(family))
        return model

    def make_cifar(name: str) -> MultiExitModel:
        model: MultiExitModel = enliven(create_model(name, num_classes=10, head='paper').eval())
        return model

    networks = {family: (lambda family=family: make(family)) for family in FAMILIES}
    return networks | {name: (lambda name=name: make_cifar(name)) for name in CIFAR_NETWORKS}


def open_program(program: Any) -> onnxruntime.InferenceSession:
    """Return a program that runs on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    content = program if isinstance(program, (str, bytes)) else program.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])


def run_chain(stages: Sequence[onnxruntime.InferenceSession], images: np.ndarray) -> list[np.ndarray]:
    """Return the logits of all classifiers."""
    feed, logits = {'image': images}, []
    for stage in stages:
        found = dict(zip([value.name for value in stage.get_outputs()], stage.run(None, feed)))
        logits.append(found.pop('logits'))
        feed = found
    return logits


def compare(found: Sequence[np.ndarray], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of logits, as a share of the largest logit of the classifier."""
    return max(float(np.abs(one - two.numpy()).max() / two.abs().max()) for one, two in zip(found, expected))


@torch.no_grad()
def check_network(make: Callable[[], MultiExitModel]) -> dict[str, Any]:
    """Return the row of a network: what it is, how long its export took, and how far its programs are from eager."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = make()
    begun = time.perf_counter()
    whole = trace_onnx(copy_for_export(model), model.input_size)
    graph = ExitGraph(whole)
    fixed, stages = [graph.fixed(idx) for idx in range(len(graph.exits))], graph.stages()
    conditional = make_conditional(graph, criterion='confidence', combine=None)
    row: dict[str, Any] = {
        'model': model.pretrained_cfg['architecture'],
        'px': model.input_size[-1],
        'exits': len(model.exits),
        'export s': round(time.perf_counter() - begun, 1),
        'MB': round(whole.ByteSize() / 1e6, 1),
        'states': ' '.join(str(len(stage.graph.output) - 1) for stage in stages[:-1]),
    }
    inputs = {size: torch.randn(size, *model.input_size) for size in BATCHES}
    expected = {size: model(images, exits=True).logits for size, images in inputs.items()}
    sessions = [open_program(program) for program in fixed]
    row['fixed'] = max(
        compare([one.run(None, {'image': images.numpy()})[0] for one in sessions], expected[size])
        for size, images in inputs.items()
    )
    sessions = [open_program(program) for program in stages]
    row['stages'] = max(compare(run_chain(sessions, images.numpy()), expected[size]) for size, images in inputs.items())
    row['conditional'] = check_conditional(open_program(conditional), inputs[1], expected[1])
    if max(row[name] for name in COLUMNS) > LIMIT:
        exact = model.double()
        row['eager, against float64'] = max(
            compare([logits.numpy() for logits in expected[size]], exact(images.double(), exits=True).logits)
            for size, images in inputs.items()
        )
    return row


def check_conditional(program: onnxruntime.InferenceSession, image: Tensor, expected: Sequence[Tensor]) -> float:
    """Return how far the answers are from eager where each classifier in turn answers, the ones before run or not."""
    num_exits, worst = len(expected) - 1, 0.0
    for place in range(num_exits + 1):
        for before in (2.0, np.nan):  # a confidence that nothing reaches; not used
            thresholds = np.array([before] * place + [0.0] * (num_exits - place), np.float32)
            feed = {
                'image': image.numpy(),
                'thresholds': thresholds,
                'temperatures': np.ones(num_exits + 1, np.float32),
            }
            logits, exit_idx = program.run(None, feed)
            if exit_idx.tolist() != [place]:
                raise ValueError(f'the conditional program left at {exit_idx}, not at {place}')
            worst = max(worst, compare([logits], [expected[place]]))
    return worst


def _work(name: str, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        row = check_network(list_networks()[name])
        wrong = [column for column in COLUMNS if not row[column] <= LIMIT]
        row['result'] = f'above {LIMIT:g}: {", ".join(wrong)}' if wrong else 'equal'
    except Exception as error:
        row = {'result': f'{type(error).__name__}: {one_line(error)}'}
    results.put(row)


def check_in_time(name: str, seconds: float) -> dict[str, Any]:
    """Return the row of a network, made in a process of its own that has so many seconds."""
    # Forked, so that the libraries are not imported ninety times.
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    process = context.Process(target=_work, args=(name, results), daemon=True)
    process.start()
    end = time.monotonic() + seconds
    row = None
    while row is None and time.monotonic() < end:
        try:
            row = results.get(timeout=1)
        except Exception:  # queue.Empty
            if not process.is_alive():
                row = {'result': f'the process ended with code {process.exitcode}'}
    if row is None:
        process.kill()
        row = {'result': f'not done in {seconds:.0f} s'}
    process.join()
    return {'network': name, **row}


def check_networks(names: Sequence[str], path: Path, *, seconds: float, show: Callable[[str], None] = print) -> None:
    """Check networks and write their rows, as JSON to a path and as a table beside it, after each of them.

    Rows that are in the file stay, but for those of the names.
    """
    known = list_networks()
    rows = {}
    if path.is_file():
        rows = {row['network']: row for row in json.loads(path.read_text(encoding='utf-8'))['rows']}
    for name in names:
        rows[name] = check_in_time(name, seconds)
        show(json.dumps(rows[name]))
        ordered = [rows[name] for name in known if name in rows]
        content = {'limit': LIMIT, 'batches': BATCHES, **describe_environment(), 'rows': ordered}
        write_text(path, json.dumps(content, indent=1) + '\n')
        write_text(path.with_suffix('.md'), format_parity(content))


def format_parity(content: dict[str, Any]) -> str:
    """Return the rows as a page in Markdown."""
    rows = content['rows']
    equal = [row for row in rows if row['result'] == 'equal']
    families = [row for row in rows if not row['network'].startswith('cifar_')]
    lines = [
        '# Exported programs against eager PyTorch',
        '',
        f'{len(equal)} of {len(rows)} networks agree ({len([row for row in families if row in equal])} of'
        f' {len(families)} families of timm, {len([row for row in equal if row not in families])} of'
        f' {len(rows) - len(families)} CIFAR networks): the largest difference of a logit over the largest logit of the'
        f' same classifier is at most {content["limit"]:g}, at batches of'
        f' {", ".join(map(str, content["batches"]))} (the conditional program: of 1, leaving at each classifier in'
        ' turn). Weights are random. "States" are the tensors that cross each cut. Made by `benchmark.py export`.',
        '',
        f'{content["commit"]}, {content["versions"]}, {content["hardware"]}',
        '',
        '| network | model | px | exits | states | MB | export s | fixed | stages | conditional | result |',
        '|---|---|--:|--:|---|--:|--:|--:|--:|--:|---|',
    ]
    for row in rows:
        cells = [row['network'], *(row.get(name, '') for name in ('model', 'px', 'exits', 'states', 'MB', 'export s'))]
        cells += [f'{row[name]:.1e}' if name in row else '' for name in COLUMNS]
        result = row['result'].replace('|', '\\|')
        if 'eager, against float64' in row:
            result += f' (eager itself against float64: {row["eager, against float64"]:.1e})'
        lines.append('| ' + ' | '.join(map(str, [*cells, result])) + ' |')
    return '\n'.join(lines) + '\n'
