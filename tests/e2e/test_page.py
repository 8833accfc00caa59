"""The console in a real browser, beside the running stack: what people see, and what it does."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from services.console.observe import Snapshot
from services.core.registry import Registry
from services.core.stackfile import read_stack
from tests.browser import chromium
from tests.e2e.conftest import HISTORY_EVENTS, Running, replay

TIMEOUT_MS = 120_000  # a browser on two cores beside Ray
SERIOUS = ("serious", "critical")
expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser(learned: Running) -> Iterator[Browser]:
    if "stream.student.ndcg@10" not in learned.look().metrics:  # these tests are run alone
        replay(learned, "--skip", str(HISTORY_EVENTS), "--events", "500", "--rate", "200")
    with chromium() as started:
        yield started


@pytest.fixture
def errors() -> list[str]:
    """What the browser complained of, content that the CSP forbids included."""
    return []


@pytest.fixture
def page(browser: Browser, learned: Running, errors: list[str]) -> Iterator[Page]:
    """The page, live."""
    page = opened(browser, learned, errors)
    yield page
    page.context.close()
    assert errors == []


def opened(browser: Browser, running: Running, errors: list[str], **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(TIMEOUT_MS)

    def said(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("console", said)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(running.settings.console_url)
    expect(page.locator("#link-text")).to_have_text("live")
    expect(page.locator("#serves b")).to_contain_text("student")
    return page


def test_what_the_page_says_is_what_the_api_says(page: Page, learned: Running) -> None:
    def same() -> bool:
        """Both of one look; another one may come in between."""
        seen = page.locator("body").get_attribute("data-at")
        shown = {
            "answers": page.locator("#tile-answers .also").inner_text(),
            "events": page.locator("#tile-events .also").inner_text(),
            "dead": page.locator("#tile-dead .value").inner_text(),
            "student": page.locator(".flow .model strong").inner_text(),
            "teacher": page.locator(".flow .model span").inner_text(),
            "ndcg": page.locator('tr[data-model="student"] td').nth(1).inner_text(),
            "items": page.locator("#catalog dd").first.inner_text().splitlines()[0],
        }
        api = httpx.get(f"{learned.settings.console_url}/api/status", timeout=60).json()
        if seen != str(api["at_ms"]) or page.locator("body").get_attribute("data-at") != seen:
            return False
        assert shown == {
            "answers": f"{api['answers']:,} in all",
            "events": f"{api['events_accepted']:,} in all",
            "dead": f"{api['events_dead']:,}",
            "student": f"Student {api['student_version']}",
            "teacher": f"taught by teacher {api['teacher_version']}",
            "ndcg": f"{api['metrics']['stream.student.ndcg@10']:.4f}".removeprefix("0"),
            "items": f"{api['items']:,}",
        }
        assert api["quality"]["student"] > 0 and api["retention"] > 0
        assert Snapshot.__dataclass_fields__.keys() <= api.keys()
        return True

    learned.wait_until(same, "one look, seen on the page and by the API")
    assert all(page.locator(f"#{chart} canvas").count() for chart in ("quality-chart", "tiles"))
    assert page.locator("#timeline .promoted").count() > 1


def test_a_click_changes_that_users_answer(page: Page) -> None:
    page.fill("#user", "somebody nobody has met")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#try-news")).to_contain_text("trending")
    before = page.locator("#list-student li .item span").all_inner_texts()
    assert before == page.locator("#list-trending li .item span").all_inner_texts()
    page.locator("#list-student li .item").first.click()
    expect(page.locator("#try-news")).to_contain_text("the answer that knows it came after")
    assert re.search(r"came after [\d.]+ m?s\.", page.locator("#try-news").inner_text())
    after = page.locator("#list-student li .item span").all_inner_texts()
    assert after != before and before[0] not in after
    expect(page.locator("#recent-events .chip.fresh")).to_contain_text(before[0])
    expect(page.locator("#list-teacher li")).to_have_count(10)
    taught = page.locator("#list-teacher li .item span").all_inner_texts()
    assert before[0] not in taught and len(set(taught)) == 10


def test_an_anonymous_session_is_answered_by_what_it_saw(page: Page) -> None:
    page.get_by_role("button", name="Anonymous session").click()
    expect(page.locator("#try-news")).to_contain_text("nothing seen yet")
    before = page.locator("#list-student li .item span").all_inner_texts()
    page.locator("#list-student li .item").nth(1).click()
    expect(page.locator("#try-news")).to_contain_text("The answer changed in")
    assert before[1] not in page.locator("#list-student li .item span").all_inner_texts()
    assert page.locator("#list-student .moved.new, #list-student .moved.up").count()


def test_roll_back_asks_first_and_release_ends_it(page: Page, learned: Running) -> None:
    registry = Registry(learned.settings.registry)
    page.get_by_role("button", name="Roll back …").click()
    page.get_by_role("button", name="Cancel").click()
    assert registry.held("student") is None
    page.get_by_role("button", name="Roll back …").click()
    said = page.locator("#confirm-yes").inner_text()
    page.locator("#confirm-yes").click()
    expect(page.locator("#serves")).to_contain_text("held by hand")
    held = registry.held("student")
    assert said == f"Roll back to {held}"
    expect(page.locator("#serves b")).to_have_text(f"student {held}")
    learned.wait_until(
        lambda: learned.client.recommend(user_id=None)["model_version"] == held, "it answers"
    )
    page.get_by_role("button", name="Release …").click()
    page.locator("#confirm-yes").click()
    expect(page.locator("#serves")).not_to_contain_text("held by hand")
    assert registry.held("student") is None


@pytest.mark.parametrize("look", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_anybody(
    browser: Browser, learned: Running, errors: list[str], look: str
) -> None:
    # On a phone in the dark; axe itself is what the page's CSP would forbid.
    size = {"width": 390, "height": 844} if look == "dark" else {"width": 1280, "height": 900}
    options: dict[str, Any] = {"color_scheme": look, "viewport": size, "bypass_csp": True}
    page = opened(browser, learned, errors, **options)
    page.get_by_role("button", name="Anonymous session").click()
    expect(page.locator("#list-student li")).to_have_count(10)
    found = Axe().run(page).response["violations"]
    assert [one for one in found if one["impact"] in SERIOUS] == []
    width = page.locator("html").evaluate("html => html.scrollWidth")
    assert width <= size["width"], "it would scroll sideways"
    page.context.close()
    assert errors == []


def test_a_page_says_when_it_is_cut_off_and_recovers(
    browser: Browser, learned: Running, errors: list[str]
) -> None:
    page = opened(browser, learned, errors)
    stack = read_stack(learned.settings)
    assert stack is not None and errors == []
    console = psutil.Process(int(stack["processes"]["console"]["pid"]))
    started_ms = 1000 * console.create_time()
    console.suspend()  # it hangs: nothing is closed, nothing comes
    expect(page.get_by_role("alert")).to_contain_text("Cut off")
    console.kill()  # and dies: the supervisor starts another
    expect(page.locator("#link-text")).to_have_text("live")
    expect(page.get_by_role("alert")).to_be_hidden()
    # The past is there, from before.
    past = httpx.get(f"{learned.settings.console_url}/api/history?seconds=900", timeout=60).json()
    assert past["at"][0] < started_ms + 60_000
    page.context.close()
    assert [text for text in errors if "net::ERR" not in text] == []
