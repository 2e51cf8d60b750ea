"""What exits cost on a GPU: the forms in which a model is served there, against plain timm in the same run."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference import PLAIN, InferenceBenchmark, Variant
from timm_multiexit.models.multi_exit import MultiExitModel

# Columns of `InferenceBenchmark.measure` that the table has, and their names there.
_COLUMNS = {
    'call': 'call',
    'img/s': 'images/s',
    'time ratio': 'time',
    'quartiles': 'quartiles',
    'MACs ratio': 'MACs',
}


def capture(call: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """Return a function that replays the call on these images as one CUDA graph, and gives its output.

    Raises:
        RuntimeError: Something in the call cannot be captured: a wait of the host, say.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their algorithms, and allocate, outside of the graph
            call(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(images)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@torch.inference_mode()
def add_graphs(benchmark: InferenceBenchmark) -> None:
    """Add plain timm and every exit as a CUDA graph."""
    *exits, main = benchmark.costs
    calls = {PLAIN: (benchmark.plain, main.fixed.macs)}
    for idx, cost in enumerate(exits):
        calls[f'exit_idx={idx}'] = (partial(benchmark.model, exit_idx=idx), cost.fixed.macs)
    for name, (call, macs) in calls.items():
        benchmark.variants[f'{name}, CUDA graph'] = Variant(capture(call, benchmark.images), macs)


def measure_table(
    model: MultiExitModel, batch_sizes: Sequence[int], *, rounds: int, shares: Sequence[float], compiled: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table: fixed exits, graphs where there is CUDA, early leaving and its compiled form.

    Args:
        model: In eval mode, in the channels_last format.
        batch_sizes: Each is measured by itself, on random images of the model's dtype.
        rounds: Turns of each form.
        shares: Of the images that get to an exit, those that leave there.
        compiled: Measure compiled forms too.
    """
    param = next(model.parameters())
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, *model.input_size)
        images = images.to(param.device, param.dtype, memory_format=torch.channels_last)
        benchmark = InferenceBenchmark(model, images)
        benchmark.add_fixed()
        if images.device.type == 'cuda':
            add_graphs(benchmark)
        benchmark.add_policies(shares)
        if compiled:
            benchmark.add_compiled(shares)
        for row in benchmark.measure(rounds):
            yield {'batch': batch_size, **{name: row[column] for column, name in _COLUMNS.items()}}
