#!/usr/bin/env python3
"""Take a picture of a demo page: `uv run --group page hub/space/shoot.py PAGE OUT.webp --draw 7`.

The pictures in docs/images are made by it: DIGITS is the page of the network that the first command of README.md
trains, PHOTOS that of `resnet10t` trained on Imagenette at 64 pixels, with `--examples hub/space/examples`.

    shoot.py DIGITS docs/images/page-digits.webp --draw 7
    shoot.py DIGITS docs/images/page-phone.webp --draw 4 --width 360 --scale 1.5
    shoot.py PHOTOS docs/images/page-photos.webp --example 0 --threshold 0.95 --scheme dark
"""

import argparse
import functools
import http.server
import io
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
# A browser in a container, without graphics, that knows no host but this machine.
FLAGS = ('--no-sandbox', '--disable-gpu', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1')
PAD = 320  # the drawing pad's own units
DIGITS = {
    4: [[(185, 45), (90, 185), (240, 185)], [(190, 110), (190, 275)]],
    7: [[(75, 60), (230, 60), (135, 270)]],
}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """What `python -m http.server` answers with, without its log."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields its address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@contextmanager
def open_browser() -> Iterator['Browser']:
    """Start the machine's own browser, without a window.

    Raises:
        FileNotFoundError: There is none.
    """
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(f'No browser: install {" or ".join(BROWSERS)}, such as the Debian package chromium.')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


def draw(page: 'Page', strokes: list[list[tuple[float, float]]]) -> None:
    """Draw on the pad with the mouse, in the pad's own units."""
    box = page.locator('#pad').bounding_box()
    assert box is not None
    for stroke in strokes:
        places = [(box['x'] + x * box['width'] / PAD, box['y'] + y * box['width'] / PAD) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=3)
        page.mouse.up()


def main() -> int:
    """Take the picture."""
    parser = argparse.ArgumentParser(description='Take a picture of a demo page.')
    parser.add_argument('page', type=Path, help='what make.py wrote')
    parser.add_argument('out', type=Path, help='a file of any format that Pillow writes')
    parser.add_argument('--draw', type=int, choices=sorted(DIGITS), help='a digit to draw')
    parser.add_argument('--example', type=int, help='number of an example to take, from 0')
    parser.add_argument('--threshold', type=float, help='confidence to leave with')
    parser.add_argument('--width', type=int, default=1180)
    parser.add_argument('--height', type=int, help='default: the whole page')
    parser.add_argument('--scale', type=float, default=1, help='pixels per pixel of the page')
    parser.add_argument('--scheme', choices=('light', 'dark'), default='light')
    args = parser.parse_args()
    with serve(args.page) as address, open_browser() as browser:
        page = browser.new_page(
            viewport={'width': args.width, 'height': args.height or 900},
            color_scheme=args.scheme,
            device_scale_factor=args.scale,
        )
        page.goto(address)
        page.wait_for_selector('body[data-loaded=yes]')
        if args.threshold is not None:
            page.check('[name=rule][value=threshold]')
            page.fill('#slider', str(args.threshold))
        if args.draw is not None:
            draw(page, DIGITS[args.draw])
        if args.example is not None:
            page.locator('#examples button').nth(args.example).click()
        page.wait_for_selector('body[data-state=done]')
        page.mouse.move(0, 0)
        page.wait_for_timeout(1500)  # what moves has come to rest
        content = page.screenshot(full_page=args.height is None)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(content)).convert('RGB').save(args.out, quality=88, method=6, optimize=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
