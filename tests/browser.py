"""Chromium for the tests of pages, where it is installed; none is downloaded."""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
HERE = ("file:", "data:", "blob:", "http://127.0.0.1")
DESK = {"width": 1400, "height": 900}


@pytest.fixture(scope="module")
def browser():
    """Chromium, or a skip that says why."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or what your system has")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    """A page that the tests of a file share: a new one takes as long as a visit."""
    return browser.new_page()


@pytest.fixture
def browse(browser, tab):
    """Opens addresses; in the end no request has left this machine, and nothing has gone wrong."""
    wrong, extra = [], []

    def asks(request):
        if not request.url.startswith(HERE):
            wrong.append(f"asked for {request.url}")

    heard = {
        "console": lambda message: wrong.append(message.text),
        "pageerror": lambda error: wrong.append(str(error)),
        "request": asks,
        "requestfailed": lambda request: wrong.append(f"could not load {request.url}"),
    }

    def listen(page):
        for event, handler in heard.items():
            page.on(event, handler)
        return page

    def open_page(address, size=DESK, scheme="light", **options):
        page = listen(browser.new_page(**options)) if options else tab
        if options:
            extra.append(page)
        page.set_default_timeout(20_000)
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        page.goto(address)
        return page

    listen(tab)
    yield open_page
    for page in extra:
        page.close()
    for event, handler in heard.items():
        tab.remove_listener(event, handler)
    if tab.url != "about:blank":
        tab.evaluate("localStorage.clear()")
        tab.goto("about:blank")
    assert wrong == []
