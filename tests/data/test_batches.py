"""What loaders of all kinds give: read where the meaning is plain, else one line."""

import collections

import pytest
import torch
from helpers import cases
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit.data.batches import LabelCheck, read_batches
from timm_multiexit.utils.errors import DataError, InvalidTypeError, MultiExitError

torch.manual_seed(0)
X, Y = torch.randn(6, 3, 32, 32), torch.tensor([3, 0, 9, 1, 1, 7])
PAIRS = [(image, int(label)) for image, label in zip(X, Y)]


def as_is(samples):
    return samples


def in_dicts(image, label):
    return [{image: x, label: y} for x, y in PAIRS]


# Six images in batches of 4 and 2, all of the same meaning.
PLAIN = {
    'DataLoader': DataLoader(TensorDataset(X, Y), batch_size=4),
    'pairs': [(X[:4], Y[:4]), (X[4:], Y[4:])],
    'lists': [[X[:4], Y[:4]], [X[4:], Y[4:]]],
    'generator': None,
    'triples': [(X[:4], Y[:4], ['a.jpg'] * 4), (X[4:], Y[4:], ['b.jpg'] * 2)],
    'triples of DataLoader': DataLoader(TensorDataset(X, Y, torch.arange(6)), batch_size=4),
    'pixel_values, labels': DataLoader(in_dicts('pixel_values', 'labels'), batch_size=4),
    'image, label': DataLoader(in_dicts('image', 'label'), batch_size=4),
    'images, targets': DataLoader(in_dicts('images', 'targets'), batch_size=4),
    'UserDict': [
        collections.UserDict(pixel_values=X[:4], labels=Y[:4], idx=[1]),
        {'labels': Y[4:], 'pixel_values': X[4:]},
    ],
    'samples': DataLoader(PAIRS, batch_size=4, collate_fn=as_is),
    'samples as dicts': DataLoader(in_dicts('image', 'label'), batch_size=4, collate_fn=as_is),
    'lists of images': [(list(X[:4]), Y[:4].tolist()), (tuple(X[4:]), tuple(Y[4:].tolist()))],
    'arrays': [(X[:4].numpy(), Y[:4].numpy()), (X[4:].numpy(), Y[4:].numpy().astype('int16'))],
    'int32': [(X[:4], Y[:4].int()), (X[4:], Y[4:].to(torch.uint8))],
    'columns': [(X[:4], Y[:4, None]), (X[4:], Y[4:, None].int())],
    'one-hot': [(X[:4], torch.eye(10)[Y[:4]]), (X[4:], torch.eye(10, dtype=torch.int64)[Y[4:]])],
    'one-hot lists': [(list(X[:4]), torch.eye(10)[Y[:4]].tolist()), (X[4:], torch.eye(10, dtype=torch.bool)[Y[4:]])],
    'empty batch': [(X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])],
    'float64': [(X[:4].double(), Y[:4]), (X[4:].double(), Y[4:])],
}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return tme.create_model('test_resnet', num_classes=10, head='linear', input_size=(3, 32, 32)).eval()


@pytest.fixture(scope='module')
def expected(model):
    """The table, and the policy, of plain pairs."""
    pairs = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    return tme.evaluate(model, pairs).rows, model.calibrate(pairs, budget='90%'), model.budgets


@pytest.mark.parametrize('loader', cases(PLAIN))
def test_plain_meanings_give_the_numbers_of_pairs(model, expected, loader):
    def fresh():
        return ((x, y) for x, y in PLAIN['pairs']) if loader is None else loader

    images, targets = zip(*read_batches(fresh()))
    assert torch.equal(torch.cat(images).float(), X)
    assert {target.dtype for target in targets} == {torch.int64}
    assert torch.cat(targets).tolist() == Y.tolist()
    assert tme.evaluate(model, fresh()).rows == expected[0]
    assert model.calibrate(fresh(), budget='90%') == expected[1]
    assert model.budgets == expected[2]


def test_several_labels_are_handed_on_as_they_are():
    labels = (torch.rand(6, 10) < 0.3).float()
    ((images, targets),) = read_batches([{'image': X, 'label': labels}], multi_label=True)
    assert images is X
    assert targets is labels


WRONG = {
    'data set': (TensorDataset(X, Y), r'^loader must give batches, got the data set TensorDataset\. Wrap the data set'),
    'list of samples': (
        PAIRS,
        r'^Images must be a batch \[B, C, H, W\], got \[3, 32, 32\] of float32\. Wrap the data set',
    ),
    'one tensor': ([X], r'^A batch must be a pair \(images, class indices\) or a dict with both, got Tensor\.$'),
    'images alone': (DataLoader(TensorDataset(X)), r'^A batch must be a pair .* got list of 1\.$'),
    'text': (['ab'], r'^A batch must be a pair .* got str\.$'),
    'keys': (
        [{'x': X, 'y': Y}],
        r"^A batch that is a dict must have images as one of pixel_values, image, .* \['x', 'y'\]\.$",
    ),
    'no labels': ([{'image': X}], r"class indices as one of labels, label, .* got the keys \['image'\]\.$"),
    'swapped': ([(Y, X)], r'^Images must be a batch \[B, C, H, W\], got \[6\] of int64\.$'),
    'uint8': ([(X.byte(), Y)], r'^Images must be floating point, got \[6, 3, 32, 32\] of uint8\. Scale and normalize'),
    'counts': ([(X, Y[:5])], r'^A batch must have one target per image, got 6 images and targets \[5\] of int64\.$'),
    'one number': ([(X, 3)], r'^A batch must have one target per image, got 6 images and targets \[\] of int64\.$'),
    'float targets': ([(X, Y.float())], r'^Targets must be class indices \[B\], integers, got \[6\] of float32\.$'),
    'names': (
        [(X, list('abcdef'))],
        r'^Targets of a batch must be a tensor, an array or a list of numbers, got a list of',
    ),
    'None': ([(X, None)], r'^Targets of a batch must be a tensor, .* got NoneType\.$'),
    'soft': (
        [(X, torch.full((6, 10), 0.1))],
        r'^Targets \[6, 10\] of float32 must be one-hot rows .* without mixup\.$',
    ),
    'two labels': (
        [(X, torch.ones(6, 10).long())],
        r'must be one-hot rows or class indices \[B\], got rows of several',
    ),
    'maps': ([(X, torch.zeros(6, 4, 4).long())], r'^Targets must be class indices \[B\], integers, got \[6, 4, 4\]'),
    'sizes of a batch': ([([X[0], X[1, :, :9]], [0, 1])], r'one size, got \[\[3, 9, 32\], \[3, 32, 32\]\]\.$'),
    'sizes of samples': ([[PAIRS[0], (X[1, :, :9], 1)]], r'^A list of single samples cannot be made a batch: '),
    'too large': (
        [(X, Y + 1)],
        r'^Class indices must be in \[0, 9\] for 10 classes, got 10\. Check the number of classes',
    ),
    'negative': ([(X, Y - 1)], r'^Class indices must be in \[0, 9\] for 10 classes, got -1\.'),
    'one-hot of 12': ([(X, torch.eye(12)[Y + 2])], r'^Class indices must be in \[0, 9\] for 10 classes, got 11\.'),
    'empty': ([], r'^The data loader is empty, so there is nothing to evaluate\.$'),
    'empty batches': ([(X[:0], Y[:0])], r'^The data loader is empty, so there is nothing to evaluate\.$'),
}


@pytest.mark.parametrize(
    'call',
    [lambda model, loader: tme.evaluate(model, loader), lambda model, loader: model.calibrate(loader, budget='90%')],
    ids=['evaluate', 'calibrate'],
)
@pytest.mark.parametrize(('loader', 'message'), cases(WRONG))
def test_other_batches_are_one_line(model, loader, message, call):
    before = model.policy, model.budgets
    with pytest.raises(DataError, match=message) as error:
        call(model, loader)
    assert '\n' not in str(error.value)
    assert (model.policy, model.budgets) == before


@pytest.mark.parametrize('loader', [None, 3, 'images/', {'image': X, 'label': Y}], ids=['None', '3', 'path', 'dict'])
def test_what_is_not_a_loader_is_one_line(model, loader):
    with pytest.raises(InvalidTypeError, match='^loader must give batches of images and class indices, got '):
        tme.evaluate(model, loader)


def test_sizes_may_change_between_batches_where_only_accuracy_is_measured(model):
    loader = [(X, Y), (X[..., :24, :24], Y)]
    table = tme.evaluate(model, loader)
    assert table.num_samples == 12
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    assert table.rows[-2]['top-1'] == pytest.approx(100 * right / 12)
    assert table.rows[-2]['GMACs fixed'] == model.cost((3, 32, 32))[-1].fixed.macs / 1e9
    message = r'^All images must have one size, as costs depend on it, got \[3, 32, 32\] and \[3, 24, 24\]\.$'
    with pytest.raises(DataError, match=message):
        model.calibrate(loader, budget='90%')


def test_images_of_other_channels_are_one_line(model):
    for call in (tme.evaluate, lambda model, loader: model.calibrate(loader, budget='90%')):
        with pytest.raises(MultiExitError, match=r'tensor \[B, 3, H, W\], got \[6, 1, 32, 32\]\.$'):
            call(model, [(X[:, :1], Y)])


def test_mode_of_the_model_stays_where_a_batch_is_refused(model):
    model.train()
    with pytest.raises(DataError):
        tme.evaluate(model, [(X, Y), (X, Y + 9)])
    assert model.training
    model.eval()


def test_labels_on_a_device_are_read_at_the_end_alone():
    """Meta tensors hold no data, so reading one would raise."""
    check = LabelCheck()
    found = check.add(torch.tensor([3, 12], device='meta'), 10)
    assert (found.shape, found.device.type) == ((2,), 'meta')
    check = LabelCheck()
    assert check.add(torch.tensor([3, 9]), 10).tolist() == [3, 9]
    check.finish()
    check._bounds = [torch.tensor([0, 4]), torch.tensor([-2, 4])]  # as of a device
    with pytest.raises(DataError, match=r'^Class indices must be in \[0, 9\] for 10 classes, got -2\.'):
        check.finish()
    check.finish()
