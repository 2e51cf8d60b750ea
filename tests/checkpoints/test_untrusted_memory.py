"""What a file says takes no memory before it is refused: tables beside the weights, sizes of images."""

import json

import pytest
import safetensors.torch
import timm
import torch
from helpers.untrusted import MIB, check_refusal, limited_memory, load

import timm_multiexit as tme


def edit(folder, **model_args):
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'] |= model_args
    config['pretrained_cfg']['input_size'] = [3, model_args['img_size'], model_args['img_size']]
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.fixture
def swin(tmp_path):
    """A folder of a swin for windows of 64 at 512 pixels, whose weights agree: a table has the fourth power of 64."""
    folder = tmp_path / 'net'
    backbone = timm.create_model('swin_tiny_patch4_window7_224', num_classes=2, img_size=56)
    tme.save_pretrained(backbone, folder)
    edit(folder, img_size=512, window_size=64)
    with torch.device('meta'):
        large = timm.create_model('swin_tiny_patch4_window7_224', num_classes=2, img_size=512, window_size=64)
    tensors = {
        key: torch.zeros(tensor.shape, dtype=torch.float16 if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in large.state_dict().items()
    }
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    del tensors
    return folder


@pytest.mark.parametrize('kwargs', [{}, {'exits': [1]}, {'pretrained': False, 'exits': [1]}], ids=str)
def test_tables_that_no_file_has_are_bounded(swin, kwargs):
    with limited_memory(limit=100 * MIB), pytest.raises(tme.MultiExitError) as caught:
        load(swin, **kwargs)
    check_refusal(caught.value)
    assert 'tables and masks far larger than its weights' in str(caught.value)


def test_usual_tables_are_within_the_bound(tmp_path):
    backbone = timm.create_model('swin_tiny_patch4_window7_224', num_classes=2, img_size=112)
    tme.save_pretrained(backbone, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    mine = tme.create_model(f'local-dir:{tmp_path}', pretrained=True, exits=[1])
    for name, buffer in loaded.named_buffers():
        assert torch.equal(dict(mine.backbone.named_buffers())[name], buffer)


def test_where_samples_can_leave_is_tried_on_images_of_the_callers_size(make_model, tmp_path, monkeypatch):
    model = make_model().eval()
    tme.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['pretrained_cfg']['input_size'] = [3, 2048, 2048]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    loaded = load(tmp_path).eval()
    assert loaded.input_size == (3, 2048, 2048)
    sizes = set()
    loaded.backbone.conv1.register_forward_pre_hook(lambda module, args: sizes.add(tuple(args[0].shape[1:])))
    x = torch.randn(3, 3, 32, 32)
    with limited_memory(limit=100 * MIB):
        answers = loaded.infer(x, threshold=0.0)
    assert sizes == {(3, 32, 32)}
    assert torch.equal(answers.logits, model(x, exit_idx=0))
    assert loaded.can_leave == model.can_leave == (True, True, True)
