"""The demo page in a browser: what it computes is what timm_multiexit computes, and all can use it."""

import base64
import io
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from hub.space.shoot import DIGITS, draw
from timm_multiexit.deploy.runner import Runner
from timm_multiexit.exits.cost import add_heads
from timm_multiexit.policies.leaving import apply_policy, walk
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA, ExitPolicy

pytestmark = pytest.mark.page

SEVEN = DIGITS[7]
ZERO = [[(160 + 62 * math.sin(angle / 10), 160 - 110 * math.cos(angle / 10)) for angle in range(64)]]

FOLLOW = """async (cases) => {
  const {follow} = await import('/policy.js');
  return cases.map(({policy, logits}) => {
    const {steps, exit} = follow(policy, logits.map((row) => Float32Array.from(row)));
    return {exit, answer: Array.from(steps[exit].answer), scores: steps.map(({score}) => score)};
  });
}"""
PREPROCESS = """async (cases) => {
  const {decode, preprocess} = await import('/picture.js');
  return Promise.all(cases.map(async ({png, options}) => {
    const bitmap = await decode(new Blob([Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0))]));
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext('2d');
    context.drawImage(bitmap, 0, 0);
    const {tensor} = preprocess(context.getImageData(0, 0, canvas.width, canvas.height), options);
    return Array.from(tensor);
  }));
}"""
RUN = """async (images) => {
  const {Engine} = await import('/engine.js'), manifest = await (await fetch('/model/manifest.json')).json();
  const engine = new Engine(), found = [];
  const times = await engine.load(manifest, 'fp32');
  for (const image of images) {
    const journey = await engine.begin({tensor: Float32Array.from(image)});
    while (journey.logits.length < manifest.exits.length) await journey.advance();
    found.push(journey.logits.map((logits) => Array.from(logits)));
  }
  engine.worker.terminate();
  return {found, times};
}"""


def settle(page):
    """Wait for the answer and return what the page says."""
    page.wait_for_selector('body[data-state=done]')
    rows = page.locator('#exits > li')
    return {
        'name': page.inner_text('#name'),
        'states': [row.get_attribute('data-state') for row in rows.all()],
        'bars': [[text.split('\n') for text in row.locator('.bars li').all_inner_texts()] for row in rows.all()],
        'times': [row.locator('.ms').inner_text() for row in rows.all()],
        'work': page.inner_text('#fact-work'),
    }


def set_slider(page, value):
    page.locator('#slider').evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
    )


def run_stages(folder, images):
    """Return ONNX Runtime's logits of all classifiers for images [N, C, H, W], as tensors."""
    return [torch.from_numpy(logits) for _, logits in Runner(folder).anytime(images.numpy())]


def test_policy_answers_as_apply_policy_does(open_page, pages):
    rng, generator, cases, wanted = random.Random(0), torch.Generator().manual_seed(0), [], []
    for criterion, combine, repeat in itertools.product(CRITERIA, (None, *COMBINATIONS), range(45)):
        num_exits, num_classes = rng.randint(1, 5), rng.choice([2, 3, 10])
        scale = rng.choice([0.3, 3.0, 40.0])  # 40: probabilities round to 1
        logits = [scale * torch.randn(1, num_classes, generator=generator) for _ in range(num_exits + 1)]
        limits = [0.0, 1.0, rng.random(), rng.random()] if criterion != 'patience' else [1, 1, 2, 3]
        thresholds = [None if rng.random() < 0.25 else rng.choice(limits) for _ in range(num_exits)]
        temperatures = [rng.uniform(0.5, 3) for _ in range(num_exits + 1)] if repeat % 2 else ()
        policy = ExitPolicy(criterion, thresholds, temperatures, combine)
        cases.append({'policy': policy.to_dict(), 'logits': [each[0].tolist() for each in logits]})
        scores = [score for _, _, score in walk(policy, logits) if score is not None]
        wanted.append((apply_policy(policy, logits), scores))
    found = open_page(pages.digits).evaluate(FOLLOW, cases)
    assert len(found) == 540
    assert len({each['exit'] for each in found}) == 6
    for each, (prediction, scores) in zip(found, wanted):
        assert each['exit'] == prediction.exit_idx.item()
        torch.testing.assert_close(torch.tensor(each['answer']), prediction.logits[0], atol=2e-5, rtol=2e-6)
        own = torch.tensor([score for score in each['scores'][:-1] if score is not None], dtype=torch.float32)
        torch.testing.assert_close(own, torch.cat(scores).float() if scores else torch.empty(0), atol=2e-6, rtol=0)


def test_picture_is_prepared_as_timm_does(open_page, pages):
    generator, cases, wanted = torch.Generator().manual_seed(0), [], []
    filters = ('nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos')
    shapes = ((90, 64), (31, 57), (200, 133), (40, 40))
    sizes = (((3, 32, 32), 0.875), ((3, 48, 40), 0.9), ((1, 28, 28), 1.0), ((3, 33, 33), 0.95))
    rows = itertools.product(filters, ('center', 'border', 'squash'), zip(shapes, sizes))
    for interpolation, crop_mode, ((width, height), (size, crop_pct)) in rows:
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        picture, content, count = Image.fromarray(pixels.numpy()), io.BytesIO(), size[0]
        picture.save(content, 'png')
        options = {'interpolation': interpolation, 'crop_pct': crop_pct, 'crop_mode': crop_mode}
        options |= {'input_size': size, 'mean': (0.485, 0.456, 0.406)[:count], 'std': (0.229, 0.224, 0.225)[:count]}
        cases.append({'png': base64.b64encode(content.getvalue()).decode(), 'options': options})
        wanted.append(timm.data.create_transform(**options)(picture.convert('RGB' if count == 3 else 'L')))
    found = open_page(pages.digits).evaluate(PREPROCESS, cases)
    assert len(found) == 72
    for case, values, image in zip(cases, found, wanted):
        error = (torch.tensor(values) - image.flatten()).abs().max()
        assert error < 1e-6, case['options']


@pytest.mark.parametrize('name', ['digits', 'photos'])
def test_logits_equal_those_of_onnx_runtime(name, open_page, pages, exports):
    folder, generator = getattr(exports, name), torch.Generator().manual_seed(0)
    size = json.loads((folder / 'manifest.json').read_text())['preprocessing']['input_size']
    images = torch.randn(3, *size, generator=generator)
    answer = open_page(getattr(pages, name)).evaluate(RUN, [image.flatten().tolist() for image in images])
    wanted = run_stages(folder, images)
    assert len(wanted) == len(answer['times']) >= 3
    found = torch.tensor(answer['found'])  # [N, exits, C]
    assert (found - torch.stack(wanted, 1)).abs().max() < 1e-4
    assert all(0 <= ms < 1000 for ms in answer['times'])


def test_costs_are_those_of_the_model(open_page, pages, digits_model, exports):
    manifest = json.loads((exports.digits / 'manifest.json').read_text())
    used = [chosen for count in range(4) for chosen in itertools.combinations(range(3), count)]
    found = open_page(pages.digits).evaluate(
        """async ([exits, policies]) => {
          const {leavingCosts} = await import('/policy.js');
          return policies.map((thresholds) => leavingCosts(exits, {thresholds}));
        }""",
        [manifest['exits'], [[0.5 if idx in chosen else None for idx in range(3)] for chosen in used]],
    )
    costs = digits_model.cost()
    heads = [cost.head.macs for cost in costs]
    paths = [cost.fixed.macs - cost.head.macs for cost in costs]
    assert len(found) == len(used) == 8
    for chosen, row in zip(used, found):
        wanted = add_heads(paths, heads[:-1], chosen)
        assert {idx: row[idx] for idx in (*chosen, 3)} == {idx: wanted[idx] for idx in (*chosen, 3)}


def test_drawn_digit_is_recognized(open_page, pages):
    page = open_page(pages.digits)
    assert page.inner_text('#where') == 'draw a digit, or choose a picture'
    for digit, points in (('7', SEVEN), ('0', ZERO)):
        page.click('#clear')
        draw(page, points)
        found = settle(page)
        assert found['name'] == digit
        assert found['bars'][found['states'].index('left')][0][0] == digit
    page.click('#clear')
    assert page.inner_text('#name') == '?'


def test_slider_moves_the_budget_and_nothing_is_computed_twice(open_page, pages, exports):
    page, budgets = open_page(pages.digits), json.loads((exports.digits / 'manifest.json').read_text())['budgets']
    assert int(page.get_attribute('#slider', 'max')) == len(budgets) - 1 >= 1
    set_slider(page, 0)
    cheapest = page.inner_text('#slider-value')
    assert cheapest.endswith('of the work')
    set_slider(page, len(budgets) - 1)
    assert page.inner_text('#slider-value') != cheapest
    draw(page, SEVEN)
    settle(page)
    page.check('[name=rule][value=threshold]')
    set_slider(page, 0)
    first = settle(page)
    assert first['states'] == ['left', *['off'] * 3]
    set_slider(page, 1)
    last = settle(page)
    assert last['states'].index('left') > 0
    assert last['times'][0] == first['times'][0] != ''
    set_slider(page, 0)
    assert settle(page)['states'][0] == 'left'
    page.click('.switch')
    behind = settle(page)
    assert behind['states'] == ['left', *['behind'] * 3]
    assert all(behind['times'])
    assert page.inner_text('#fact-work') == first['work']


@pytest.mark.parametrize('way', ['pick', 'drop'])
def test_photo_is_answered_as_by_the_exported_model(way, open_page, pages, exports, photo_model, tmp_path):
    pixels = torch.randint(256, (9, 12, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy()).resize((300, 220), Image.Resampling.BICUBIC)
    picture.save(tmp_path / 'photo.png')
    page = open_page(pages.photos)
    settle(page)  # of the first example
    if way == 'pick':
        with page.expect_file_chooser() as chooser:
            page.click('#choose')
        chooser.value.set_files(tmp_path / 'photo.png')
    else:
        content = list((tmp_path / 'photo.png').read_bytes())
        page.evaluate(
            """(content) => {
              const files = new DataTransfer();
              files.items.add(new File([new Uint8Array(content)], 'photo.png', {type: 'image/png'}));
              document.querySelector('#stage').dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true}));
            }""",
            content,
        )
    page.wait_for_selector('#shown[alt="Your picture"]')
    found = settle(page)
    image = timm.data.create_transform(**timm.data.resolve_data_config(model=photo_model))(picture)
    manifest = json.loads((exports.photos / 'manifest.json').read_text())
    policy, classes = ExitPolicy.from_dict(manifest['policy']), manifest['classes']
    logits = run_stages(exports.photos, image[None])
    answer = apply_policy(policy, logits)
    left = answer.exit_idx.item()
    assert found['states'][left] == 'left'
    assert found['states'][0] == 'skipped'
    assert set(found['states'][left + 1 :]) <= {'off'}
    for idx, values, _ in walk(policy, logits):
        if idx > left:
            continue
        shares, order = values[0].softmax(-1), values[0].argsort(descending=True)[:3]
        own = [name for name, _ in found['bars'][idx]]
        assert own == [show_name(classes[each]) for each in order]
        for each, (_, text) in zip(order, found['bars'][idx]):
            assert abs(float(text.strip('<>\xa0%')) - 100 * shares[each].item()) <= 0.06
    assert found['name'] == show_name(classes[answer.logits.argmax().item()])


def show_name(name):
    return ' '.join(name.split(',')[0].replace('_', ' ').split())


def test_example_is_judged(open_page, pages):
    page = open_page(pages.photos)
    assert page.locator('#examples button').count() == 4
    for idx in range(4):
        page.locator('#examples button').nth(idx).click()
        settle(page)
        assert page.locator('#examples [aria-pressed=true]').count() == 1
        truth, name = page.locator('#examples img').nth(idx).get_attribute('alt'), page.inner_text('#name')
        assert page.inner_text('#verdict') == ('correct' if truth == name else f'it is {truth}')


def test_all_can_be_done_by_keyboard(open_page, pages):
    page, reached = open_page(pages.digits), []
    for _ in range(20):
        page.keyboard.press('Tab')
        reached.append(page.evaluate('document.activeElement.id || document.activeElement.name'))
        if reached[-1] == 'pad':
            # A one: up, pen down, a line down, pen up.
            for key, times in (('ArrowUp', 9), (' ', 1), ('ArrowDown', 18), (' ', 1)):
                for _ in range(times):
                    page.keyboard.press(key)
            assert settle(page)['name'] == '1'
        if reached[-1] == 'rule':
            page.keyboard.press('ArrowRight')
            assert page.inner_text('#slider-label') == 'Confidence to leave with'
        if reached[-1] == 'slider':
            page.keyboard.press('Home')
            assert page.get_attribute('#slider', 'aria-valuetext') == '0 %'
            page.keyboard.press('ArrowRight')
            assert page.get_attribute('#slider', 'aria-valuetext') == '1 %'
            assert settle(page)['states'][0] == 'left'
        if reached[-1] == 'past':
            page.keyboard.press(' ')
            assert set(settle(page)['states'][1:]) == {'behind'}
            break
    assert reached == ['theme', 'mode', 'pad', 'choose', 'undo', 'clear', 'rule', 'slider', 'past']
    page.focus('#pad')
    page.keyboard.press('Backspace')
    assert page.inner_text('#name') == '?'
    page.focus('#theme')
    before = page.evaluate('getComputedStyle(document.body).backgroundColor')
    page.keyboard.press('Enter')
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') != before


def test_controls_have_names_and_answers_are_announced(open_page, pages):
    page = open_page(pages.photos)
    settle(page)
    page.wait_for_selector('#status:not(:empty)', state='attached')
    assert "of the network's work" in page.text_content('#status')
    page.check('[name=rule][value=threshold]')
    tree = page.locator('body').aria_snapshot()
    names = ('slider "Confidence to leave with"', 'radio "Its own"', 'checkbox "Run the deeper exits too, to compare"')
    for line in (*names, 'button "Choose a picture"', 'button "Use dark colours"', 'list "Exits, shallow to deep"'):
        assert line in tree
    kinds = {line.strip().split()[1].rstrip(':') for line in tree.splitlines() if len(line.split()) == 2}
    assert kinds & {'button', 'slider', 'radio', 'checkbox', 'img', 'textbox'} == set()  # none without a name


@pytest.mark.parametrize('name', ['digits', 'photos'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_narrow_phone_needs_no_sideways_scrolling(name, scheme, open_page, pages):
    page = open_page(getattr(pages, name), viewport={'width': 360, 'height': 740}, color_scheme=scheme, has_touch=True)
    if name == 'digits':
        draw(page, SEVEN)
    settle(page)
    page.click('.switch')
    settle(page)
    page.wait_for_timeout(700)  # rows have opened
    assert page.evaluate('document.documentElement.scrollWidth') == 360
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter((each) => each.getBoundingClientRect().right > 361"
        " && !each.closest('.quiet')).map((each) => each.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_changed_file_is_refused(open_page, pages, tmp_path):
    shutil.copytree(pages.digits, tmp_path / 'page')
    path = next((tmp_path / 'page/model/stages').glob('main*'))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    page = open_page(tmp_path / 'page', is_loaded=False)
    page.wait_for_selector('body[data-state=failed]')
    assert 'main.onnx is not the file that the manifest describes' in page.inner_text('#error')


def test_file_that_is_no_picture_is_refused_in_one_line(open_page, pages, tmp_path):
    (tmp_path / 'notes.txt').write_text('not a picture')
    page = open_page(pages.photos)
    name = settle(page)['name']
    page.set_input_files('#file', tmp_path / 'notes.txt')
    page.wait_for_selector('#error:not([hidden])')
    assert page.inner_text('#error').startswith('This file is not a picture that the browser can read.')
    assert page.inner_text('#name') == name
    page.locator('#examples button').first.click()
    page.wait_for_selector('#error', state='hidden')


def test_drawn_digit_looks_like_those_of_scikit_learn(open_page, pages):
    page = open_page(pages.digits)
    draw(page, SEVEN)
    settle(page)
    pixels = page.evaluate(
        "Array.from(document.querySelector('#seen canvas').getContext('2d').getImageData(0, 0, 32, 32).data)"
    )
    image = np.array(pixels, np.uint8).reshape(32, 32, 4)
    assert (image[..., 0] == image[..., 1]).all()
    small = np.asarray(Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BOX), float) / 255 * 16
    assert 3 < small.mean() < 7  # 4.9 in scikit-learn's digits
    assert small.max() > 14
