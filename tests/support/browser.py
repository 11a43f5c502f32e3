"""Pages in a real Chromium, driven by selenium and the distribution's chromedriver: nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from pictures import chromium, look


class Browser:
    """One window."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.run = driver.execute_script  # the value that a function with this body returns
        self.devtools = driver.execute_cdp_cmd

    def open(self, file: Path) -> None:
        self.driver.get(Path(file).resolve().as_uri())

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        named = {"ArrowLeft": Keys.ARROW_LEFT, "ArrowRight": Keys.ARROW_RIGHT, "Escape": Keys.ESCAPE, "End": Keys.END}
        ActionChains(self.driver).send_keys(*(named[key] for key in keys)).perform()

    def look(self, *size: int, **how) -> None:
        look(self.driver, *size, **how)

    def complaints(self) -> list[str]:
        """What the console has shown since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@contextlib.contextmanager
def browser():
    """A window; the test is skipped where there is no Chromium."""
    with contextlib.ExitStack() as stack:
        try:
            driver = stack.enter_context(chromium())
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield Browser(driver)
