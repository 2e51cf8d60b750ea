"""Scripts beside the recipes, as far as they run without the weights that they start from."""

import pytest

from hub.recipes import imagenette_lite0


def test_missing_folder_is_named_before_weights_are_fetched(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['imagenette_lite0.py'])
    monkeypatch.setattr('timm.create_model', lambda *args, **kwargs: pytest.fail('weights were fetched'))
    with pytest.raises(SystemExit) as caught:
        imagenette_lite0.main()
    assert caught.value.code == 2
    assert 'the following arguments are required: FOLDER' in capsys.readouterr().err
