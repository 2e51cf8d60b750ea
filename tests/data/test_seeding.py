"""Batches follow from seed, epoch and place alone: wherever an epoch is begun, however many processes load."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from torch.utils.data import DistributedSampler, default_collate

from timm_multiexit.data.seeding import (
    Place,
    PlaceSampler,
    SeededCollate,
    SeededDataset,
    SeededLoader,
    Stream,
    seed_generators,
)

NUM_IMAGES = 26


class Pictures(torch.utils.data.Dataset):
    """Small images of noise; the target is the index."""

    def __init__(self):
        noise = np.random.RandomState(0).randint(0, 256, (NUM_IMAGES, 12, 12, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in noise]
        self.transform = None

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), index

    def __len__(self):
        return NUM_IMAGES


def make_mixer(**kwargs):
    return FastCollateMixup(mixup_alpha=0.5, cutmix_alpha=1.0, num_classes=NUM_IMAGES, **kwargs)


def make_loader(seed=3, workers=0, collate_fn=fast_collate, dataset=None, mixup_off_epoch=0, **kwargs):
    """Return a loader of batches of four with random crops, flips, colours and erasing."""
    dataset = SeededDataset(dataset or Pictures(), seed)
    kwargs = {'use_prefetcher': True, 're_prob': 0.5, 're_mode': 'pixel', **kwargs}
    loader = create_loader(
        dataset,
        input_size=(3, 8, 8),
        batch_size=4,
        is_training=True,
        device=torch.device('cpu'),
        num_workers=workers,
        collate_fn=SeededCollate(collate_fn, seed, mixup_off_epoch),
        **kwargs,
    )
    return SeededLoader(loader, seed=seed)


def disturb():
    """Draw from every global generator, as steps and evaluation between batches do."""
    torch.rand(3), random.random(), np.random.rand()


def read(loader, epoch, first_batch=0):
    batches = []
    for images, target in loader.epoch(epoch, first_batch):
        batches.append((images.clone(), target.clone()))
        disturb()
    return batches


def are_equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(tensor, again) for batch, repeat in zip(one, other) for tensor, again in zip(batch, repeat)
    )


LOADERS = {
    'plain': make_loader,
    'workers': partial(make_loader, workers=2),
    'host': partial(make_loader, use_prefetcher=False, collate_fn=default_collate),
    'mixing': partial(make_loader, collate_fn=make_mixer()),
    'mixing-workers': partial(make_loader, collate_fn=make_mixer(mode='elem'), workers=2),
    'sizes': partial(make_loader, input_size_choices=[8, 12], batch_size_choices=[4, 2], batch_choice_seed=1),
    'multi-epochs': partial(make_loader, use_multi_epochs_loader=True),
    'multi-epochs-workers': partial(make_loader, use_multi_epochs_loader=True, workers=2),
}


@pytest.mark.parametrize('name', LOADERS)
def test_epoch_begun_in_the_middle_is_the_rest_of_the_whole(name):
    whole = LOADERS[name]()
    epochs = [read(whole, epoch) for epoch in range(3)]
    assert not are_equal(epochs[0], epochs[1])
    for first in (0, 1, 4):
        # A fresh loader, as after a kill; then the next epoch is whole again.
        resumed = LOADERS[name]()
        assert are_equal(read(resumed, 1, first), epochs[1][first:])
        assert are_equal(read(resumed, 2), epochs[2])


def test_augmentation_splits_begun_in_the_middle():
    def make():
        return make_loader(dataset=AugMixDataset(Pictures(), num_splits=2), num_aug_splits=2)

    assert are_equal(read(make(), 1, 2), read(make(), 1)[2:])


@pytest.mark.parametrize('mixing', [False, True])
def test_number_of_workers_changes_nothing(mixing):
    collate_fn = make_mixer() if mixing else fast_collate
    batches = [read(make_loader(workers=workers, collate_fn=collate_fn), 1) for workers in (0, 1, 2)]
    assert are_equal(batches[0], batches[1])
    assert are_equal(batches[0], batches[2])


def test_seed_changes_order_and_augmentation():
    one, other = make_loader(seed=3), make_loader(seed=4)
    assert not torch.equal(read(one, 0)[0][1], read(other, 0)[0][1])


def test_same_sample_is_augmented_anew_every_epoch():
    loader = make_loader(re_prob=0.0)
    crops = [
        {int(label): image for images, target in read(loader, epoch) for image, label in zip(images, target)}
        for epoch in range(2)
    ]
    common = crops[0].keys() & crops[1].keys()
    assert len(common) >= 20  # each epoch drops the two images of the last, incomplete batch
    assert sum(torch.equal(crops[0][label], crops[1][label]) for label in common) <= 2


def test_mixing_ends_at_its_epoch_in_persistent_workers():
    loader = make_loader(collate_fn=make_mixer(label_smoothing=0.0), workers=2, mixup_off_epoch=2)
    for epoch, mixes in enumerate((True, True, False, False)):
        peaks = torch.cat([target.max(-1).values for _, target in read(loader, epoch)])
        assert bool((peaks < 1).any()) is mixes


def test_two_ranks_see_together_what_one_with_twice_the_batch_sees():
    dataset = range(27)  # odd: one sample is padding
    one = list(PlaceSampler(dataset, seed=5))
    ranks = [list(PlaceSampler(dataset, seed=5, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(places) for places in ranks] == [14, 14]
    for batch in range(6):
        together = {place for places in ranks for place in places[2 * batch : 2 * batch + 2]}
        assert together == set(one[4 * batch : 4 * batch + 4])


def test_order_is_that_of_torch():
    sampler = PlaceSampler(range(10), seed=5)
    sampler.set_epoch(3)
    order = DistributedSampler(range(10), 1, 0, seed=5)
    order.set_epoch(3)
    assert list(sampler) == [Place(3, position, index) for position, index in enumerate(order)]


def test_repeated_augmentation_gives_each_repeat_its_own_place():
    own = RepeatAugSampler(range(300), num_replicas=2, rank=1, num_repeats=3)
    places = list(PlaceSampler(range(300), seed=0, num_replicas=2, rank=1, sampler=own))
    assert [place.sample for place in places] == list(own)
    assert len({place.position for place in places}) == len(places) > len({place.sample for place in places})


def test_streams_do_not_share_numbers():
    drawn = set()
    for stream in Stream:
        for place in ((0, 0), (0, 1), (1, 0)):
            seed_generators(0, stream, *place)
            drawn.add((random.random(), np.random.rand(), float(torch.rand(1))))
    assert len({row[0] for row in drawn}) == len({row[1] for row in drawn}) == len({row[2] for row in drawn}) == 12
