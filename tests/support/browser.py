"""A real browser without a screen, told what to do in the WebDriver protocol (W3C) by its own driver."""

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
# As root and in containers there is no sandbox; without the others it asks its maker's servers for this and that.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def why_not() -> str:
    """Why there is no browser here; empty if there is."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed: Debian's chromium and chromium-driver" if missing else ""


class Browser:
    """A window of the browser."""

    def __init__(self, session: str):
        self._session = session

    def open(self, address: str) -> None:
        """Returns when the page is loaded."""
        _ask(f"{self._session}/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns; its arguments are `arguments`."""
        return _ask(f"{self._session}/execute/sync", {"script": script, "args": arguments})

    def wait_for(self, script: str, *arguments: Any) -> Any:
        """The first value of the script that JavaScript takes for true."""
        return until(lambda: self.run(script, *arguments))

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(_get(f"{self._session}/screenshot"))

    def errors(self) -> list[str]:
        """What the browser has complained of since it was asked last."""
        found = _ask(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] == "SEVERE"]


@contextmanager
def new_browser(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with an empty profile, ended with the block."""
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
    """Where the driver listens, as it says when it does."""
    assert driver.stdout
    line = next(line for line in driver.stdout if "started successfully on port" in line)
    return f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"


def _ask(address: str, question: dict[str, Any]) -> Any:
    return _send(urllib.request.Request(address, json.dumps(question).encode(), {"Content-Type": "application/json"}))


def _get(address: str) -> Any:
    return _send(urllib.request.Request(address))


def _send(request: urllib.request.Request) -> Any:
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
        return json.loads(answer.read())["value"]


def until(look: Callable[[], Any]) -> Any:
    """The first value of `look` that is true."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found
