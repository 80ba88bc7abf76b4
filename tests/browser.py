"""A real headless Chromium for the tests of pages: opens a file from disk, and says what is wrong with it."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@contextmanager
def open_page(path, width: int = 1280, height: int = 900, dark: bool = False):
    """Yield a selenium driver that shows the file at this size in CSS pixels; skips the test where no Chromium is."""
    names = ("chromium", "google-chrome", "chrome", "chromium-browser")
    binary, service = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not binary or not service:
        pytest.skip("no Chromium with a chromedriver on the PATH (they are no pip packages)")
    driver = _start(binary, service)
    try:
        # a window cannot be as narrow as a phone; the page inside it can
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(Path(path).resolve().as_uri())
        yield driver
    finally:
        driver.quit()


def _start(binary, service):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    # no name resolves, so that a page which needs a network shows it
    for flag in [*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # with its path given, selenium does not look for a driver in the network
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(service))


def console_errors(driver) -> list[str]:
    """What the page wrote to the console as an error since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def broken_pictures(driver) -> list[str]:
    """The alternative texts, or beginnings of addresses, of pictures that did not load."""
    script = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.alt || i.src.slice(0, 80))"
    return driver.execute_script(script)


def overflow(driver) -> int:
    """By how many pixels the document is wider than the window; 0 if it does not scroll sideways."""
    return driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def addresses(driver) -> list[str]:
    """Every address that the page asked for besides itself: no file and no network if it is self-contained."""
    return driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    )


def column(driver, table: str, index: int) -> list[str]:
    """The texts of a column of the table that the CSS selector finds, from top to bottom."""
    script = "const rows = [...document.querySelector(arguments[0]).tBodies[0].rows];"
    return driver.execute_script(script + "return rows.map(row => row.cells[arguments[1]].innerText)", table, index)


def sort_by(driver, table: str, index: int) -> None:
    """Click the head of a column."""
    from selenium.webdriver.common.by import By

    driver.find_elements(By.CSS_SELECTOR, f"{table} thead th")[index].find_element(By.TAG_NAME, "button").click()
