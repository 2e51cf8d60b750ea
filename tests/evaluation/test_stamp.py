"""What results are of."""

import pytest

from timm_multiexit.evaluation.stamp import name_dataset


@pytest.mark.parametrize(
    ('dataset', 'data_dir', 'name'),
    [
        ('digits', None, 'digits'),
        ('torch/cifar10', 'data', 'cifar10'),
        ('hfds/uoft-cs/cifar10', None, 'uoft-cs/cifar10'),
        ('TFDS/imagenet2012:5.0.0', 'data', 'imagenet2012:5.0.0'),
        ('hfds//home/me/private/birds', None, 'birds'),
        ('torch/image_folder', '/home/me/birds', 'birds'),
        ('', '/home/me/birds/', 'birds'),
        ('', 'birds/new/..', 'birds'),
    ],
)
def test_data_are_named_without_folders_of_the_machine(dataset, data_dir, name):
    assert name_dataset(dataset, data_dir) == name


def test_data_here_are_named_by_their_folder(tmp_path, monkeypatch):
    (tmp_path / 'birds').mkdir()
    monkeypatch.chdir(tmp_path / 'birds')
    assert name_dataset('', '.') == 'birds'
