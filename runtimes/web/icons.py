"""Draws icon.svg as the PNG icons that the page's manifest names, in Chromium.

    python runtimes/web/icons.py

They lie in public/ and are committed; run it after a change of icon.svg.
"""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import sync_playwright

from tinyllava_edge.benchmarks.targets.browser_page import find_browser

PUBLIC = Path(__file__).parent / "public"
ICONS = {"icon-192.png": (192, False), "icon-512.png": (512, False), "icon-maskable-512.png": (512, True)}


def main() -> None:
    drawing = (PUBLIC / "icon.svg").read_text(encoding="utf-8")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(driver), args=["--no-sandbox"])
        for name, (side, maskable) in ICONS.items():
            # a mask cuts the corners itself, so nothing may be transparent there
            svg = re.sub(r' rx="\d+"', "", drawing) if maskable else drawing
            page = browser.new_page(viewport={"width": side, "height": side})
            page.set_content(f"<style>body{{margin:0}}svg{{display:block;width:{side}px;height:{side}px}}</style>{svg}")
            page.screenshot(path=PUBLIC / name, omit_background=True)
        browser.close()


if __name__ == "__main__":
    main()
