"""The report in a real browser, without a network: Chromium, driven by playwright. Skipped where there is none."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trl_distill.reporting.tokens import page as rendered
from trl_distill.reporting.tokens.pictures import pictures_of
from trl_distill.reporting.tokens.table import Picture, Span


playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a table as a file in a window without a network; whatever is complained about fails the test."""
    complaints, contexts = [], []

    def start(table, width: int = 1280, height: int = 900, phone: bool = False, dark: bool = False):
        path: Path = tmp_path / "report.html"
        path.write_text(rendered(table), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": height},
            offline=True,
            has_touch=phone,
            is_mobile=phone,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []


def wait(page, condition: str) -> None:
    """Until JavaScript says so; playwright's own `wait_for_function` needs an `eval` that the page forbids."""
    end = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.02)


def titles(page) -> list[str]:
    return page.locator("article:not([hidden]) h3").all_text_contents()


def token(page, card: int, place: int, lane: int = 0):
    return page.locator(f"article:has(#row-{card}) .tokens").nth(lane).locator(f'[data-i="{place}"]')


def focused(page) -> tuple[int, int]:
    """Completion and place of the token that has the focus; (-1, -1) where none has."""
    return tuple(
        page.evaluate(
            "(() => { const n = document.activeElement; return n.matches('.t') "
            "? [n.closest('article').row.index, Number(n.dataset.i)] : [-1, -1]; })()"
        )
    )


def test_what_models_wrote_stays_text(opened, table):
    page = opened(table(title="<script>window.hurt=3</script>"))
    token(page, 1, 1).hover()  # the token that would like to be a script
    assert "</script><script>window.hurt=1</script>" in token(page, 1, 1).inner_text()
    assert "</script>" in page.locator("#panel-token").inner_text()
    assert page.evaluate("[window.hurt, document.scripts.length, document.images.length]") == [None, 2, 0]
    assert page.locator("article:has(#row-1) .prompt").inner_text().startswith("<img src=x")
    assert page.locator("h1").inner_text() == "<script>window.hurt=3</script>"


@pytest.mark.parametrize("phone", [False, True])
def test_thumbnails_stand_beside_the_prompt(opened, table, phone):
    seen = pictures_of(
        {"prompt": [{"role": "user", "content": "?"}], "images": [Image.new("RGB", (640, 400), "red")] * 2}
    )
    evil = Picture("\"><script>window.hurt=4</script><img src=x onerror='window.hurt=5'>")
    whole = table()
    first, second, third = whole.completions
    rows = (replace(first, pictures=(*seen, evil)), replace(second, pictures=(replace(seen[0], alt=evil.alt),)), third)
    page = opened(replace(whole, completions=rows), **({"width": 390, "height": 844} if phone else {}))
    page.locator("article:has(#row-0)").scroll_into_view_if_needed()
    shown = "[...document.images].map((i) => [i.complete, i.naturalWidth, i.naturalHeight, i.clientWidth > 40])"
    wait(page, f"{shown}.every((one) => one[0])")
    assert page.evaluate(shown) == [[True, 160, 100, True]] * 3
    assert page.evaluate("[window.hurt, document.scripts.length]") == [None, 2]
    card = page.locator("article:has(#row-0)")
    assert card.locator("img").first.get_attribute("alt") == "image 1 of 2, 640 × 400 pixels"
    assert page.locator("article:has(#row-1) img").get_attribute("alt") == evil.alt
    assert evil.alt in card.locator(".pictures").inner_text()
    image, prompt = (card.locator(name).first.bounding_box() for name in ("img", ".prompt"))
    assert image["y"] < prompt["y"] if phone else image["x"] + image["width"] < prompt["x"]
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("article:has(#row-2) .pictures").count() == 0


def test_blanks_and_controls_are_visible(opened, table):
    page = opened(table())
    assert "⏎" in token(page, 1, 2).inner_text()
    assert token(page, 1, 3).inner_text().replace("\u200b", "") == "···"


def test_cards_are_sorted_by_kl_and_otherwise(opened, table):
    page = opened(table())
    assert titles(page) == ["Completion 2", "Completion 3", "Completion 1"]
    for value, expected in (("reward", [2, 3, 1]), ("length", [2, 1, 3]), ("order", [1, 2, 3]), ("max", [2, 3, 1])):
        page.select_option("#sort", value)
        assert titles(page) == [f"Completion {n}" for n in expected]


def test_pointing_shows_both_distributions(opened, table):
    page = opened(table())
    token(page, 0, 1).hover()
    lists = page.locator("#panel .tops ol")
    assert lists.count() == 2
    assert page.locator("#panel-token").inner_text() == "“␣cat”"
    assert [row.split() for row in lists.nth(0).locator("li.taken").all_inner_texts()] == [["▸", "␣cat", "60.0%"]]
    assert [row.split() for row in lists.nth(1).locator("li.taken").all_inner_texts()] == [["▸", "␣cat", "90.0%"]]
    assert lists.nth(0).locator("li").count() >= 4
    assert "0.300 nats" in page.locator("#panel dl").inner_text()
    bar = lists.nth(0).locator(".taken rect.bar")
    assert float(bar.get_attribute("width")) == 60


def test_a_pinned_token_stays_until_escape(opened, table):
    page = opened(table())
    token(page, 0, 1).click()
    token(page, 0, 2).hover()
    assert page.locator("#panel-token").inner_text() == "“␣cat”"
    page.keyboard.press("Escape")
    assert page.locator("#panel-token").inner_text() == "No token yet"
    token(page, 2, 0).hover()
    assert page.locator("#panel-token").inner_text() == "“␣cat”"


def test_spans_of_another_tokenizer_are_shown_in_both_spellings(opened, table):
    whole = table()
    first, *others = whole.completions
    spans = (Span(0, 1, "the", "the", True, False), Span(1, 3, " cat |  sat", " c | at |  sat", False, True))
    page = opened(replace(whole, completions=(replace(first, spans=spans), *others)))
    token = page.locator("article:has(#row-0) .t", has_text="sat")
    assert "sampled" in token.get_attribute("class")
    token.click()
    panel = page.locator("#panel-body").inner_text()
    assert "␣cat | ␣sat" in panel
    assert "␣c | at | ␣sat" in panel
    assert "partly sampled; charged for another spelling" in panel
    page.locator("article:has(#row-0) .t", has_text="the").click()
    assert "partly sampled" not in page.locator("#panel-body").inner_text()


def test_search_shows_what_fits_and_highlights_across_tokens(opened, table):
    page = opened(table())
    page.keyboard.press("/")
    page.keyboard.type("CAT SA")
    wait(page, "document.querySelectorAll('article:not([hidden])').length === 2")
    assert titles(page) == ["Completion 3", "Completion 1"]
    assert page.locator("article:has(#row-0) .t.hit").all_text_contents() == [" cat", " sat"]
    assert page.locator("#shown").inner_text().startswith("2 of 3 completions shown")
    page.fill("#search", "first PROMPT")
    wait(page, "document.querySelectorAll('article:not([hidden])').length === 1")
    assert page.locator("mark").all_text_contents() == ["first prompt"]
    page.fill("#search", "<script>")
    wait(page, "document.querySelector('article:not([hidden]) h3').textContent === 'Completion 2'")
    page.fill("#search", "not there")
    page.wait_for_selector("text=No completion fits")
    assert titles(page) == []


def test_threshold_and_worst_tokens(opened, table):
    page = opened(table(copies=1))
    page.locator("#threshold").fill("1000")  # the highest KL of all
    wait(page, "document.querySelectorAll('#list .t.marked').length === 1")
    assert token(page, 1, 1).get_attribute("class").split()[1:] == ["k5", "marked"]
    page.select_option("#show", "worst")
    wait(page, "document.querySelectorAll('article:not([hidden])').length === 1")
    page.locator("#threshold").fill("0")
    wait(page, "document.querySelectorAll('article:not([hidden])').length === 3")


def test_two_changes_at_once_are_both_made(opened, table):
    page = opened(table())
    page.fill("#search", "cat")
    page.evaluate(
        "(() => { const search = document.getElementById('search'), show = document.getElementById('show');"
        "search.value = ''; search.dispatchEvent(new Event('input'));"
        "show.value = 'worst'; show.dispatchEvent(new Event('change')); })()"
    )
    wait(page, "document.querySelectorAll('.gap').length > 0")
    assert page.locator(".t.hit, mark").count() == 0


def test_the_keyboard_alone_reaches_everything(opened, table):
    page = opened(table())
    page.focus("#help-button")
    page.keyboard.press("Tab")
    assert focused(page) == (1, 0)  # the first card's first token
    page.keyboard.press("ArrowRight")
    assert focused(page) == (1, 1)
    assert "KL 4.00" in page.locator("#said").inner_text()
    assert page.locator("#said").get_attribute("aria-live") == "polite"
    assert token(page, 1, 1).get_attribute("aria-label").endswith("KL 4.00, marked")
    page.keyboard.press("End")
    assert focused(page) == (1, 4)
    page.keyboard.press("ArrowUp")
    assert focused(page)[1] < 4  # the newline lies between
    page.keyboard.press("Home")
    page.keyboard.press("n")
    assert focused(page) == (1, 1)
    page.keyboard.press("Enter")
    assert "pinned" in page.locator("#panel").get_attribute("class")
    page.keyboard.press("Escape")
    assert "pinned" not in page.locator("#panel").get_attribute("class")
    assert focused(page) == (1, 1)
    page.keyboard.press("Tab")
    assert focused(page) == (2, 0)
    page.keyboard.press("Shift+Tab")
    assert focused(page) == (1, 1)  # where one was
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "help-button"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_focus_can_be_seen(opened, table):
    page = opened(table())
    page.focus("#help-button")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2


def test_kl_is_readable_without_colour(opened, table):
    page = opened(table())
    lines = page.evaluate(
        "[...document.querySelectorAll('#legend .t:not(.marked)')].map((n) => { const s = getComputedStyle(n);"
        "return [s.textDecorationLine, s.textDecorationStyle, s.textDecorationThickness].join(' '); })"
    )
    assert len(set(lines)) == 6
    page.check("#numbers")
    shown = page.evaluate(
        "getComputedStyle(document.querySelector('#row-1 ~ .lanes [data-i=\"1\"]'), '::after').content"
    )
    assert shown == '"4.0"'


@pytest.mark.parametrize("dark", [False, True])
def test_text_keeps_its_contrast_on_every_colour(opened, table, dark):
    page = opened(table(), dark=dark)
    pairs = page.evaluate(
        "[...document.querySelectorAll('#legend .t')].map((n) => { const s = getComputedStyle(n);"
        "const back = s.backgroundColor === 'rgba(0, 0, 0, 0)' ? getComputedStyle(document.body).backgroundColor"
        " : s.backgroundColor; return [s.color, back].map((c) => c.match(/\\d+/g).slice(0, 3).map(Number)); })"
    )

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) > 4.5


@pytest.mark.parametrize("two", [False, True])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened, table, two):
    page = opened(table(two=two, title="a/very/long/path/" * 6), width=390, height=844, phone=True)
    fits = "document.documentElement.scrollWidth <= 390"
    assert page.evaluate(fits)
    page.locator("article:has(#row-2)").scroll_into_view_if_needed()  # tokens are drawn when they come near
    node = token(page, 2, 3)
    node.scroll_into_view_if_needed()
    node.tap()
    panel = page.locator("#panel")
    assert panel.is_visible()
    assert page.evaluate(fits)
    assert node.bounding_box()["y"] + node.bounding_box()["height"] <= panel.bounding_box()["y"]  # not covered
    page.locator("#close").tap()
    assert not panel.is_visible()


def test_two_checkpoints_side_by_side(opened, table):
    page = opened(table(two=True))
    boxes = [page.locator("article:has(#row-0) .tokens").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    token(page, 1, 1).hover()
    assert page.locator("#panel .tops h3").all_inner_texts() == ["Student A", "Teacher", "Student B"]
    assert "same" in token(page, 1, 1, lane=1).get_attribute("class")
    assert "A: KL(student ‖ teacher)\n4.00 nats" in page.locator("#panel dl").inner_text()
    assert "B: KL(student ‖ teacher)\n2.00 nats" in page.locator("#panel dl").inner_text()
    row = page.locator("#summary tr", has_text="KL(student ‖ teacher)").first
    assert row.locator("td").all_inner_texts() == ["0.600", "0.300"]


def test_a_large_report_draws_what_can_be_seen(opened, table):
    base = table()
    long = [
        type(row)(
            **{
                **vars(row),
                "ids": row.ids * 50,
                "texts": row.texts * 50,
                "teacher": type(row.teacher)(**{name: value * 50 for name, value in vars(row.teacher).items()}),
                "views": tuple(type(v)(**{name: value * 50 for name, value in vars(v).items()}) for v in row.views),
            }
        )
        for row in base.completions
    ]
    big = type(base)(**{**vars(base), "completions": tuple((long * 67)[:200])})  # 200 completions of 200 tokens
    page = opened(big)
    assert page.locator("#list .t").count() < 10_000  # of 40,000
    page.evaluate(
        "new Promise((done) => { const box = document.getElementById('threshold');"
        "box.value = 100; box.dispatchEvent(new Event('input'));"
        "requestAnimationFrame(() => requestAnimationFrame(() => done(0))); })"
    )
    assert page.locator("#list .t").count() < 10_000  # and as few when all tokens are marked anew
    page.locator("article").last.scroll_into_view_if_needed()
    wait(page, "document.querySelector('#list').lastElementChild.querySelector('.t') !== null")
