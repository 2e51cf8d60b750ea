"""The logits of all classifiers on a data set."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_multiexit.calibration import logits
from timm_multiexit.calibration.logits import Fingerprinter, collect_logits
from timm_multiexit.evaluation.exit_table import evaluate_loader, evaluate_logits
from timm_multiexit.utils.errors import MultiExitError


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


def test_kept_logits_give_the_table_of_the_loader(model):
    images, target = torch.randn(11, 3, 32, 32), torch.randint(10, (11,))
    loader = DataLoader(TensorDataset(images, target), batch_size=4)
    collected = collect_logits(model, loader)
    expected = evaluate_loader(model, loader)
    assert evaluate_logits(collected.logits, collected.targets, batch_size=4) == expected.metrics
    with torch.no_grad():
        assert torch.equal(collected.logits[0][8:], model(images[8:], exits=True).logits[0])
    assert torch.equal(collected.targets, target)


def test_half_precision_is_kept_as_float32(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), batch_size=2)
    collected = collect_logits(model.bfloat16(), loader)
    assert {single.dtype for single in collected.logits} == {torch.float32}


def test_logits_are_of_eval_mode(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)))
    with pytest.raises(MultiExitError, match='model.eval'):
        collect_logits(model.train(), loader)
    with pytest.raises(MultiExitError, match='loader is empty'):
        collect_logits(model.eval(), [])


def test_fingerprint_tells_images_apart_whatever_the_batch():
    fingerprint, images = Fingerprinter(), torch.rand(7, 3, 9, 5)
    images[6] = images[2]
    images[5] = images[2].flip(-1)  # the same values in other places
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        batch = images.to(dtype)
        alone = [fingerprint(image[None]).item() for image in batch]
        strided = fingerprint(batch.contiguous(memory_format=torch.channels_last))
        assert fingerprint(batch).tolist() == strided.tolist() == alone
        assert alone[6] == alone[2]
        assert len(set(alone)) == 6


def test_fingerprint_is_the_sum_of_weighted_bits_modulo_2_to_64(monkeypatch):
    monkeypatch.setattr(logits, 'MAX_PRODUCTS', 7)  # two images at a time
    images = torch.rand(5, 1, 1, 3)
    weights = torch.randint(-(2**62), 2**62, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = [sum(w * bits for w, bits in zip(weights, row)) for row in images.view(5, 3).view(torch.int32).tolist()]
    assert [value % 2**64 for value in Fingerprinter()(images).tolist()] == [value % 2**64 for value in expected]


def test_what_is_held_is_copied_before_it_grows_too_large(model, monkeypatch):
    """Two images of the three classifiers' 10 logits take 240 bytes, their targets and fingerprints 32."""
    batches = [(torch.randn(2, 3, 32, 32), torch.arange(2)) for _ in range(5)]
    expected = collect_logits(model, batches)
    copies, copy = [], logits._Columns._copy
    monkeypatch.setattr(logits, 'MAX_HELD_BYTES', 600)
    monkeypatch.setattr(logits._Columns, '_copy', lambda self: (copies.append(self._num_bytes), copy(self)))
    found = collect_logits(model, batches)
    assert copies == [816, 544]
    for one, other in zip(found.logits, expected.logits):
        assert torch.equal(one, other)
    assert torch.equal(found.fingerprints, expected.fingerprints)
    assert torch.equal(found.targets, torch.arange(2).repeat(5))


def test_features_are_what_enters_the_linear_layers(model):
    images, targets = torch.randn(5, 3, 64, 64), torch.arange(5)
    collected = collect_logits(model, [(images[:3], targets[:3]), (images[3:], targets[3:])], features=True)
    layers = [*(head.fc for head in model.exits), model.get_classifier()]
    assert len(collected.features) == len(collected.logits) == 3
    for entering, leaving, layer in zip(collected.features, collected.logits, layers):
        torch.testing.assert_close(layer(entering), leaving)
    torch.testing.assert_close(collected.logits[-1], model(images))
    assert collected.targets.tolist() == [0, 1, 2, 3, 4]
    assert collect_logits(model, [(images, targets)]).features == ()
