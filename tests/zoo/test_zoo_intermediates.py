"""What exits read is what timm's `forward_intermediates` gives, at every stage of every family. Marker `zoo`."""

import pytest
import torch
import torch.nn.functional as F
from helpers.families import FAMILIES, make_small

from timm_multiexit.exits.layouts import to_map
from timm_multiexit.factory import exit_points
from timm_multiexit.models.attach import attach_exits

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings('ignore')]

# Stages, by their index in `feature_info`, at which timm gives something else, and what.
OTHERS = {
    'CoaT': (1, 2, 3),  # what the parallel blocks make of them, the last thing that it computes
    'HighResolutionNet': (1, 2, 3, 4),  # the branches of the last stage, widened by the classifier's own modules
    'XceptionAligned': (0, 1, 2, 3),  # maps inside a block, in front of its stride
}


def in_order_of_the_image(backbone, tapped, index):
    """Return Hiera's tokens as a map: they run through the network sorted by mask units."""
    tokens = tapped.flatten(2).transpose(1, 2)
    return backbone.reroll(tokens, backbone.stage_ends[index]).permute(0, 3, 1, 2)


# What makes timm's tensor of that which exits read, where they differ.
CONVERSIONS = {
    'Hiera': in_order_of_the_image,
    # timm takes the activation that the next block begins with.
    'Xception': lambda backbone, tapped, index: F.relu(tapped) if index in (1, 2, 3) else tapped,
}


@pytest.mark.parametrize('family', FAMILIES)
def test_tapped_tensors_are_the_intermediates_of_timm(family):
    small = make_small(family)
    backbone, size = small.backbone, small.input_size
    points = {(point.module, point.output): point.index for point in exit_points(backbone, input_size=size)}
    indices = sorted(points.values())
    assert len(indices) >= 3
    model = attach_exits(backbone, indices, head='linear', input_size=size).eval()
    images = torch.randn(2, *size)
    with torch.no_grad():
        _, tensors, _ = model._taps.collect(backbone, images)
        maps = backbone.forward_intermediates(images, indices=indices, intermediates_only=True)
        theirs = dict(zip(indices, maps, strict=True))
        different = []
        for spec, tensor in zip(model.exits.specs, tensors, strict=True):
            index = points[spec.module, spec.output]
            tapped = to_map(tensor, spec, size[1:])
            if family in CONVERSIONS:
                tapped = CONVERSIONS[family](backbone, tapped, index)
            if tapped.shape != theirs[index].shape or not torch.equal(tapped, theirs[index]):
                different.append(index)
    assert tuple(sorted(different)) == OTHERS.get(family, ())
