"""The README's picture of the console, taken from the stack that runs in this home:

python -m tests.screenshot        # needs Chromium: `make chromium`
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import ViewportSize

from services.core.settings import Settings
from tests.browser import chromium

PICTURE = Path(__file__).parents[1] / "services/console/console.png"
SIZE: ViewportSize = {"width": 1240, "height": 1390}
COLOURS = 256  # the page has few, and the file is a third of the size
SETTLE_MS = 6_000  # three looks


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--url", default=Settings.load().console_url)
    arguments.add_argument("--to", type=Path, default=PICTURE)
    given = arguments.parse_args()
    if not given.url:
        sys.exit("no stack runs here: `reflux demo` in another terminal, or --url of a console")
    with chromium() as browser:
        page = browser.new_context(viewport=SIZE, color_scheme="light").new_page()
        page.goto(given.url)
        page.locator(".link.live").wait_for()
        page.wait_for_timeout(SETTLE_MS)
        taken = page.screenshot()
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    # Two rounds of means: without them the palette only comes near the background.
    picture = picture.quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE
    )
    picture.save(given.to, optimize=True)
    sys.stdout.write(f"{given.to}: {given.to.stat().st_size / 1024:.0f} KB\n")


if __name__ == "__main__":
    main()
