# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of the server in a headless Chromium."""

import os
import shutil

import pytest

from .serving import TOKENS, running_server, token_hashes

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


def test_a_person_chats_undoes_forks_and_sees_the_sizes(browser):
    with running_server(tokens=token_hashes()) as (url, _):
        expect = pytest.importorskip("playwright.sync_api").expect
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.fill("#token", TOKENS["ann"])
        page.press("#token", "Tab")
        expect(page.locator("#memory-bytes")).to_have_text("41 kB")

        def say(text):
            page.fill("#text", text)
            page.press("#text", "Enter")
            expect(page.locator("#send")).to_have_text("Send", timeout=30_000)
            return page.locator(".turn .answer").last.inner_text()

        assert "Mochi" in say("My dog is called Mochi.")
        first_size = page.inner_text("#cache-bytes")
        assert "Lisbon" in say("I live in Lisbon.")
        assert page.inner_text("#cache-bytes") != first_size and page.inner_text("#memory-bytes") == "41 kB"
        assert page.locator("canvas").count() == 2
        assert "Mochi" in say("What is my dog called?")
        # back to the beginning, and another branch beside the first
        for _ in range(3):
            page.click("#undo")
        assert page.locator(".turn").count() == 0
        assert "Mochi" not in say("What is my dog called?")
        # a click goes to a turn of the first branch, with its memory
        page.click("text=I live in Lisbon.")
        assert page.locator(".turn").count() == 2
        assert "Lisbon" in say("Where do I live?")
        assert page.locator("#tree li").count() == 6
        if path := os.environ.get("RXT_SCREENSHOT"):
            page.screenshot(path=path)
        # a text that is markup is shown as it is
        say("<img src=x onerror=alert(1)>")
        assert page.locator("#turns img").count() == 0
        page.fill("#token", "wrong")
        page.press("#token", "Tab")
        assert "token" in say("Hello")
        assert problems == []
