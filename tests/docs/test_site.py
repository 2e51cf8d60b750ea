"""The site of the docs in a browser: whole, readable on a phone, silent, and never asking another host for anything."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.pages import ROOT

from hub.space.shoot import open_browser, serve

pytestmark = pytest.mark.page

# Page of the site -> what must be on it, as a selector.
SAMPLE = {
    'index.html': 'article table',
    'quickstart.html': 'article pre code',
    'losses/eed.html': 'article math[display=block]',
    'design.html': 'article img',
    'examples/look_inside.html': 'article .jp-OutputArea-output img',
    'reference/models.html': '[id="timm_multiexit.create_model"]',
    'repository/hub/recipes/imagenette_lite0_eed.yaml.html': 'article pre code',
    'repository/hub/checkpoints/imagenette_lite0_eed/index.html': 'article img',
}


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def open_page(site):
    """Return a function that opens a page at a width in pixels, and what was asked for and said."""
    with serve(site) as address, open_browser() as browser:

        def start(path, width=1280):
            seen = SimpleNamespace(requests=[], messages=[])
            page = browser.new_context(viewport={'width': width, 'height': 900}).new_page()
            page.on('console', lambda message: seen.messages.append(message.text))
            page.on('pageerror', lambda error: seen.messages.append(str(error)))
            page.on('response', lambda reply: reply.ok or seen.messages.append(f'{reply.status}: {reply.url}'))
            page.context.on('request', lambda request: seen.requests.append(request.url))
            assert page.goto(f'{address}/{path}').ok, path
            page.wait_for_load_state('networkidle')
            seen.foreign = [url for url in seen.requests if not url.startswith((address, 'data:', f'blob:{address}'))]
            return page, seen

        yield start


def test_no_page_asks_another_host_or_complains(site, open_page):
    pages = sorted(str(path.relative_to(site)) for path in site.rglob('*.html') if path.name != '404.html')
    assert len(pages) >= 30
    for path in pages:
        page, seen = open_page(path)
        assert (path, seen.foreign, seen.messages) == (path, [], [])
        assert len(seen.requests) >= 4
        page.context.close()


@pytest.mark.parametrize('path', SAMPLE)
def test_page_shows_what_it_is_for(open_page, path):
    page, _ = open_page(path)
    assert page.locator(SAMPLE[path]).first.is_visible()
    page.context.close()


@pytest.mark.parametrize('path', SAMPLE)
def test_page_fits_a_phone(open_page, path):
    page, _ = open_page(path, width=360)
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    page.context.close()


def test_search_finds_a_public_name(open_page):
    page, seen = open_page('index.html')
    page.locator('input.md-search__input').click()
    page.keyboard.type('truncate')
    page.wait_for_selector('.md-search-result__item a')
    links = [link.get_attribute('href') for link in page.locator('.md-search-result__item a').all()]
    assert any('reference/models.html' in link for link in links)
    assert (seen.foreign, seen.messages) == ([], [])
    page.context.close()


def test_equations_are_elements_that_need_no_script(site):
    html = (site / 'losses/eed.html').read_text()
    assert '<math' in html
    assert 'arithmatex' not in html
