"""The page in a real browser: it streams, colours every token by its fate, races, and prints nothing as markup."""

import os
import shutil
from pathlib import Path

import pytest
from serving import language_model, serving

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (CHROMIUM names one)"),
]
SHOTS = os.environ.get("LAYERSKIP_SHOTS")  # a folder for screenshots to look at
MARKUP = '<img src=x onerror="document.title=1"><b>bold</b>\x1b[31m \u202eabc'


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server():
    with serving(language_model(), rows=2, context=256) as running:
        yield running


def opened(browser, server, width=1280, scheme="light", **more):
    page = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **more
    ).new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if server.url not in request.url else None)
    page.said = said
    page.goto(server.url)
    page.locator("#model", has_text="tiny").wait_for()
    return page


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator("#send:not([disabled])").wait_for(timeout=30_000)


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_clearing_during_an_answer_leaves_nothing_of_it(browser, server):
    """What had been written of it was the first message of the next request."""
    page = opened(browser, server)
    page.fill("#prompt", "one")
    page.press("#prompt", "Enter")
    page.locator("#stop:not([disabled])").wait_for()
    page.locator(".turn.assistant, .assistant").first.wait_for()
    page.click("#clear")
    page.locator("#send:not([disabled])").wait_for()
    asked = []
    page.on(
        "request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None
    )
    ask(page, "two")
    assert [message["content"] for message in asked[0]["messages"]] == ["two"]
    assert page.locator("#turns").inner_text().count("one") == 0


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_is_streamed_and_coloured_and_counted(browser, server, width, scheme):
    page = opened(browser, server, width, scheme)
    page.select_option("#source", "exit")
    page.fill("#tokens", "64")
    ask(page, "Again, again and again?")
    text = page.inner_text(".turn.assistant")
    assert text
    fates = page.eval_on_selector_all(".turn.assistant .token", "all => all.map(one => one.className)")
    assert {"token plain"} <= {*fates} <= {"token plain", "token exit", "token lost", "token prefill"}
    assert page.inner_text("#speed") != "–"
    assert page.locator("#timeline .bar").count() > 1
    page.locator("#timeline .bar").nth(1).click()
    assert "ms" in page.inner_text("#detail")
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "nothing stands out at the side"
    shot(page, f"page-{width}-{scheme}")
    assert page.said == []


def test_rejected_drafts_are_shown_on_demand_and_a_race_tells_that_texts_are_equal(browser, server):
    page = opened(browser, server)
    page.select_option("#source", "exit")
    page.check("#race")
    page.fill("#tokens", "64")
    ask(page, "Tell me something long.")
    assert "equal" in page.inner_text(".verdict")
    lost = page.locator(".turn .token.lost")
    assert lost.count() > 0
    assert not lost.first.is_visible()
    page.check("#rejected")
    assert lost.first.is_visible()
    shot(page, "race")
    assert page.said == []


def test_what_a_model_prints_is_text(browser, server, monkeypatch):
    from layerskip.serve.replies import Reply

    push = Reply.push

    def printing(self, round):
        added = push(self, round)
        if "round" in added and added["round"]["tokens"]:
            added["round"]["tokens"][0]["text"] = MARKUP
        return added

    monkeypatch.setattr(Reply, "push", printing)
    page = opened(browser, server)
    ask(page, MARKUP.replace("\x1b", ""))
    assert page.title() == "layerskip"
    assert page.locator("#turns img, #turns b").count() == 0
    assert "<b>bold</b>" in page.inner_text(".turn.assistant")
    assert "<b>bold</b>" in page.inner_text(".turn.user")


def test_it_works_by_keyboard_and_says_what_things_are(browser, server):
    page = opened(browser, server)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input,select,textarea,button:not(.bar)')].filter(
            one => !one.labels?.length && !one.textContent.trim()).map(one => one.id)"""
    )
    assert unnamed == []
    page.focus("#prompt")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#prompt") == "Hello\nthere"
    page.fill("#tokens", "1024")
    page.keyboard.press("Enter")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.locator("#send:not([disabled])").wait_for()
    server.until(lambda: server.worker.running == 0)
    assert page.locator(".error").count() == 0


def test_errors_and_keys_are_told(browser, server):
    page = opened(browser, server)
    ask(page, "x" * 400)
    assert "context is 256" in page.inner_text(".error")
    with serving(language_model(), key="open sesame") as locked:
        context = browser.new_context()
        other = context.new_page()
        other.on("dialog", lambda dialog: dialog.accept("open sesame"))
        other.goto(locked.url)
        other.locator("#model", has_text="tiny").wait_for()
        ask(other, "Hi")
        assert other.locator(".turn.assistant").count() == 1
