"""Open every page of the built site in a browser: ``python docs/check_site.py [FOLDER]``.

A fault is a link or an anchor that leads nowhere in the site, a picture that is not there, maths
that is not set or has an error, an error in the console, a file that cannot be loaded, something
from another host, and a page that is wider than a phone. Links to other hosts are not followed. The
browser is an installed Chromium, or the one that ``$CHROMIUM`` names.
"""

import functools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).resolve().parent.parent / "build" / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WAIT = 30_000  # milliseconds

MATHS_IS_SET = """() => {
    const maths = document.querySelectorAll('.math:not(.highlight *)');
    return maths.length === 0 || !!(window.MathJax && MathJax.startup && MathJax.startup.promise);
}"""
LOOK = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const images = [...document.images];
    images.forEach(image => image.loading = 'eager');
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    const set = element => element.querySelector('mjx-container');
    return {
        links: [...document.querySelectorAll('a[href]')].map(a => a.href),
        anchors: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
        pictures: images.filter(i => i.naturalWidth === 0).map(i => i.getAttribute('src')),
        unset: [...document.querySelectorAll('.math')].filter(e => !set(e)).map(e => e.innerText),
        wrong: [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.innerText),
    };
}"""
WIDER = """() => {
    const page = document.documentElement, fits = () => page.scrollWidth <= page.clientWidth;
    const without = element => {  // whether the page fits if it is not shown
        const before = element.style.display;
        element.style.setProperty('display', 'none', 'important');
        const fit = fits();
        element.style.display = before;
        return fit;
    };
    if (fits()) return [];
    let wide = document.body, inner = wide;
    while (inner) { wide = inner; inner = [...wide.children].find(without); }
    return [`<${wide.tagName.toLowerCase()}> ${wide.textContent.trim().slice(0, 60)}`];
}"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()


def browser_path() -> str | None:
    """The installed browser; None if there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def a_browser() -> Iterator[Browser]:
    """A browser without a window; root has no sandbox."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def heard(page: Page, home: str) -> list[str]:
    """What goes wrong while pages load; the list grows, and is emptied by who reads it."""
    faults: list[str] = []
    page.on("console", lambda m: m.type == "error" and faults.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("requestfailed", lambda r: faults.append(f"not loaded: {r.url}"))

    def request(route):
        if route.request.url.startswith((home, "data:", "blob:")):
            route.continue_()
        else:
            faults.append(f"from another host: {route.request.url}")
            route.abort()

    page.route("**/*", request)
    return faults


def opened(page: Page, address: str) -> tuple[dict, list[str]]:
    """What a page holds, and what of it is too wide for a phone."""
    page.set_viewport_size(DESK)
    page.goto(address, wait_until="load")
    page.wait_for_function(MATHS_IS_SET, timeout=WAIT)
    found = page.evaluate(LOOK)
    page.set_viewport_size(PHONE)
    return found, page.evaluate(WIDER)


def faults_of_page(page: Page, address: str, said: list[str]) -> tuple[dict, list[str]]:
    """What a page holds, and its own faults; links are judged when all pages are known."""
    said.clear()
    try:
        found, wide = opened(page, address)
    except Exception as error:  # a page that cannot be opened is a fault, and others are looked at
        reason = str(error).splitlines()[0]
        return {"links": [], "anchors": []}, [*said, f"not opened, or maths never set: {reason}"]
    return found, [
        *said,
        *(f"no picture: {x}" for x in found["pictures"]),
        *(f"maths is not set: {x[:60]}" for x in found["unset"]),
        *(f"maths has an error: {x[:60]}" for x in found["wrong"]),
        *(f"wider than a phone: {x}" for x in wide),
    ]


def broken_links(
    address: str, links: list[str], home: str, folder: Path, anchors: dict[str, set[str]]
) -> list[str]:
    """The links of a page into the site that lead to no file, or to no anchor of a page."""
    faults = []
    for link in sorted({urljoin(address, link) for link in links}):
        to, anchor = urldefrag(link)
        if not to.startswith(home):
            continue
        to = f"{to}index.html" if to.endswith("/") else to
        if not (folder / unquote(to.removeprefix(home)).partition("?")[0]).is_file():
            faults.append(f"broken link: {link.removeprefix(home)}")
        elif anchor and unquote(anchor) not in anchors.get(to, {unquote(anchor)}):
            faults.append(f"broken anchor: {link.removeprefix(home)}")
    return faults


def check(folder: Path) -> dict[str, list[str]]:
    """The faults of each page, by its path in the folder."""
    paths = [path.relative_to(folder) for path in folder.rglob("*.html")]
    names = sorted(str(path) for path in paths if path.parts[0] != "_static")  # a theme's parts
    links: dict[str, list[str]] = {}
    anchors: dict[str, set[str]] = {}
    faults: dict[str, list[str]] = {}
    with served(folder) as home, a_browser() as browser:
        page = browser.new_page()
        said = heard(page, home)
        for name in names:
            found, faults[name] = faults_of_page(page, home + name, said)
            links[name], anchors[home + name] = found["links"], set(found["anchors"])
        for name in names:
            faults[name] += broken_links(home + name, links[name], home, folder, anchors)
    return faults


def main() -> int:
    """Tell the faults; the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SITE
    if browser_path() is None:
        sys.exit("no Chromium is installed: apt-get install chromium, or name one in $CHROMIUM")
    faults = check(folder)
    if not faults:
        sys.exit(f"there is no page in {folder}; make docs")
    for name, found in faults.items():
        for fault in found:
            print(f"{name}: {fault}")
    n_faults = sum(map(len, faults.values()))
    print(f"{len(faults)} pages opened, {n_faults} faults")
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
