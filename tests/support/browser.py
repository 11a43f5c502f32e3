"""Pages in a real Chromium, driven by chromedriver over its own protocol (W3C WebDriver); no package is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the protocol names a reference to an element
KEYS = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Escape": "\ue00c"}
KEYS |= {"Home": "\ue011", "End": "\ue010"}


class Browser:
    """One window."""

    def __init__(self, url: str) -> None:
        self.url = url
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": options},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def _send(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)) as got:
                return json.load(got)["value"]
        except HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def ask(self, method: str, path: str, **body):
        return self._send(method, self.session + path, body if method == "POST" else None)

    def open(self, file: Path) -> None:
        self.ask("POST", "/url", url=Path(file).resolve().as_uri())

    def run(self, script: str, *args):
        """The value that a function with this body returns."""
        return self.ask("POST", "/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def click(self, selector: str) -> None:
        found = self.ask("POST", "/element", using="css selector", value=selector)[ELEMENT]
        self.ask("POST", f"/element/{found}/click")

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def devtools(self, command: str, **values):
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=values)

    def look(self, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the console has been told since the last call."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type="browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        told = [json.loads(entry["message"])["message"] for entry in self.ask("POST", "/se/log", type="performance")]
        return [e["params"]["request"]["url"] for e in told if e["method"] == "Network.requestWillBeSent"]


@contextlib.contextmanager
def browser():
    """A window; the test is skipped where there is no Chromium."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    command = [driver, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            port = next(line.split()[-1].rstrip(".") for line in process.stdout if "successfully on port" in line)
            one = Browser(f"http://127.0.0.1:{port}")
            try:
                yield one
            finally:
                with contextlib.suppress(URLError, AssertionError):
                    one.ask("DELETE", "")
        finally:
            process.terminate()
