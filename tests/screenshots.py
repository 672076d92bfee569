"""Pictures of the page, from a real server under a real load: `make screenshots`.

Usage:
  tests.screenshots [--minutes N] [--all FOLDER]

Options:
  --minutes N   How long the pool works before the first picture [default: 10].
  --all FOLDER  Put there every view too, in dark and light, wide and narrow, with few models, none and thirty.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from docopt import docopt
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.reranker import reranker_folder
from benchmarks.servers import CACHE
from benchmarks.texts import mixed, model_folder, short
from tests.live.browser import CHROMIUM, QUIET
from tests.live.conftest import Server, fake
from tests.live.test_page import TABS, given

DOCS = Path(__file__).parents[1] / "docs"
SIZES = {"wide": {"width": 1440, "height": 900}, "narrow": {"width": 390, "height": 844}}
PATIENT_MS = 60_000
TEXTS = """The cat sleeps on the sofa.
A kitten naps on the couch.
Interest rates went up again.
The central bank raised its rate.
How do I bake sourdough bread?"""
VARIANTS = 100  # of a text, so that the cache does not know all of them
STRANGE = "שלום עולם, זה טקסט מימין לשמאל\n👩‍👩‍👧‍👦 👍🏽 emoji 🎉\nمرحبا بالعالم\n" + "word " * 300  # noqa: RUF001


def local(model: str, alias: str, path: Path, **config: Any) -> dict[str, Any]:
    return {"model": model, "alias": alias, "driver": {"type": "local_st", "config": {"path": str(path), **config}}}


def pool() -> list[dict[str, Any]]:
    prompts = {"query": "query: ", "passage": "passage: "}
    return [
        local("sentence-transformers/all-MiniLM-L6-v2", "minilm-l6", model_folder(), prompts=prompts),
        local("team/minilm-reranker", "reranker", reranker_folder(CACHE)),
        {"model": "team/topics", "driver": {"type": "fake", "config": {"task": "classify"}}},
        local("team/next-embedder", "next", Path("/models/next-embedder")),
        {"model": "archive/last-year", "enabled": False, "driver": {"type": "fake"}},
    ]


def many() -> list[dict[str, Any]]:
    names = [f"organisation-with-a-long-name/a-model-with-a-very-long-name-{i}-multilingual-v{i}.0" for i in range(28)]
    return [fake(name, alias=f"alias-{i}" if i % 3 else None) for i, name in enumerate(names)] + [
        fake("broken/model", fault="load"), {"model": "switched/off", "enabled": False, "driver": {"type": "fake"}},
        *(fake(f"a/{task}", task=task) for task in ("rerank", "classify", "sparse", "multivector")),
    ]  # fmt: skip


def batches(server: Server) -> None:
    """One that ends well but for a line, where there is a model, and one that has a fault."""
    for model in [one["model"] for one in server.get("/status").json()["models"]][:1]:
        texts = [*short(200), 7]
        bodies = [{"model": model, "input": text} for text in texts]
        lines = [
            {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": b} for i, b in enumerate(bodies)
        ]
        given(server, "".join(json.dumps(line) + "\n" for line in lines).encode())
    given(server, b'{"custom_id": "a"}\n')


def main() -> None:
    arguments = docopt(__doc__)
    everything = Path(arguments["--all"]) if arguments["--all"] else None
    with sync_playwright() as playwright, serving(*pool()) as server:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        with working(server):
            time.sleep(60 * float(arguments["--minutes"]))
            pictures_of_docs(browser, server)
            if everything:
                all_views(browser, server, everything, "few")
        if everything:
            for name, models in {"none": [], "many": many()}.items():
                with serving(*models) as other:
                    all_views(browser, other, everything, name)
        browser.close()


@contextlib.contextmanager
def serving(*models: dict[str, Any]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"EMBEDPOOL_PATHS__CACHE_DIR": str(CACHE / "graphs"), "HF_HUB_OFFLINE": "1"})
        server.cli("init")
        server.write_pool(*models)
        server.start()
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def working(server: Server) -> Iterator[None]:
    """Clients that come and go."""
    over = threading.Event()
    texts, passages, began = short(1000), mixed(200), time.monotonic()

    def client(number: int) -> None:
        chance = random.Random(number)
        while not over.wait(chance.expovariate(1.2 + math.sin((time.monotonic() - began) / 45 + number / 2))):
            sampled = chance.sample(texts, chance.choice((1, 1, 1, 4, 16)))
            some = [f"{text} {chance.randrange(VARIANTS)}" for text in sampled]
            with contextlib.suppress(requests.RequestException):
                if number % 4:
                    server.embed("minilm-l6", some)
                else:
                    documents = chance.sample(passages, 10)
                    server.post("/rerank", {"model": "reranker", "query": some[0], "documents": documents})

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def opened(browser: Browser, server: Server, size: str, scheme: str, at: str) -> Page:
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(PATIENT_MS)
    page.goto(f"{server.url}/ui{at}")
    page.locator(".tiles, .play").first.wait_for()
    return page


def ask(page: Page, tab: str, text: str) -> None:
    page.locator(f"#tab-{tab}").click()
    button = page.locator("form.ask button.first")
    if button.count():
        page.locator("form.ask textarea").fill(text)
        button.click()
        page.locator("form.ask button.first:not([disabled])").wait_for()


def pictures_of_docs(browser: Browser, server: Server) -> None:
    page = opened(browser, server, "wide", "light", "#models")
    page.locator("button.name").first.click()
    page.locator(".chart canvas").first.wait_for()
    page.screenshot(path=DOCS / "page-models.png", full_page=True)
    page.close()
    page = opened(browser, server, "wide", "dark", "#playground")
    ask(page, "map", TEXTS)
    page.locator(".dot").first.focus()
    page.screenshot(path=DOCS / "page-playground.png", full_page=True)
    page.close()


def all_views(browser: Browser, server: Server, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    batches(server)
    for scheme in ("light", "dark"):
        for size in SIZES:
            page = opened(browser, server, size, scheme, "#models")
            if page.locator("button.name").count():
                page.locator("button.name").first.click()
                page.locator(".chart canvas").first.wait_for()
            page.screenshot(path=folder / f"{name}-models-{scheme}-{size}.png", full_page=True)
            page.get_by_role("button", name="Register a model").click()
            page.locator("form.register").wait_for()
            page.screenshot(path=folder / f"{name}-register-{scheme}-{size}.png", full_page=True)
            page.goto(f"{server.url}/ui#jobs")
            page.locator(".job").first.wait_for()
            page.screenshot(path=folder / f"{name}-jobs-{scheme}-{size}.png", full_page=True)
            page.goto(f"{server.url}/ui#log")
            page.locator("table.log").wait_for()
            page.screenshot(path=folder / f"{name}-log-{scheme}-{size}.png", full_page=True)
            page.goto(f"{server.url}/ui#playground")
            for tab in TABS:
                ask(page, tab, TEXTS if scheme == "light" else STRANGE)
                page.screenshot(path=folder / f"{name}-{tab}-{scheme}-{size}.png", full_page=True)
            page.close()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed")
    main()
