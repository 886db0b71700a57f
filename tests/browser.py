"""Chromium without a window, for tests of pages: a few commands of WebDriver, which chromedriver understands.

Selenium would bring Trio. Where Trio is installed, Hypothesis warns whenever objects were frozen (conftest.py), and
warnings are errors here.

References:
    W3C, "WebDriver", https://www.w3.org/TR/webdriver2/.
"""

import base64
import http.client
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's number, section 11 of the standard
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000",
)  # fmt: skip


def programs() -> tuple[str, str] | None:
    """The paths of Chromium and chromedriver; None if one of them is missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return None if chromium is None or driver is None else (chromium, driver)


class Browser:
    """A browser with one page. Elements are named by CSS selectors."""

    def __init__(self, chromium: str, driver: str, profile: Path):
        self._driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._driver.stdout is not None
        started = next(found for line in self._driver.stdout if (found := re.search(r"started .* on port (\d+)", line)))
        self._address, self._session = f"127.0.0.1:{started[1]}", "/session"
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request(method, self._session + path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.communicate()

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.as_uri()})

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def script(self, code: str, *arguments: Any) -> Any:
        """What a function with this body returns."""
        return self._call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        return self.script("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def click(self, selector: str) -> None:
        self._move(selector, [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}])

    def hover(self, selector: str) -> None:
        self._move(selector, [])

    def _move(self, selector: str, then: list[dict[str, Any]]) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self.script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", found)
        self._wait_for_frames()
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {ELEMENT: found[ELEMENT]}}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move, *then]}]})
        self._wait_for_frames()

    def _wait_for_frames(self) -> None:
        """Waits until the page is drawn. Before that, Chromium may find what was under the pointer before a scroll."""
        code = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        self._call("POST", "/execute/async", {"script": code, "args": []})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def messages(self) -> list[dict[str, Any]]:
        """What the console has shown since the last call: errors of scripts, and files that were refused."""
        return self._call("POST", "/se/log", {"type": "browser"})
