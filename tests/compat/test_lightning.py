"""A LightningModule around a multi-exit model: a fit of few steps, and its checkpoint back into the model."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit.checkpoints.timm_checkpoint import build_exits
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.cli.validate import create_evaluated_model

lightning = pytest.importorskip('lightning')
pytestmark = pytest.mark.compat


class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = torch.nn.Parameter(torch.ones(()))  # a weight beside the model

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = sum(F.cross_entropy(self.scale * logits, targets) for logits in self.model(images, exits=True).logits)
        self.log('loss', loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture
def fitted(make_model, tmp_path):
    """Return the trained model and its checkpoint."""
    module = Classifier(make_model())
    before = {key: tensor.clone() for key, tensor in module.model.state_dict().items()}
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 64, 64), torch.arange(12) % 10), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator='cpu',
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == 3
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    trained = module.model.state_dict()
    assert any(not torch.equal(trained[key], tensor) for key, tensor in before.items() if key.startswith('exits.'))
    assert any(not torch.equal(trained[key], tensor) for key, tensor in before.items() if key.startswith('backbone.'))
    return module.model.eval(), tmp_path / 'last.ckpt'


def agree(first, second):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return all(map(torch.equal, first(x, exits=True).logits, second(x, exits=True).logits))


def test_checkpoint_comes_back_into_the_model(fitted, make_model, tmp_path):
    model, path = fitted
    other = make_model().eval()
    assert not agree(model, other)
    tme.load_checkpoint(other, path)
    assert agree(model, other)
    tme.save_pretrained(model, tmp_path / 'net')
    assert agree(model, tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval())


def test_exits_are_built_from_the_checkpoint(fitted):
    model, path = fitted
    built = build_exits(timm.create_model('test_resnet', num_classes=10), path).eval()
    tme.load_checkpoint(built, path)
    assert agree(model, built)


def test_validate_takes_the_checkpoint(fitted):
    model, path = fitted
    argv = ['--model', 'test_resnet', '--num-classes', '10', '--checkpoint', str(path)]
    assert agree(model, create_evaluated_model(create_validate_parser('validate.py').parse_args(argv)).eval())


def test_module_itself_is_refused(fitted, tmp_path):
    with pytest.raises(TypeError, match='must be made by timm.create_model'):
        tme.save_pretrained(Classifier(fitted[0]), tmp_path / 'net')
    assert not (tmp_path / 'net').exists()
