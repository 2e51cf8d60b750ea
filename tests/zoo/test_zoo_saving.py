"""One member of every family goes to a folder and back: into the model with exits, and into plain timm."""

import pytest
import timm
import torch
from helpers.families import DEPTHS, FAMILIES, make_small

import timm_multiexit as tme


@pytest.mark.zoo
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
def test_family_member_comes_back_from_a_folder(family, tmp_path):
    model = make_small(family)
    tme.save_pretrained(model, tmp_path)
    # An architecture's own keywords are for the caller to give.
    own = {'depth': DEPTHS[family]} if family in DEPTHS else {}
    name = f'local-dir:{tmp_path}'
    if own:
        with pytest.raises(tme.MultiExitError, match=r"model_args has 'depth', .* create_model\(\.\.\., depth="):
            tme.create_model(name, pretrained=True)
    loaded = tme.create_model(name, pretrained=True, **own).eval()
    plain = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(1, *model.input_size)
    with torch.no_grad():
        logits = model(x, exits=True).logits
        assert all(map(torch.equal, loaded(x, exits=True).logits, logits))
        assert torch.equal(plain(x), logits[-1])
        # Other classes: main's and the exits' classifiers are fresh, the rest is kept.
        other = tme.create_model(name, pretrained=True, num_classes=7, **own).eval()
        features = model(x, exits=True).features
        assert other(x, exits=True).logits[0].shape == (1, 7)
        assert all(map(torch.equal, other(x, exits=True).features, features))
