"""Exports of small networks, pages made of them, and a browser that reports what a page must not do."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import enliven
from PIL import Image

import timm_multiexit as tme
from hub.space.make import make_page
from hub.space.shoot import open_browser, serve
from timm_multiexit.data.digits import DigitsReader

LONG_NAMES = ['English springer', 'cassette_player', 'a ' * 30 + 'long name', 'Rindfleischetikettierungsgesetz' * 2]


PREPARATION = {'interpolation': 'bicubic', 'crop_pct': 1.0}
PREPARATION |= {'mean': timm.data.IMAGENET_DEFAULT_MEAN, 'std': timm.data.IMAGENET_DEFAULT_STD}


def read_digits(split):
    """Return the digits [N, 3, 32, 32] as `train.py` prepares them, and their classes [N]."""
    reader, transform = DigitsReader(split), timm.data.create_transform(32, **PREPARATION)
    images, targets = zip(*(reader[idx] for idx in range(len(reader))))
    return torch.stack([transform(Image.open(image).convert('RGB')) for image in images]), torch.tensor(targets)


def train_digits(num_epochs=5, batch_size=62):
    """Return a network with exits that knows the digits."""
    cfg = {'input_size': (3, 32, 32), **PREPARATION}
    model = tme.create_model('test_resnet', num_classes=10, pretrained_cfg_overlay=cfg)
    images, targets = read_digits('train')
    criterion, optimizer = tme.create_loss('eed'), torch.optim.AdamW(model.parameters(), lr=5e-3)
    num_steps = len(images) // batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=num_epochs * num_steps)
    for _ in range(num_epochs):
        order = torch.randperm(len(images))
        for chosen in order[: num_steps * batch_size].split(batch_size):
            loss = criterion(model(images[chosen], exits=True), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@pytest.fixture(scope='session')
def digits_model():
    torch.manual_seed(0)
    model = train_digits()
    images, targets = read_digits('validation')
    blurred = images + torch.randn(images.shape)  # so that there is something to choose between
    held_out = torch.utils.data.TensorDataset(blurred, targets)
    model.calibrate(torch.utils.data.DataLoader(held_out, batch_size=60), budget='95%')
    assert len(model.budgets.points) >= 2
    return model


@pytest.fixture(scope='session')
def photo_model():
    torch.manual_seed(1)
    cfg = {'input_size': (3, 64, 64), 'crop_pct': 0.875, 'interpolation': 'bicubic'}
    return enliven(tme.create_model('test_vit', num_classes=4, img_size=64, pretrained_cfg_overlay=cfg)).eval()


@pytest.fixture(scope='session')
def exports(digits_model, photo_model, tmp_path_factory):
    """Folders that `tme.export` wrote: `digits` has budgets, `photos` a policy of its own and long names."""
    folder = tmp_path_factory.mktemp('exports')
    tme.export(digits_model, folder / 'digits', forms=['stages'], class_names=[str(digit) for digit in range(10)])
    thresholds = (0.8,) * len(photo_model.exits)
    policy = tme.ExitPolicy('entropy', (None, *thresholds[1:]), (1.3, *thresholds), combine='geometric')
    tme.export(photo_model, folder / 'photos', forms=['stages'], class_names=LONG_NAMES, policy=policy)
    return SimpleNamespace(digits=folder / 'digits', photos=folder / 'photos')


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """Four pictures of two classes of `exports.photos`, of several shapes, one with what a camera adds."""
    folder, generator = tmp_path_factory.mktemp('pictures'), torch.Generator().manual_seed(2)
    for idx, (size, name) in enumerate(
        {(90, 64): 'a.png', (64, 140): 'b.png', (120, 120): 'c.jpg', (700, 500): 'd.jpg'}.items()
    ):
        path = folder / LONG_NAMES[idx % 2] / name
        path.parent.mkdir(exist_ok=True)
        coarse = torch.randint(256, (5, 7, 3), generator=generator, dtype=torch.uint8)
        exif = Image.Exif()
        exif[0x010F] = 'Maker of cameras'
        Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return folder


@pytest.fixture(scope='session')
def pages(exports, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pages')
    make_page(exports.digits, folder / 'digits', title='A network on digits')
    make_page(exports.photos, folder / 'photos', examples=pictures)
    return SimpleNamespace(digits=folder / 'digits', photos=folder / 'photos')


@pytest.fixture(scope='session')
def addresses():
    """Return a function that serves a folder on this machine and returns its address."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(serve(folder))


@pytest.fixture(scope='session')
def browser():
    with open_browser() as started:
        yield started


@pytest.fixture
def open_page(browser, addresses):
    """Return a function that opens a page; at the end it has said nothing and has asked no other host for anything."""
    seen = SimpleNamespace(messages=[], requests=[], addresses=set())

    def start(folder, *, is_loaded=True, **options):
        address = addresses(folder)
        seen.addresses.add(address)
        page = browser.new_context(**{'viewport': {'width': 1200, 'height': 900}, **options}).new_page()
        page.on('console', lambda message: seen.messages.append(message.text))
        page.on('pageerror', lambda error: seen.messages.append(str(error)))
        page.on('requestfailed', lambda request: seen.messages.append(f'failed: {request.url}'))
        page.context.on('request', lambda request: seen.requests.append(request.url))
        page.goto(address)
        if is_loaded:
            page.wait_for_selector('body[data-loaded=yes]')
        return page

    yield start
    for context in browser.contexts:
        context.close()
    assert seen.messages == []
    assert len(seen.requests) >= 10
    own = tuple(f'{scheme}{address}/' for address in seen.addresses for scheme in ('', 'blob:'))
    assert [url for url in seen.requests if not url.startswith((*own, 'data:'))] == []
