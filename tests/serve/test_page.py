"""The page: what it may load, and, where a browser is at hand (`make test-browser`), that it works in one."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.proposer import Proposer
from amphista.llm import LLM
from amphista.serve.app import PAGE, PAGE_FILES
from amphista.tree.learned import StepCosts
from amphista.tree.tune import Costs
from tests.serve.serving import KEYS, serving
from tests.talkative import talkative_target
from tests.tiny import shaken

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def test_it_loads_nothing_from_elsewhere_and_runs_nothing_inline(served):
    with served.client(None) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert page.headers["content-type"].startswith("text/html")
        assert client.get("/app.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/style.css").headers["content-type"].startswith("text/css")
    assert not re.search(r"<script(?![^>]*src=\")|\bon\w+=|style=|https?://", page.text)
    script = (PAGE / "app.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\.style\b", script)
    assert re.findall(r"https?://[^\"]*", script) == ["http://www.w3.org/2000/svg"]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def talking():
    """Heads and lookup, so that all colours can come."""
    target = talkative_target(end_bias=0.5)
    heads = shaken(Medusa(MedusaConfig(), target.spec, target.shared)).to(target.dtype)
    with serving(LLM(target, Proposer(heads, use_lookup=True), tree="12")) as served:
        served.server._service._costs = StepCosts(Costs([1.0, 1.1, 1.2]))  # as with `auto`
        yield served


@pytest.fixture(params=[1280, 400])
def page(browser, talking, request):
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    context.close()


def enter(page, talking, key=KEYS[0]):
    page.goto(talking.url)
    page.locator("#settings").evaluate("one => one.open = true")
    page.fill("#key", key)
    page.locator("#key").dispatch_event("change")
    page.wait_for_load_state("networkidle")
    page.problems.clear()  # that it had asked without a key


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page):
    page.wait_for_selector(".actions", timeout=30_000)


@pytest.mark.browser
def test_a_wrong_key_is_told_and_a_right_one_remembered(page, talking):
    enter(page, talking, "wrong")
    page.wait_for_selector("#error:not([hidden])")
    assert "API key" in page.inner_text("#error")
    enter(page, talking)
    page.get_by_text("tiny", exact=True).wait_for()
    assert page.is_hidden("#error")
    page.reload()
    page.get_by_text("tiny", exact=True).wait_for()
    assert page.evaluate("Object.keys(localStorage).length") == 0


@pytest.mark.browser
def test_an_answer_its_steps_and_plain_decoding(page, talking):
    enter(page, talking)
    page.fill("#max_tokens", "120")
    page.fill("#temperature", "1")
    page.fill("#seed", "1")  # of one's own: whether a short answer has drafts accepted is chance
    say(page, "Who are you?")
    ended(page)
    sources = page.eval_on_selector_all(".assistant .token", "all => [...new Set(all.map(one => one.classList[1]))]")
    assert "target" in sources and len(sources) > 1
    told = page.inner_text(".figures")
    assert all(what in told for what in ("tokens/s", "tokens a step", "1 request running", "a node costs"))
    step = page.locator(".assistant .step").nth(1)
    step.hover()
    assert page.inner_text("#step-text").startswith("Step 2:")
    assert page.locator("#step-tree svg g.node").count() > 1
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Same tokens: yes").wait_for()
    before = page.inner_text(".assistant .text >> nth=0")
    page.fill("#seed", "5")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector(".plain", state="detached")
    ended(page)
    assert page.inner_text(".assistant .text >> nth=0") != before
    assert page.problems == [], page.problems
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"


@pytest.mark.browser
def test_the_keyboard_is_enough(page, talking):
    enter(page, talking)
    page.fill("#max_tokens", "60")
    page.fill("#seed", "1")  # how many steps an answer takes is chance
    page.focus("#prompt")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    ended(page)
    page.locator(".assistant .step").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#step-text").startswith("Step 3:")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#step-text").startswith("Step 2:")


@pytest.mark.browser
def test_stop_ends_it_and_frees_its_rows(page, talking):
    enter(page, talking)
    page.fill("#max_tokens", "440")
    page.fill("#seed", "4")  # of a long answer
    slow, engine = talking.llm.engine.step, talking.llm.engine
    engine.step = lambda batch: (time.sleep(0.03), slow(batch))[1]
    try:
        say(page, "Go on for ever")
        page.wait_for_selector(".assistant .step:nth-child(3)", timeout=30_000)
        page.keyboard.press("Escape")
        ended(page)
    finally:
        del engine.step
    assert "stopped" in page.inner_text(".figures")
    page.wait_for_timeout(500)
    talking.check_idle()


@pytest.mark.browser
def test_hostile_text_stays_text(page, talking):
    enter(page, talking)
    page.fill("#schema", json.dumps({"const": HOSTILE}))
    page.fill("#max_tokens", "200")
    say(page, HOSTILE)
    ended(page)
    assert HOSTILE in page.inner_text(".user") and "onerror" in page.inner_text(".assistant .text")
    assert page.title() == "amphista" and page.locator("main img, main script").count() == 0
    assert page.locator(".assistant .token.form").count() > 3
    page.locator(".assistant .step").first.hover()
    assert page.title() == "amphista"


@pytest.mark.browser
def test_a_schema_that_is_none_is_said(page, talking):
    enter(page, talking)
    page.fill("#schema", "{")
    say(page, "x")
    assert "no JSON" in page.inner_text("#error") and page.input_value("#prompt") == "x"


def test_the_page_is_part_of_the_package():
    assert {file.name for file in Path(PAGE).iterdir()} == set(PAGE_FILES)
