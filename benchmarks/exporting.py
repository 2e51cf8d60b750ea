"""Whether exported programs say what the model says: members of timm's families, and the paper's networks."""

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy
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
_OWN_ERROR = 'eager, against float64'
_LIVELY_ERROR = 'eager with lively weights, against float64'


def list_networks(is_lively: bool = True) -> dict[str, Callable[[], MultiExitModel]]:
    """Return what makes each network, by the name of its family, or of the network for the paper's.

    Lively weights are those that timm makes, with norms moved so that every layer counts.
    """
    from tests.helpers import enliven
    from tests.helpers.families import FAMILIES, make_small

    def make(family: str) -> MultiExitModel:
        model: MultiExitModel = make_small(family)
        return enliven(model) if is_lively else model

    def make_cifar(name: str) -> MultiExitModel:
        model = create_model(name, num_classes=10, head='paper').eval()
        return enliven(model) if is_lively else model

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
    return largest(float(np.abs(one - two.numpy()).max() / two.abs().max()) for one, two in zip(found, expected))


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, NaN if one is, which Python's own would leave out."""
    return float(np.max(list(values)))


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
    row['fixed'] = largest(
        compare([one.run(None, {'image': images.numpy()})[0] for one in sessions], expected[size])
        for size, images in inputs.items()
    )
    sessions = [open_program(program) for program in stages]
    row['stages'] = largest(
        compare(run_chain(sessions, images.numpy()), expected[size]) for size, images in inputs.items()
    )
    row['conditional'] = check_conditional(open_program(conditional), inputs[1], expected[1])
    if not largest(row[name] for name in COLUMNS) <= LIMIT:
        exact = model.double()
        row[_OWN_ERROR] = largest(
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
            worst = largest([worst, compare([logits], [expected[place]])])
    return worst


def feed_policy(image: np.ndarray, policy: ExitPolicy) -> dict[str, np.ndarray]:
    """Return the inputs of a conditional program for an image [1, C, H, W] and a policy."""
    thresholds = [np.nan if value is None else value for value in policy.thresholds]
    temperatures = policy.temperatures or (1.0,) * (len(thresholds) + 1)
    return {
        'image': image,
        'thresholds': np.array(thresholds, np.float32),
        'temperatures': np.array(temperatures, np.float32),
    }


def draw_policy(
    generator: np.random.Generator, logits: Sequence[np.ndarray], criterion: str, combine: str | None
) -> ExitPolicy:
    """Return a random policy: a quarter of the exits not used, half of the time temperatures.

    Thresholds are anywhere between the scores of the images, so that some of these leave at each exit.
    """
    num_exits = len(logits) - 1
    temperatures = () if generator.random() < 0.5 else tuple(np.exp(generator.normal(size=num_exits + 1)).clip(0.1, 9))
    if criterion == 'patience':
        thresholds = [int(generator.integers(1, 3)) for _ in range(num_exits)]
    else:
        score = CRITERIA[criterion].score
        assert score is not None
        scores = [score(torch.from_numpy(single)).numpy() for single in logits[:-1]]
        thresholds = [float(generator.uniform(each.min(), each.max())) for each in scores]
    used = generator.random(num_exits) < 0.75
    return ExitPolicy(
        criterion, tuple(value if use else None for value, use in zip(thresholds, used)), temperatures, combine
    )


def compare_policies(
    graph: ExitGraph,
    images: np.ndarray,
    logits: Sequence[np.ndarray],
    *,
    count: int,
    kinds: Sequence[tuple[str, str | None]],
    seed: int = 0,
) -> dict[str, Any]:
    """Return how many of some random policies say of an image what `apply_policy` says of the model's own logits.

    Args:
        graph: All classifiers.
        images: [N, C, H, W]; each policy is asked about one of them.
        logits: Eager logits of these images, one [N, classes] array per classifier.
        count: Policies.
        kinds: Criterion and combination of the policies, in turn.
        seed: Of thresholds, temperatures and images.
    """
    generator = np.random.default_rng(seed)
    programs = {kind: open_program(make_conditional(graph, criterion=kind[0], combine=kind[1])) for kind in kinds}
    left: Counter[int] = Counter()
    equal = unused = 0
    worst = 0.0
    for number in range(count):
        kind = kinds[number % len(kinds)]
        policy = draw_policy(generator, logits, *kind)
        place = int(generator.integers(len(images)))
        answer, exit_idx = programs[kind].run(None, feed_policy(images[place : place + 1], policy))
        expected = apply_policy(policy, [torch.from_numpy(single[place : place + 1]) for single in logits])
        difference = compare([answer], [expected.logits])
        equal += exit_idx.tolist() == expected.exit_idx.tolist() and difference <= LIMIT
        unused += None in policy.thresholds
        worst = largest([worst, difference])
        left[int(exit_idx[0])] += 1
    return {
        'policies': count,
        'equal': equal,
        'with unused exits': unused,
        'left at': dict(sorted(left.items())),
        'largest difference': worst,
    }


def _work(name: str, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        row = check_network(list_networks()[name])
        if row.get(_OWN_ERROR, 0) > LIMIT:
            # Not even eager says the same at another precision: with these weights rounding grows from layer to layer.
            own_error = row[_OWN_ERROR]
            row = check_network(list_networks(is_lively=False)[name])
            row[_LIVELY_ERROR] = own_error
        wrong = [column for column in COLUMNS if not row[column] <= LIMIT]
        row['result'] = f'above {LIMIT:g}: {", ".join(wrong)}' if wrong else 'equal'
    except Exception as error:
        row = {'result': f'{type(error).__name__}: {one_line(error)}'}
    results.send(row)


def check_in_time(name: str, seconds: float) -> dict[str, Any]:
    """Return the row of a network, made in a process of its own that has so many seconds."""
    # Forked, so that the libraries are not imported ninety times.
    context = multiprocessing.get_context('fork')
    results, of_process = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, of_process), daemon=True)
    process.start()
    of_process.close()  # so that the pipe ends with the process
    row = None
    if results.poll(seconds):
        with suppress(EOFError):
            row = results.recv()
    else:
        process.kill()
        row = {'result': f'not done in {seconds:.0f} s'}
    process.join()
    row = row or {'result': f'the process ended with code {process.exitcode}'}
    return {'network': name, **row, 'commit': describe_environment()['commit']}


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
        environment = {key: value for key, value in describe_environment().items() if key != 'commit'}
        content = {'limit': LIMIT, 'batches': BATCHES, **environment, 'rows': ordered}
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
        f'{content["versions"]}, {content["hardware"]}; commits {", ".join(sorted({row["commit"] for row in rows}))}',
        '',
        '| network | model | px | exits | states | MB | export s | fixed | stages | conditional | result |',
        '|---|---|--:|--:|---|--:|--:|--:|--:|--:|---|',
    ]
    for row in rows:
        cells = [row['network'], *(row.get(name, '') for name in ('model', 'px', 'exits', 'states', 'MB', 'export s'))]
        cells += [f'{row[name]:.1e}' if name in row else '' for name in COLUMNS]
        result = row['result'].replace('|', '\\|')
        if _OWN_ERROR in row:
            result += f' (eager itself against float64: {row[_OWN_ERROR]:.1e})'
        if _LIVELY_ERROR in row:
            result += f" (timm's initial weights; with lively ones eager is {row[_LIVELY_ERROR]:.1e} from float64)"
        lines.append('| ' + ' | '.join(map(str, [*cells, result])) + ' |')
    return '\n'.join(lines) + '\n'
