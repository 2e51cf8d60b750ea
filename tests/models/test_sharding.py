"""Models that `fully_shard` shares out over processes: as whole ones, or refused."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from helpers.sharded import (
    CLASSES,
    HALF_WAY,
    NETWORKS,
    SIZE,
    STEPS,
    difference,
    draw,
    make_model,
    make_optimizer,
    resume,
    run_process,
    shard,
    train,
)
from torch.distributed.checkpoint.state_dict import get_state_dict

import timm_multiexit as tme
from timm_multiexit.models.sharding import gather_state, is_sharded, shard_optimizer_state, shard_state
from timm_multiexit.training.resume import load_optimizer
from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, StateError


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone: parameters are sharded, over one."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(one_process):
    return shard(make_model('test_vit'), 'test_vit').eval()


def test_sharded_model_has_answers_costs_and_table_of_a_whole_one(sharded):
    whole, (images, target) = make_model('test_vit').eval(), draw(0)
    assert is_sharded(sharded)
    assert not is_sharded(whole)
    with torch.no_grad():
        for idx, logits in enumerate(whole(images, exits=True).logits):
            assert torch.equal(sharded(images, exits=True).logits[idx], logits)
            assert torch.equal(sharded(images, exit_idx=idx), logits)
    assert sharded.cost() == whole.cost()
    assert tme.evaluate(sharded, [(images, target)]) == tme.evaluate(whole, [(images, target)])


def test_gathered_model_is_a_whole_one_of_its_own(sharded, tmp_path):
    whole, (images, _) = make_model('test_vit').eval(), draw(0)
    sharded.exits[0].requires_grad_(False)
    gathered = tme.gather_model(sharded)
    assert [type(module) for module in gathered.modules()] == [type(module) for module in whole.modules()]
    assert [param.requires_grad for param in gathered.parameters()] == [p.requires_grad for p in sharded.parameters()]
    assert difference(gathered.state_dict(), whole.state_dict()) == 0
    tme.save_pretrained(gathered, tmp_path / 'saved')
    assert torch.equal(gathered.infer(images, threshold=0.0).logits, whole.infer(images, threshold=0.0).logits)
    with torch.no_grad():
        for param in gathered.parameters():
            param.zero_()
        assert torch.equal(sharded(images), whole(images))  # they share nothing
    gathered.load_state_dict(whole.state_dict())  # and no hook of torch's is left
    assert torch.equal(gathered(images), whole(images))


def test_whole_model_is_copied_by_gathering():
    model = make_model('test_resnet').eval()
    copied = tme.gather_model(model)
    assert difference(copied.state_dict(), model.state_dict()) == 0
    assert not {id(param) for param in copied.parameters()} & {id(param) for param in model.parameters()}
    with pytest.raises(InvalidTypeError, match='model must be a Module, got OrderedDict'):
        tme.gather_model(model.state_dict())


REFUSED = {
    'infer': lambda model, images, folder: model.infer(images, threshold=0.5),
    'anytime': lambda model, images, folder: list(model.anytime(images)),
    'predict': lambda model, images, folder: model.predict(images, deadline_ms=5),
    'can_leave': lambda model, images, folder: model.can_leave,
    'measure_times': lambda model, images, folder: model.measure_times(images),
    'calibrate': lambda model, images, folder: model.calibrate([(images, images[:, 0, 0, 0].long())], budget='60%'),
    'truncate': lambda model, images, folder: tme.truncate(model, 0),
    'drop_exits': lambda model, images, folder: model.drop_exits([0]),
    'reset_classifier': lambda model, images, folder: model.reset_classifier(3),
    'add_projectors': lambda model, images, folder: model.add_projectors(),
    'save_pretrained': lambda model, images, folder: tme.save_pretrained(model, folder / 'saved'),
}


@pytest.mark.parametrize('call', REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_a_whole_model_says_so_in_one_line(sharded, call, tmp_path):
    with pytest.raises(StateError, match=r'needs a whole model, .* on gather_model\(model\)') as error:
        call(sharded, draw(0)[0], tmp_path)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'saved').exists()


def test_whole_states_are_shared_out_and_brought_together(sharded, tmp_path):
    whole = make_model('test_vit')
    optimizer, expected = make_optimizer(sharded), make_optimizer(whole)
    train(whole, expected, range(2))
    sharded.load_state_dict(shard_state(whole.state_dict(), sharded.state_dict()))
    load_optimizer(optimizer, {'optimizer': copy.deepcopy(expected.state_dict())}, 'last.pth.tar')
    assert difference(sharded.state_dict(), whole.state_dict()) == 0
    gathered = gather_state(optimizer.state_dict())
    assert list(gathered) == ['state', 'param_groups']
    assert gathered['param_groups'] == expected.state_dict()['param_groups']
    assert len(gathered['state']) == len(list(whole.parameters()))
    for idx, state in expected.state_dict()['state'].items():
        assert type(gathered['state'][idx]['exp_avg']) is torch.Tensor
        assert all(torch.equal(gathered['state'][idx][key], value) for key, value in state.items())
    # And they go on to the same.
    train(whole, expected, range(2, 3))
    train(sharded, optimizer, range(2, 3))
    assert difference(sharded.state_dict(), whole.state_dict()) < 1e-12
    # A training checkpoint goes into a sharded model, too.
    torch.save({'state_dict': make_model('test_vit').state_dict()}, tmp_path / 'last.pth.tar')
    tme.load_checkpoint(sharded, tmp_path / 'last.pth.tar')
    assert difference(sharded.state_dict(), make_model('test_vit').state_dict()) == 0


def test_damaged_state_of_an_optimizer_is_one_line(sharded):
    optimizer = make_optimizer(sharded)
    for state in ({}, {'state': 3, 'param_groups': []}, {'state': {0: 5}, 'param_groups': []}, None):
        with pytest.raises(CheckpointError, match="does not fit this run's"):
            load_optimizer(optimizer, {'optimizer': state}, 'last.pth.tar')
    whole = make_optimizer(make_model('test_vit')).state_dict()
    assert shard_optimizer_state(whole, make_optimizer(make_model('test_vit'))) is whole


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """What two processes found, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp('two')
    for name in NETWORKS:
        model = make_model(name)
        optimizer = make_optimizer(model)
        train(model, optimizer, range(HALF_WAY))
        state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
        dcp.save(state, checkpoint_id=folder / f'{name}-one', no_dist=True)
    mp.spawn(run_process, args=(2, folder), nprocs=2)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)], folder


@pytest.mark.dist
@pytest.mark.parametrize('name', NETWORKS)
def test_two_processes_come_to_what_one_comes_to(two_processes, name):
    found, folder = [of_rank[name] for of_rank in two_processes[0]], two_processes[1]
    for rank, of_rank in enumerate(found):
        assert of_rank['types'] == ['DTensor']
        for key in ('trained', 'average', 'resumed'):
            assert of_rank[key] < 1e-7, key
        assert len(of_rank['close']) == 7
        assert all(of_rank['close'])
        assert of_rank['num_samples'] == [8 * (3 - 2 * rank)] * 2
        assert of_rank['rows']
        assert of_rank['cost']
    # The tolerance is far below what the steps do.
    assert difference(found[0]['start'], found[0]['expected']) > 1e-4
    assert found[0]['gathered'] < 1e-7
    assert found[0]['type']
    assert found[1]['is_meta']
    saved = tme.create_model(f'local-dir:{folder / name}', pretrained=True)
    assert difference(saved.state_dict(), found[0]['expected']) < 1e-6


@pytest.mark.dist
@pytest.mark.parametrize('name', NETWORKS)
def test_one_process_goes_on_where_two_stopped(two_processes, name):
    found, folder = two_processes
    model = make_model(name)
    optimizer = make_optimizer(model)
    resume(model, optimizer, folder / f'{name}-two')
    train(model, optimizer, range(HALF_WAY, STEPS))
    assert difference(model.state_dict(), found[0][name]['expected']) < 1e-7
    assert (model.num_classes, model.input_size) == (CLASSES, (3, SIZE, SIZE))
