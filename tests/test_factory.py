import pytest
import timm
import torch

import timm_multiexit as tme


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('resnet51', {}, "no model 'resnet51', nearest are .*resnet50"),
        ('qqqqqq', {}, r'timm.list_models\(\) lists'),
        ('org/net', {}, 'looks like a Hugging Face Hub repo id'),
        ('s3:net', {}, "Unknown model source 's3'"),
        ('hf-hub:org/net', {}, "has no model repository 'org/net'"),
        ('local-dir:/nowhere', {}, 'is not a model folder'),
        ('test_resnet', {'features_only': True}, 'features_only has no classifier'),
        ('test_resnet', {'exits': [9]}, r'no exit 9. Its stages are 0 \(act1, 1/2\)'),
        ('test_resnet', {'head': 'mlp'}, "head must be one of conv, paper, bottleneck, linear, got 'mlp'"),
    ],
    ids=['near', 'far', 'path', 'source', 'hub', 'folder', 'features', 'exit', 'head'],
)
def test_wrong_request_is_one_clear_line(name, kwargs, message):
    with pytest.raises(tme.MultiExitError, match=message) as error:
        tme.create_model(name, **kwargs)
    assert '\n' not in str(error.value)


def test_keywords_reach_timm():
    model = tme.create_model('test_resnet', num_classes=7, in_chans=1, drop_rate=0.3, global_pool='max')
    assert model.backbone.drop_rate == 0.3
    assert [head.drop.p for head in model.exits] == [0.3] * 3
    assert model.backbone.global_pool.pool_type == 'max'
    assert model(torch.randn(2, 1, 32, 32), exits=True).logits[0].shape == (2, 7)


def test_names_of_classes_stay_with_their_classifier(tmp_path):
    names = [f'class {idx}' for idx in range(10)]
    tme.save_pretrained(tme.create_model('test_resnet', exits=2, num_classes=10), tmp_path, label_names=names)
    for num_classes, expected in ((None, names), (10, names), (3, None)):
        kwargs = {} if num_classes is None else {'num_classes': num_classes}
        for exits in (None, 1):
            model = tme.create_model(f'local-dir:{tmp_path}', pretrained=True, exits=exits, **kwargs)
            assert model.pretrained_cfg.get('label_names') == expected


def test_input_size_brings_its_channels():
    model = tme.create_model('test_resnet', input_size=(1, 32, 32)).eval()
    assert model.input_size == (1, 32, 32)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1000)


def test_trained_backbone_with_fresh_exits_is_warned_of_once(tmp_path, caplog):
    tme.save_pretrained(timm.create_model('test_resnet', num_classes=5), tmp_path)
    tme.create_model(f'local-dir:{tmp_path}', pretrained=True)
    warnings = [record.message for record in caplog.records if 'not its exits' in record.message]
    assert len(warnings) == 1


def test_models_are_made_inside_inference_mode():
    with torch.inference_mode():
        model = tme.create_model('test_resnet', num_classes=5)
        assert model.eval()(torch.randn(1, 3, 32, 32), exit_idx=0).shape == (1, 5)
        assert model.cost()[-1].fixed.macs > 0


def test_missing_folder_is_a_file_not_found_error():
    with pytest.raises(FileNotFoundError, match=r'^gone is not a model folder: it does not exist\.$'):
        tme.create_model('local-dir:gone')
