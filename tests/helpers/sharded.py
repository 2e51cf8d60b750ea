"""Two processes that share out a model's parameters by `fully_shard`, against one that has it whole."""

import copy

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.utils import ModelEmaV3
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import timm_multiexit as tme
from helpers import enliven

BATCH, CLASSES, SIZE, STEPS, HALF_WAY = 8, 10, 32, 5, 3
# Networks, the kind of their blocks, and of the heads: those of ViT and ConvNeXt have no batch norm.
NETWORKS = {'test_resnet': 'BasicBlock', 'test_vit': 'Block', 'test_convnext': 'ConvNeXtBlock'}


def make_model(name):
    """The same network in every process, in double precision, so that only what is wrong shows."""
    torch.manual_seed(0)
    kwargs = {'img_size': SIZE} if name == 'test_vit' else {}
    backbone = enliven(timm.create_model(name, num_classes=CLASSES, **kwargs))
    return tme.attach_exits(backbone, 2, head='linear', input_size=(3, SIZE, SIZE)).double()


def shard(model, name):
    """Call `fully_shard` with each block, each head, and the model."""
    blocks = [module for module in model.backbone.modules() if type(module).__name__ == NETWORKS[name]]
    assert len(blocks) >= 3
    for unit in (*blocks, *model.exits, model):
        fully_shard(unit)
    return model


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def draw(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def train(model, optimizer, steps, *, average=None, rank=0, world=1):
    """Train on this process's share of the batches. Batch norms keep their statistics: they would see half a batch."""
    task = tme.MultiExitTask(model, tme.create_loss('eed'), verbose=False)
    task.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in steps:
        images, target = draw(step)
        task(images[share], target[share])['loss'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(model, step=step)


def difference(first, second):
    """Return the largest difference of two state dicts, of which one may be sharded; the keys are the same."""
    assert list(first) == list(second)
    pairs = zip(
        *([getattr(value, 'full_tensor', lambda v=value: v)() for value in d.values()] for d in (first, second))
    )
    return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)


def run_process(rank, world, folder):
    """One of `world` processes: does all that is tested and writes what it found to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    torch.save({name: check_network(name, rank, world, folder) for name in NETWORKS}, folder / f'{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def check_network(name, rank, world, folder):
    whole, model = make_model(name), make_model(name)
    average, expected_average = (ModelEmaV3(m, decay=0.9, foreach=False) for m in (model, whole))
    shard(model, name)
    shard(average.module, name)
    optimizer, expected_optimizer = make_optimizer(model), make_optimizer(whole)
    found = {'types': sorted({type(param).__name__ for param in model.parameters()})}
    train(model, optimizer, range(HALF_WAY), average=average, rank=rank, world=world)
    train(whole, expected_optimizer, range(HALF_WAY), average=expected_average)
    found['start'] = copy.deepcopy(whole.state_dict())
    # Half-way, as one process is to go on, and as one process left it to go on here.
    state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=folder / f'{name}-two')
    other = shard(make_model(name), name)
    other_optimizer = make_optimizer(other)
    resume(other, other_optimizer, folder / f'{name}-one')
    train(other, other_optimizer, range(HALF_WAY, STEPS), rank=rank, world=world)
    train(model, optimizer, range(HALF_WAY, STEPS), average=average, rank=rank, world=world)
    train(whole, expected_optimizer, range(HALF_WAY, STEPS), average=expected_average)
    found['trained'] = difference(model.state_dict(), whole.state_dict())
    found['average'] = difference(average.module.state_dict(), expected_average.module.state_dict())
    found['resumed'] = difference(other.state_dict(), whole.state_dict())
    found['expected'] = whole.state_dict()
    found |= compare_answers(model.eval(), whole.eval(), rank)
    gathered = tme.gather_model(model, keeps_data=rank == 0)
    if rank == 0:
        tme.save_pretrained(gathered, folder / name)
        found['gathered'] = difference(gathered.state_dict(), whole.state_dict())
        found['type'] = type(gathered) is type(whole)
    else:
        found['is_meta'] = all(param.is_meta for param in gathered.parameters())
    return found


@torch.no_grad()
def compare_answers(model, whole, rank):
    images, _ = draw(99)
    close = [torch.allclose(model(images), whole(images), rtol=1e-5)]
    pairs = zip(model(images, exits=True).logits, whole(images, exits=True).logits, strict=True)
    close += [torch.allclose(one, other, rtol=1e-5) for one, other in pairs]
    for idx in range(-1, len(whole.exits)):
        close.append(torch.allclose(model(images, exit_idx=idx), whole(images, exit_idx=idx), rtol=1e-5))
    # The first process has three batches, the second one has one.
    batches = [draw(100 + idx) for idx in range(3 - 2 * rank)]
    tables = [tme.evaluate(evaluated, batches) for evaluated in (model, whole)]
    same = [[{**row, 'ECE': round(row['ECE'], 6)} for row in table.rows] for table in tables]
    return {
        'close': close,
        'rows': same[0] == same[1],
        'num_samples': [table.num_samples for table in tables],
        'cost': model.cost() == whole.cost() and model.feature_widths() == whole.feature_widths(),
    }


def resume(model, optimizer, folder):
    """Load what any number of processes saved."""
    state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
