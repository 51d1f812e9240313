"""The chat page in a real browser; skipped where Chromium and its driver are not installed."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_helpers import TAUGHT, Running, make_tokenizer, serving, slow_model, taught_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

PICTURES = os.environ.get("TRINITY_SCREENSHOTS")
"""A folder to leave screenshots in, for whoever wants to look."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    tokenizer = make_tokenizer()
    with serving(taught_model(tokenizer), tokenizer, max_batch=4) as running:
        yield running


@pytest.fixture
def page(server: Running, tmp_path: Path) -> Iterator[WebDriver]:
    options = Options()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_window_size(1000, 800)
        driver.get(f"{server.url}/")
        wait_for(lambda: driver.title == "tiny")
        yield driver
        # No script failed and the page's own policy was never violated.
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def find(page: WebDriver, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def put(page: WebDriver, name: str, value: str) -> None:
    if not find(page, "#settings").is_displayed():
        find(page, "#more").click()
    field = find(page, f"#{name}")
    field.clear()
    field.send_keys(value)


def say(page: WebDriver, text: str) -> None:
    # send_keys of this driver takes the basic plane only; the texts here stay in it
    find(page, "#text").send_keys(text)
    find(page, "#send").click()


def finished(page: WebDriver) -> bool:
    return find(page, "#send").is_displayed()


def picture(page: WebDriver, name: str) -> None:
    if PICTURES:
        page.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def last_body(page: WebDriver) -> WebElement:
    return page.find_elements(By.CSS_SELECTOR, ".turn.assistant .body")[-1]


def test_it_sends_streams_and_shows_markdown_without_injection(page: WebDriver) -> None:
    put(page, "temperature", "0")
    find(page, "#more").click()
    say(page, "Say it.")
    wait_for(lambda: finished(page))
    body = last_body(page)
    assert [e.text for e in body.find_elements(By.TAG_NAME, "em")] == ["sea"]
    assert [e.text for e in body.find_elements(By.TAG_NAME, "strong")] == ["calm"]
    assert body.find_element(By.CSS_SELECTOR, "pre code").text == "print(1)"
    assert body.find_elements(By.TAG_NAME, "img") == []  # what looks like HTML stays text
    assert "<img src=x onerror=alert(1)>" in body.text
    assert "tokens" in find(page, ".turn.assistant .note").text
    picture(page, "light")
    say(page, "Café?")
    wait_for(lambda: finished(page))
    assert len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 4
    find(page, "#fresh").click()
    assert page.find_elements(By.CSS_SELECTOR, ".turn") == []
    say(page, "Think.")
    wait_for(lambda: finished(page))
    assert last_body(page).text == "Two."
    thought = find(page, "details.thought")
    thought.find_element(By.TAG_NAME, "summary").click()
    assert "One and one." in thought.text


def test_it_stops_and_goes_on(page: WebDriver) -> None:
    tokenizer = make_tokenizer()
    with serving(slow_model(), tokenizer, max_batch=2) as server:
        page.get(f"{server.url}/")
        wait_for(lambda: page.title == "tiny")
        put(page, "temperature", "0")  # this model then goes on for ever
        put(page, "max_tokens", "8000")
        find(page, "#more").click()
        say(page, "Ramble.")
        wait_for(lambda: last_body(page).text)
        early = last_body(page).text
        wait_for(lambda: len(last_body(page).text) > len(early))  # it grows: a stream
        find(page, "#stop").click()
        wait_for(lambda: finished(page))
        assert find(page, ".turn.assistant .note").text == "stopped"
        wait_for(lambda: server.metric("trinity_answers_running") == 0)
        put(page, "max_tokens", "5")
        say(page, "And now?")
        wait_for(lambda: finished(page))
        assert "length limit" in page.find_elements(By.CSS_SELECTOR, ".turn.assistant .note")[-1].text


def test_it_copies(page: WebDriver, server: Running) -> None:
    page.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": server.url},
    )
    put(page, "temperature", "0")
    find(page, "#more").click()
    say(page, "Say it.")
    wait_for(lambda: finished(page))

    def clipboard() -> str:
        return page.execute_async_script(
            "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
        )

    find(page, ".turn.assistant .tools .copy").click()
    wait_for(lambda: find(page, ".turn.assistant .tools .copy").text == "Copied")
    assert clipboard() == TAUGHT["Say it."]
    find(page, ".turn.assistant pre .copy").click()
    wait_for(lambda: clipboard() == "print(1)")


def test_dark_mode_is_kept_and_a_phone_is_wide_enough(page: WebDriver) -> None:
    def colour() -> str:
        return find(page, "body").value_of_css_property("background-color")

    light = colour()
    find(page, "#theme").click()
    assert colour() != light
    put(page, "temperature", "0")
    find(page, "#more").click()
    say(page, "Say it.")
    wait_for(lambda: finished(page))
    picture(page, "dark")
    page.refresh()
    wait_for(lambda: page.title == "tiny")
    assert colour() != light
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    )
    say(page, "Say it.")
    wait_for(lambda: finished(page))
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    for name in ("text", "send", "theme", "more", "fresh", "attach"):
        box = find(page, f"#{name}").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    picture(page, "phone")
    find(page, "#more").click()
    picture(page, "phone-settings")


def test_files_are_attached_and_errors_are_shown(page: WebDriver, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("the cat sat on the mat " * 5)
    find(page, "#picker").send_keys(str(tmp_path / "note.txt"))
    wait_for(lambda: "note.txt (115 characters)" in find(page, "#files").text)
    put(page, "max_tokens", "4")
    put(page, "temperature", "0")  # a drawn answer may end by itself
    say(page, "What?")
    wait_for(lambda: finished(page))
    assert "the cat sat on the mat" in find(page, ".turn.user .body").text
    assert "length limit" in find(page, ".turn.assistant .note").text
    put(page, "max_tokens", "999999")
    say(page, "More?")
    wait_for(lambda: finished(page))
    assert "positions" in page.find_elements(By.CSS_SELECTOR, ".turn.assistant .note")[-1].text
    picture(page, "error")
    # The browser itself logs the refused request; that is the one message allowed.
    logged = [
        entry["message"]
        for entry in page.get_log("browser")  # pyright: ignore[reportAttributeAccessIssue]
        if entry["level"] == "SEVERE"
    ]
    assert all("400" in message for message in logged), logged


HOSTILE = [
    "[x](javascript:alert(1))",
    "[x](https://example.org/\"onmouseover=alert(1))",
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>",
    "| a | <b onclick=x> |\n|---|---|\n| `<i>` | **<u>** |",
    "```html\n<script>window.hit = 1</script>",
    "# <h1>\n> <q>\n1. <li>\n- [a](http://e.org/<b>)\n*" * 3,
    "`" * 2000 + "*" * 2000 + "[" * 2000 + "(" * 2000,
    "**a " * 3000,
    "1. a\n- b\n2) c\n+ d\n\n---\n***\n|\n|-",
]  # fmt: skip


def test_markdown_of_hostile_answers_is_text_and_ends(page: WebDriver) -> None:
    for text in HOSTILE:
        found = page.execute_script(
            "const box = document.createElement('div'); document.body.append(box); const start = performance.now();"
            "markdown(box, arguments[0]); const out = {tags: [...box.querySelectorAll('*')].map((e) => e.tagName),"
            "links: [...box.querySelectorAll('a')].map((e) => e.protocol), ms: performance.now() - start,"
            "handlers: [...box.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())};"
            "box.remove(); return out;",
            text,
        )
        allowed = set("PRE CODE BUTTON H3 H4 H5 UL OL LI BLOCKQUOTE TABLE TR TH TD HR P BR STRONG EM A".split())  # noqa: SIM905
        assert set(found["tags"]) <= allowed
        assert set(found["links"]) <= {"http:", "https:"}
        assert not [name for name in found["handlers"] if name.startswith("on")]
    assert page.execute_script("return window.hit") is None
