"""A real ComfyUI with the pack, opened in a real headless Chromium through Playwright.

LOWBIT_CHROMIUM: the browser to use (default: a Chromium or Chrome on the PATH, else Playwright's own).
LOWBIT_SCREENSHOTS: the folder that gets screenshots (default: none are taken, each takes a second).
Without Playwright, a browser or ComfyUI these tests are left out, and counted.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from testing import comfyui, tiny
from testing.server import Server, prepare_base

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# ComfyUI opens a workflow of its own last, which would take the place of what a test has drawn.
READY = """() => window.app?.rootGraph && window.app.extensionManager?.command
    && window.LiteGraph?.registered_node_types?.LowbitMemoryManager
    && window.app.extensionManager.workflow?.activeWorkflow"""
# Resolves with the event that ends the next run, or with what is known after a while.
ENDED = """(seconds) => {
    window.lowbitEnded = new Promise((resolve) => {
        for (const name of ["execution_success", "execution_error", "execution_interrupted"])
            app.api.addEventListener(name, ({ detail }) => resolve([name, detail.exception_message ?? ""]));
        setTimeout(() => resolve(["timeout", ""]), 1000 * seconds);
    });
}"""
LIMIT = 300_000  # milliseconds, for what hangs
VIEWPORT = {"width": 1600, "height": 1000}


def chromium_path() -> str | None:
    """The browser, None where there is none."""
    named = os.environ.get("LOWBIT_CHROMIUM")
    if named:
        return named if Path(named).exists() else None
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            own = playwright.chromium.executable_path
        found = own if Path(own).exists() else None
    return found


@functools.cache
def missing() -> str | None:
    """Why there can be no browser, None when there can."""
    if importlib.util.find_spec("playwright") is None:
        return "need Playwright (pip install playwright) and Chromium"
    return None if chromium_path() else "need Chromium (set LOWBIT_CHROMIUM to it)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := missing():
        pytest.skip(reason)


class Tab:
    """ComfyUI in one browser tab, with its errors."""

    def __init__(self, page: Any, address: str, folder: Path | None):
        self.page = page
        self.address = address
        self.folder = folder
        self.errors: list[str] = []
        self.showing: Path | None = None
        page.set_default_timeout(LIMIT)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, **settings: Any) -> None:
        """Sets ComfyUI's settings, opens it and waits until it takes commands."""
        chosen = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"} | settings
        chosen |= {"Comfy.Graph.CanvasInfo": False, "Comfy.Workflow.Persist": False, "Comfy.Minimap.Visible": False}
        assert self.page.request.post(f"http://{self.address}/api/settings", data=chosen).ok
        self.page.goto(f"http://{self.address}", wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=LIMIT)
        self.page.wait_for_load_state("networkidle")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Runs JavaScript in the page and returns its value."""
        return self.page.evaluate(script, argument)

    def command(self, name: str) -> None:
        """Runs one of ComfyUI's commands."""
        self.evaluate("(name) => window.app.extensionManager.command.execute(name)", name)

    def run(self, seconds: float = 240) -> None:
        """Presses Run and waits for the end of the run, which must be a good one."""
        self.evaluate(ENDED, seconds)
        with self.page.expect_response(
            lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
        ) as queued:
            self.page.get_by_test_id("queue-button").click()
        assert queued.value.ok, queued.value.text()
        assert self.evaluate("() => window.lowbitEnded") == ["execution_success", ""]

    def run_prompt(self, prompt: Mapping[str, Any], seconds: float = 240) -> None:
        """Queues a prompt in this tab's name, so that its nodes show the run, and waits for its end, which must be good."""
        self.evaluate(ENDED, seconds)
        data = {"prompt": prompt, "client_id": self.evaluate("() => app.api.clientId")}
        queued = self.page.request.post(f"http://{self.address}/prompt", data=data)
        assert queued.ok, queued.text()
        assert self.evaluate("() => window.lowbitEnded") == ["execution_success", ""]

    def shot(self, name: str) -> None:
        """Keeps a screenshot where there is a folder for it."""
        if self.folder is not None:
            self.page.wait_for_timeout(300)  # ComfyUI draws its canvas when the browser next asks for a frame
            self.page.screenshot(path=self.folder / f"{name}.png")


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """Where the screenshots go, None where nobody asked for them."""
    named = os.environ.get("LOWBIT_SCREENSHOTS")
    if not named:
        return None
    Path(named).mkdir(parents=True, exist_ok=True)
    return Path(named)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base directory with the pack and the tiny checkpoints."""
    folder = prepare_base(tmp_path_factory.mktemp("comfyui"))
    tiny.write_all(folder / "models")
    return folder


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[Server]:
    """The running ComfyUI."""
    with Server(base, comfyui.find(), name="browser") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The running Chromium; for one file, because Playwright keeps an event loop running in the thread of the tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


@pytest.fixture(scope="session")
def open_tab(server: Server, screenshots: Path | None) -> Callable[..., Tab]:
    """Opens ComfyUI in a new tab of a browser context, with these settings of ComfyUI."""

    def opened(context: Any, **settings: Any) -> Tab:
        tab = Tab(context.new_page(), server.address, screenshots)
        tab.open(**settings)
        return tab

    return opened


@pytest.fixture
def new_tab(browser: Any, server: Server, screenshots: Path | None) -> Iterator[Callable[[], Tab]]:
    """Makes tabs that know nothing of each other; none may have an error that nobody caught."""
    contexts, tabs = [], []

    def make() -> Tab:
        contexts.append(browser.new_context(viewport=VIEWPORT, locale="en-US", reduced_motion="reduce"))
        tabs.append(Tab(contexts[-1].new_page(), server.address, screenshots))
        return tabs[-1]

    yield make
    errors = [error for tab in tabs for error in tab.errors]
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def tab(new_tab: Callable[[], Tab]) -> Tab:
    """One tab, not opened yet."""
    return new_tab()
