"""A headless browser, controlled by the WebDriver protocol (W3C)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 60
# As root and in containers there is no sandbox; the other flags keep it from contacting its maker's servers.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def why_not() -> str:
    """Return the reason why no browser can be started; empty if one can."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed: Debian's chromium and chromium-driver" if missing else ""


class Browser:
    """A window of the browser."""

    def __init__(self, session: str):
        self._session = session

    def open(self, address: str) -> None:
        """Open a page, and wait until it is loaded."""
        _ask(f"{self._session}/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of the body of a JavaScript function with these arguments."""
        return _ask(f"{self._session}/execute/sync", {"script": script, "args": arguments})

    def wait_for(self, script: str, *arguments: Any) -> Any:
        """Run a script until its value is true in JavaScript, and return that."""
        return until(lambda: self.run(script, *arguments))

    def picture(self) -> bytes:
        """Return a screenshot as PNG."""
        return base64.b64decode(_get(f"{self._session}/screenshot"))

    def errors(self) -> list[str]:
        """Return the errors on the console since the last call."""
        entries = _ask(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextmanager
def new_browser(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it with the block."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            yield from _with_session(_address(driver), profile, f"--window-size={width},{height}")
        finally:
            driver.terminate()


def _with_session(address: str, profile: Path, size: str) -> Iterator[Browser]:
    options = {"args": [*FLAGS, size, f"--user-data-dir={profile}"]}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    answer = _ask(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
    session = f"{address}/session/{answer['sessionId']}"
    try:
        yield Browser(session)
    finally:
        _send(urllib.request.Request(session, method="DELETE"))


def _address(driver: subprocess.Popen[str]) -> str:
    """Wait until the driver listens, and return its address."""
    assert driver.stdout
    line = next(line for line in driver.stdout if "started successfully on port" in line)
    return f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"


def _ask(address: str, body: dict[str, Any]) -> Any:
    return _send(urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"}))


def _get(address: str) -> Any:
    return _send(urllib.request.Request(address))


def _send(request: urllib.request.Request) -> Any:
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as response:
        return json.loads(response.read())["value"]


def until(look: Callable[[], Any]) -> Any:
    """Call `look` until its value is true, and return that."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := look()):
        assert time.monotonic() < deadline, f"nothing within {DEADLINE_SECONDS} s"
        time.sleep(0.1)
    return value
