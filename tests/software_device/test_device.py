"""The software device itself: it refuses, counts, delays and orders as a GPU does."""

import pytest
import torch

import software_device

pytestmark = pytest.mark.slow  # compiles the device


@pytest.fixture
def x(device):
    return torch.arange(6.0).view(2, 3).to(device)


def seconds(call):
    started = software_device.read_clock()
    call()
    return software_device.read_clock() - started


def test_it_is_the_accelerator_of_the_process(device):
    assert torch.accelerator.current_accelerator() == torch.device('software')
    assert torch.accelerator.device_count() == 1
    assert torch.empty(1, device='software').device == device


@pytest.mark.parametrize(
    'mix',
    [
        lambda x, y: x + y,
        lambda x, y: x @ y.T,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.add_(y),
        lambda x, y: torch.where(x > 1, x, y),
        lambda x, y: torch.nn.functional.linear(x, y),
        lambda x, y: torch.nn.functional.layer_norm(x, (3,), y[0]),
        lambda x, y: torch.nn.functional.conv1d(x[None], y[None]),
        lambda x, y: torch.nn.functional.batch_norm(x, y[0], y[0]),
        lambda x, y: torch.nn.functional.cross_entropy(x, y.argmax(-1)),
    ],
)
def test_tensors_of_the_cpu_are_refused_beside_its_own(mix, x):
    with pytest.raises(RuntimeError, match='same device'):
        mix(x, torch.ones(2, 3))


def test_numbers_and_host_indices_are_taken(x):
    assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
    with software_device.waits() as waits:
        row = x[torch.tensor([1])]
    assert waits == {'copy from host': 1}
    assert row.tolist() == [[3, 4, 5]]
    with software_device.waits() as waits:
        x[torch.tensor([1])] = torch.ones_like(x[:1])
    assert waits == {'copy from host': 1}
    assert x.tolist() == [[0, 1, 2], [1, 1, 1]]


def test_masks_that_are_filled_do_not_wait(x):
    with software_device.waits() as waits:
        x[x > 3] = 0
        x.masked_fill_(x > 1, -1)
    assert waits == {}
    assert x.tolist() == [[0, 1, -1], [-1, 0, 0]]


WAITS = {
    'item': (lambda x: x[0, 0].item(), 'item'),
    'bool': (lambda x: bool(x.sum() > 1), 'item'),
    'cpu': (lambda x: x.cpu(), 'copy to host'),
    'tolist': (lambda x: x.tolist(), 'copy to host'),
    'to device': (lambda x: torch.ones(3).to(x.device), 'copy from host'),
    'tensor': (lambda x: torch.tensor([1.0], device=x.device), 'copy from host'),
    'mask': (lambda x: x[x > 1], 'aten::nonzero'),
    'assigned mask': (lambda x: x.__setitem__(x > -1, x.flatten() + 0), 'aten::nonzero'),
    'nonzero': (lambda x: x.nonzero(), 'aten::nonzero'),
    'equal': (lambda x: torch.equal(x, x), 'aten::equal'),
    'stream': (lambda x: torch.accelerator.current_stream().synchronize(), 'stream'),
    'event': (lambda x: torch.accelerator.current_stream().record_event().synchronize(), 'event'),
    'device': (lambda x: torch.accelerator.synchronize(), 'device'),
}


@pytest.mark.parametrize(('call', 'kind'), WAITS.values(), ids=WAITS)
def test_every_wait_of_the_host_is_counted_and_takes_as_long_as_what_is_queued(call, kind, x):
    with software_device.waits() as waits:
        call(x)
    assert waits == {kind: 1}
    software_device.queue(0.25)
    assert seconds(lambda: call(x)) == 0.25


def test_kernels_copies_that_do_not_block_and_queries_do_not_wait(x):
    software_device.queue(0.25)
    with software_device.waits() as waits:
        assert seconds(lambda: (x @ x.T).softmax(-1).to('cpu', non_blocking=True)) == 0
        assert not torch.accelerator.current_stream().query()
    assert waits == {}
    torch.accelerator.synchronize()
    assert torch.accelerator.current_stream().query()


def test_copy_that_does_not_block_arrives_with_the_wait(x):
    copy = x.to('cpu', non_blocking=True)
    assert copy.is_pinned()
    assert copy.isnan().all()
    event = torch.accelerator.current_stream().record_event()
    later = (x + 1).to('cpu', non_blocking=True)
    event.synchronize()
    assert copy.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert later.isnan().all()
    torch.accelerator.synchronize()
    assert later.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_copy_to_memory_that_is_not_pinned_waits(x):
    with software_device.waits() as waits:
        copy = torch.empty(2, 3).copy_(x, non_blocking=True)
    assert waits == {'copy to host': 1}
    assert copy.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_streams_are_busy_by_themselves_and_wait_for_each_other(device):
    first, second = torch.Stream(device), torch.Stream(device)
    software_device.queue(0.25, first)
    assert (first.query(), second.query()) == (False, True)
    assert seconds(second.synchronize) == 0
    second.wait_stream(first)
    assert not second.query()
    assert seconds(second.synchronize) == 0.25


def test_events_measure_what_is_queued_between_them(device):
    stream = torch.Stream(device)
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    stream.record_event(start)
    software_device.queue(0.0625, stream)
    stream.record_event(end)
    assert not end.query()
    end.synchronize()
    assert start.elapsed_time(end) == 62.5


def test_kernels_take_the_time_that_they_are_given(x):
    torch.accelerator.synchronize()
    with software_device.kernel_seconds(0.125):
        assert seconds(lambda: [x + 1 for _ in range(5)]) == 0
    assert seconds(torch.accelerator.synchronize) == 5 * 0.125


ORDERS = {
    'none': (lambda first, second: None, 1),
    'stream': (lambda first, second: second.wait_stream(first), 0),
    'event': (lambda first, second: second.wait_event(first.record_event()), 0),
    'host': (lambda first, second: first.synchronize(), 0),
    'wrong way': (lambda first, second: first.wait_stream(second), 1),
}


@pytest.mark.parametrize(('order', 'num_races'), ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('reads', [True, False], ids=['read', 'write'])
def test_memory_that_two_streams_use_is_a_race_unless_they_are_ordered(order, num_races, reads, device):
    first, second = torch.Stream(device), torch.Stream(device)
    with software_device.races() as races:
        with first:
            x = torch.ones(3, device=device)
        order(first, second)
        with second:
            x.sum() if reads else x.zero_()
    assert len(races) == num_races, races
    if num_races:
        assert f'on stream {second.stream_id} {"reads" if reads else "writes"}' in races[0]
        assert f'on stream {first.stream_id}' in races[0]


def test_writing_what_another_stream_still_reads_is_a_race(device):
    stream, x = torch.Stream(device), torch.ones(3, device=device)
    torch.accelerator.synchronize()
    with software_device.races() as races:
        with stream:
            x.sum()
        x.zero_()
    assert len(races) == 1
    assert 'writes' in races[0]


def test_random_numbers_are_its_own_and_those_of_the_seed(device):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    assert torch.equal(torch.rand(4, device=device).cpu(), wanted)
    state = torch.get_device_module(device).get_rng_state()
    second = torch.rand(4, device=device).cpu()
    torch.rand(100)
    torch.get_device_module(device).set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device).cpu(), second)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(torch.rand(4, device=device, generator=generator).cpu(), wanted)


def test_autocast_computes_in_bfloat16(x):
    with torch.autocast('software', torch.bfloat16):
        product = x @ x.T
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
    assert torch.equal(product.cpu(), (x.cpu().bfloat16() @ x.cpu().bfloat16().T))


def test_gradients_equal_the_cpus(device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, groups=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    )
    images = torch.randn(4, 3, 9, 9)
    net(images)
    grads = []
    for place in ('cpu', device):
        net.to(place).zero_grad()
        for module in net:
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        torch.nn.functional.cross_entropy(net(images.to(place)), torch.arange(4, device=place)).backward()
        grads.append([param.grad.cpu() for param in net.parameters()] + [net[1].running_mean.cpu()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0
