"""The page in a real browser: what it shows, what it sends, and what it never does."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import requests
from playwright.sync_api import Browser, Download, Page, Request, Route, expect, sync_playwright

from embedpool.config.keys import id_of
from tests.live.browser import QUIET, axe_source, browser_path, needs_browser
from tests.live.conftest import Server, fake, wait_until

FEW = 4  # square roots that the browser itself may take; 4 texts have 32 for their cosines
TABS = ("vectors", "compare", "search", "map", "side", "sparse", "match", "rerank", "classify", "code")
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
WAIT_MS = 20_000
LIVE, LOG = re.compile(r"/live(\?|$)"), re.compile(r"/log\?")  # not the scripts of these names
PROMPTS = {"query": "query: ", "document": "this passage: "}
ANGRY = "<img src=x onerror=document.title='angry'>"
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=browser_path(), args=list(QUIET))
        yield found
        found.close()


class Visit:
    """A page that is open, what it complained of, and what it asked for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.asked: list[Request] = []
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("request", lambda one: self.asked.append(one))  # noqa: PLW0108  (it wants to write on what it calls)
        page.add_init_script(WATCH)

    def open(self, at: str = "") -> Page:
        self.page.goto(f"{self.url}/ui{at}")
        self.page.locator(".age").wait_for()
        return self.page

    def tab(self, name: str) -> None:
        self.page.locator(f"#tab-{name}").click()

    def run(self) -> None:
        """Press the button and wait for the answer."""
        self.page.locator("form.ask button.first").click()
        self.page.locator("form.ask button.first:not([disabled])").wait_for()

    def write(self, *lines: str) -> None:
        self.page.locator("form.ask textarea").fill("\n".join(lines))

    def require_calm(self) -> None:
        """No error, no violation of the policy, nothing asked of anybody else."""
        assert self.complaints == []
        assert self.page.evaluate("violations") == []
        elsewhere = [one.url for one in self.asked if not one.url.startswith((self.url, "data:", "blob:"))]
        assert elsewhere == []

    def use_key(self, key: str) -> None:
        self.page.locator("details.key summary").click()
        self.page.locator("details.key input[name=key]").fill(key)
        self.page.get_by_role("button", name="Use it").click()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Pages in contexts of their own; `options` are those of a context."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **options: Any) -> Visit:
            context = browser.new_context(**{"viewport": WIDE, **options})
            stack.callback(context.close)
            return Visit(context.new_page(), url)

        yield make


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    server = Server(tmp_path_factory.mktemp("served"), {})
    server.environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDPOOL_")}
    server.cli("init")
    server.write_pool(
        fake("org/embedder", alias="em", max_seq_length=8, prompts=PROMPTS),
        fake("reranker", task="rerank"),
        fake("classifier", task="classify"),
        fake("second"),
        fake("splade", task="sparse"),
        fake("colbert", task="multivector"),
    )
    server.start()
    server.wait_ready()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [
        (WIDE, "light"),
        (NARROW, "dark"),
        pytest.param(WIDE, "dark", marks=pytest.mark.long),
        pytest.param(NARROW, "light", marks=pytest.mark.long),
    ],
)
def test_every_view_is_calm_and_accessible(
    served: Server, visit: Callable[..., Visit], scheme: str, viewport: Any
) -> None:
    """No complaint, nothing from elsewhere, nothing beyond the edge, and nothing serious that axe finds."""
    seen = visit(served.url, viewport=viewport, color_scheme=scheme)
    page = seen.open()
    page.locator("button.name").first.click()
    page.locator(".chart canvas").first.wait_for()
    page.get_by_role("button", name="Register a model").click()
    page.locator("form.register").wait_for()
    found = {"models": look(page)}
    page.goto(f"{served.url}/ui#log")
    page.locator("table.log").wait_for()
    found["log"] = look(page)
    given(served, b"{no json\n")
    page.goto(f"{served.url}/ui#jobs")
    page.locator(".job .bad").first.wait_for()
    found["jobs"] = look(page)
    page.goto(f"{served.url}/ui#playground")
    for name in TABS:
        seen.tab(name)
        if name != "code":
            seen.run()
        found[name] = look(page)
    assert {view: wrong for view, wrong in found.items() if wrong} == {}
    seen.require_calm()


def given(server: Server, content: bytes) -> str:
    """A batch of this file."""
    form = {"files": {"file": ("a.jsonl", content)}, "data": {"purpose": "batch"}}
    file_id = requests.post(f"{server.url}/v1/files", timeout=WAIT_MS / 1000, **form).json()["id"]
    batch = {"input_file_id": file_id, "endpoint": "/v1/embeddings"}
    found: str = server.post("/v1/batches", batch).json()["id"]
    return found


def look(page: Page) -> list[str]:
    """What is wrong with what is seen now."""
    wrong = []
    if page.evaluate("document.documentElement.scrollWidth") > page.viewport_size["width"]:  # type: ignore[index]
        wrong.append("it is wider than the window")
    if axe := axe_source():
        page.evaluate(axe)
        violations = page.evaluate("axe.run().then((found) => found.violations)")
        wrong += [
            f"{one['id']}: {[node['html'] for node in one['nodes']][:3]}"
            for one in violations
            if one["impact"] in ("serious", "critical")
        ]
    return wrong


def test_numbers_are_those_of_the_metrics(served: Server, visit: Callable[..., Visit]) -> None:
    """Requests, texts and tokens of a model, as /metrics counts them."""
    for texts in (["a"], ["b c", "d"], ["e f g", "h", "i"]):
        served.vectors("em", texts)
    page = visit(served.url).open()
    page.locator("tr.model", has_text="org/embedder").locator("button.name").click()
    told = {}
    for line in served.get("/metrics").text.splitlines():
        for name in ("requests", "items", "tokens"):
            if line.startswith(f'embedpool_{name}_total{{model="org/embedder"'):
                told[name] = round(float(line.split()[-1]))
    expect(page.locator("tr.details")).to_contain_text(
        f"{told['requests']:,} requests, {told['items']:,} texts, {told['tokens']:,} tokens"
    )


def test_cosines_are_those_of_numpy(served: Server, visit: Callable[..., Visit]) -> None:
    """In the cells of the comparison, and in the order of the search."""
    texts = ["one", "two words", "three whole words", "four"]
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.write(*texts)
    seen.tab("compare")
    seen.run()
    vectors = np.array(served.vectors("em", texts, normalize=True))
    with roots(page, at_most=FEW):
        redraw(page)
        page.get_by_label("stretch the colours").check()
    cells = [float(cell) for cell in page.locator("table.heat tbody td").all_text_contents()]
    assert cells == pytest.approx((vectors @ vectors.T).ravel().tolist(), abs=0.00501)
    seen.tab("search")
    page.locator("input.query").fill("a query")
    seen.run()
    query = np.array(served.vectors("em", ["a query"], normalize=True, input_type="query"))[0]
    documents = np.array(served.vectors("em", texts, normalize=True, input_type="document"))
    scores = [float(one) for one in page.locator(".ranked .score").all_text_contents()]
    assert scores == pytest.approx(sorted(documents @ query, reverse=True), abs=1e-4)
    expect(page.locator(".told")).to_contain_text("prompt of the query query: , of the lines this passage:")
    seen.tab("side")
    page.get_by_label("Beside it").select_option("second")
    seen.run()
    expect(page.locator(".told").nth(1)).to_contain_text("prompt of the query query: , of the lines this passage:")
    expect(page.locator(".told").nth(2)).to_contain_text("prompt of the query none, of the lines none")
    seen.tab("map")
    seen.run()
    for name in ("code", "compare", "vectors", "map"):  # whose texts are embedded alike
        seen.tab(name)
    with roots(page, at_most=FEW):
        redraw(page)
    with roots(page, at_most=2 * (4 + 3) + FEW):  # of the nearest lines alone
        page.locator(".dot:not(.chosen)").last.hover()
        expect(page.locator("svg .dot").last).to_have_class("dot chosen")


@contextlib.contextmanager
def roots(page: Page, at_most: int) -> Iterator[None]:
    """Meanwhile no more square roots are taken: what is shown is not computed anew whenever the page is drawn."""
    page.evaluate("window.sqrt ??= Math.sqrt; window.roots = 0; Math.sqrt = (x) => { roots += 1; return sqrt(x); }")
    yield
    assert page.evaluate("roots") <= at_most


def redraw(page: Page) -> None:
    """As every poll does."""
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Go on").click()


def test_sparse_rows_and_vectors_of_tokens(served: Server, visit: Callable[..., Visit]) -> None:
    """The page's numbers are the server's: weights by token, and scores of a query against lines."""
    texts = ["one two two", "three"]
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.write(*texts)
    seen.tab("sparse")
    seen.run()
    cards = page.locator("section.result article").all()
    rows = served.post("/embed", {"model": "splade", "texts": texts, "options": {"tokens": True}}).json()["vectors"]
    for card, row in zip(cards, rows, strict=True):
        shown = [line.inner_text().split() for line in card.locator("li").all()]
        wanted = sorted(zip(row["values"], row["tokens"], strict=True), key=lambda pair: -pair[0])
        assert [(float(value), token) for value, token in shown] == wanted
    seen.tab("match")
    page.locator("form.ask .query").fill("one two")
    seen.run()
    body = {"model": "colbert", "query": "one two", "documents": texts}
    ranked = served.post("/rerank", body).json()["results"]
    found = [card.inner_text() for card in page.locator("section.result article").all()]
    for text, entry in zip(found, ranked, strict=True):
        assert texts[entry["index"]] in text
        assert f"score {entry['score']:.4f}" in text
    assert page.locator(".strip span").count() == 5 + 3
    seen.tab("rerank")
    page.locator("form.ask select").first.select_option(label="colbert (384)")
    seen.run()
    scores = [float(one.inner_text()) for one in page.locator(".ranked .score").all()]
    assert scores == pytest.approx([entry["score"] for entry in ranked], abs=1e-3)
    seen.require_calm()


def test_the_mathematics(served: Server, visit: Callable[..., Visit]) -> None:
    """The map's axes are numpy's, up to a sign; what is kept of a text is what the tokenizer keeps."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((12, 40))
    page = visit(served.url).open()
    script = f"(vectors) => import('{served.url}/ui/maths.js').then(({{ principal }}) => principal(vectors))"
    found = page.evaluate(script, vectors.tolist())
    centred = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found["points"]), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    np.testing.assert_allclose(found["shares"], (s**2 / (s**2).sum())[:2], atol=1e-6)
    for few in (vectors[:2], np.ones((5, 4))):
        assert page.evaluate(script, few.tolist())["reason"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_cut_is_shown(served: Server, visit: Callable[..., Visit], side: str) -> None:
    """Token by token, where /tokenize says; the tokens that stay give the same vector alone."""
    words = [f"word{i}" for i in range(20)]
    seen = visit(served.url)
    page = seen.open("#playground")
    page.locator("details.options summary").click()
    page.get_by_label("Texts that are too long").select_option(side)
    page.get_by_label("What the texts are for").select_option("document")
    seen.write(" ".join(words), "short")
    seen.run()
    first, second = page.locator("article.vector").all()
    kept = first.locator(".token:not(.lost):not(.special)").all_text_contents()
    prompt = ["this", "passage:"]
    assert kept == [*prompt, *(words[:4] if side == "right" else words[-4:])]
    assert first.locator(".token.prompt").all_text_contents() == prompt
    expect(first).to_contain_text(f"16 tokens at the {'end' if side == 'right' else 'beginning'} are lost")
    expect(page.locator(".told")).to_contain_text("prompt this passage:")
    assert second.locator(".lost").count() == 0
    whole = served.vectors("em", [" ".join(words)], truncate=side, input_type="document")
    np.testing.assert_allclose(served.vectors("em", [" ".join(kept)]), whole)


def test_files_hold_the_vectors(served: Server, visit: Callable[..., Visit], tmp_path: Path) -> None:
    """As numpy reads them, and line by line."""
    texts = ["one", "two words"]
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.write(*texts)
    seen.run()
    saved = {}
    for name in ("npy", "jsonl"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f".{name}").click()
        saved[name] = tmp_path / name
        download.value.save_as(saved[name])
    expected = served.vectors("em", texts)
    np.testing.assert_allclose(np.load(saved["npy"]), expected, atol=1e-6)
    lines = [json.loads(line) for line in saved["jsonl"].read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    np.testing.assert_allclose([line["vector"] for line in lines], expected, atol=1e-6)
    downloads: list[Download] = []
    page.on("download", lambda one: downloads.append(one))  # noqa: PLW0108  (as above)
    page.get_by_role("button", name=".tsv").click()
    while len(downloads) < 2:
        page.wait_for_event("download")
    for download in downloads:
        download.save_as(tmp_path / download.suggested_filename)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "vectors.tsv", delimiter="\t"), expected, atol=1e-6)
    assert (tmp_path / "texts.tsv").read_text() == "one\ntwo words\n"


# Runs programs, each a module of its own, and prints what each calls `name`.
EACH = """
import json, sys, numpy
for code in json.load(sys.stdin):
    found = {}
    exec(code, found)
    print(json.dumps(numpy.asarray(found["vectors"]).tolist()))
"""
APIS = ["embedpool", "OpenAI", "text-embeddings-inference", "Cohere", "Jina", "Voyage", "infinity", "Ollama"]
LIBRARIES = {"embedpool", "openai", "cohere", "huggingface_hub", "ollama", "requests"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_type": "query", "dimensions": 100, "truncate": "left", "normalize": False},
        {"prompt_name": "document"},
    ],
    ids=["none", "many", "a prompt"],
)
def test_the_code_does_what_it_says(served: Server, visit: Callable[..., Visit], options: dict[str, Any]) -> None:
    """Every snippet of every API runs and gives the vectors that /embed gives for the same texts, which hold quotation
    marks of each kind, and options; unless its comment says that the library has no way to say one of these."""
    texts = ['it\'s "true"', "null \\ and $HOME", "one two three four five six seven eight nine"]
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.write(*texts)
    choose(page, options)
    seen.tab("code")
    expected = served.vectors("em", texts, **options)
    assert page.locator("label.api option").all_text_contents() == APIS
    told: dict[str, dict[str, str]] = {}
    for api in APIS:
        page.locator("label.api select").select_option(api)
        sections = page.locator("section.code").all()
        told[api] = {one.locator("h3").inner_text(): one.locator("pre").inner_text() for one in sections}
        body = json.loads(run("bash", "-c", told[api]["curl"]))
        np.testing.assert_allclose(vectors_in(body), expected, atol=1e-6, err_msg=f"{api}: curl")
    python = {(api, title): code for api in APIS for title, code in told[api].items() if title.startswith("Python")}
    assert {title.removeprefix("Python: ") for _, title in python} == LIBRARIES
    given = json.dumps(list(python.values()))
    said = run("env", "-u", "HF_HUB_OFFLINE", sys.executable, "-c", EACH, given=given).splitlines()
    for (where, code), line in zip(python.items(), said, strict=True):
        differs = not np.allclose(json.loads(line), expected, atol=1e-6)
        assert differs == ("its vectors are others" in code), where
    if shutil.which("node"):
        snippets = [f"{{ {told[api]['JavaScript']}\nconsole.log(JSON.stringify(vectors)); }}" for api in APIS]
        said = run("node", "--input-type=module", "-e", "\n".join(snippets)).splitlines()
        for api, line in zip(APIS, said, strict=True):
            np.testing.assert_allclose(json.loads(line), expected, atol=1e-6, err_msg=f"{api}: JavaScript")


def choose(page: Page, options: dict[str, Any]) -> None:
    """Set them in the form of the playground."""
    page.locator("details.options summary").click()
    labels = {
        "input_type": "What the texts are for", "truncate": "Texts that are too long", "normalize": "Length 1",
        "prompt_name": "Prompt",
    }  # fmt: skip
    for name, value in options.items():
        if name == "dimensions":
            page.get_by_label("Dimensions").fill(str(value))
        else:
            page.get_by_label(labels[name]).select_option(str(value).lower())


def vectors_in(body: Any) -> Any:
    """Wherever an API has them."""
    if isinstance(body, list):
        return body
    found = body.get("vectors") or body.get("embeddings") or [one["embedding"] for one in body.get("data")]
    return found["float"] if isinstance(found, dict) else found


@pytest.mark.parametrize("tab", ["sparse", "match", "rerank", "classify"])
def test_the_code_of_other_kinds_runs(served: Server, visit: Callable[..., Visit], tab: str) -> None:
    """As curl, in every API that has them: nothing is ignored or refused."""
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.tab(tab)
    if tab == "sparse":
        choose(page, {"input_type": "query", "truncate": "left"})
    seen.tab("code")
    apis = page.locator("label.api option").all_text_contents()
    assert apis[:2] == APIS[:2:2] + APIS[2:3]
    for api in apis:
        page.locator("label.api select").select_option(api)
        code = page.locator("section.code pre").first.inner_text()
        head, _, body = run("bash", "-c", code.replace("curl -s", "curl -si", 1)).partition("\n\n")
        assert "200 OK" in head.splitlines()[0], f"{api}: {body}"
        assert "X-Embedpool-Ignored" not in head
        assert json.loads(body)


def run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jobs(server: Server, visit: Callable[..., Visit], tmp_path: Path) -> None:
    """How far a batch is, its failures, its files; one is cancelled by a click, and keeps what is done."""
    server.write_pool(fake("m", delay_ms_per_text=10, fault="raise", fault_text="bad"))
    server.start()
    server.wait_ready()
    texts = [*(f"text {i}" for i in range(300)), "bad", *(f"more {i}" for i in range(2000))]
    lines = [
        {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": text}}
        for i, text in enumerate(texts)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    seen = visit(server.url)
    page = seen.open("#jobs")
    expect(page.locator(".card.empty")).to_contain_text("embedpool batch create", timeout=WAIT_MS)
    batch_id = given(server, content)
    job = page.locator(f".job[aria-label='Batch {batch_id}']")
    expect(job).to_contain_text("requests/s", timeout=WAIT_MS)
    expect(job).to_contain_text("of 2,301 requests")
    expect(job).to_contain_text("left")
    expect(job).to_contain_text("1 failed", timeout=WAIT_MS)
    job.get_by_role("button", name="Cancel").click()
    expect(job.locator(".state")).to_contain_text("cancelled", timeout=WAIT_MS)
    counts = server.get(f"/v1/batches/{batch_id}").json()["request_counts"]
    for title, number in (("Results", counts["completed"]), ("Failures", counts["failed"])):
        with page.expect_download() as waiting:
            job.get_by_role("button", name=title).click()
        path = tmp_path / title
        waiting.value.save_as(path)
        assert len(path.read_text().splitlines()) == number
    assert counts["completed"] + counts["failed"] == len(lines)
    broken = given(server, b'{"custom_id": "a"}\n')
    job = page.locator(f".job[aria-label='Batch {broken}']")
    expect(job).to_contain_text("line 1: missing required parameter", timeout=WAIT_MS)
    seen.require_calm()
    server.stop()


def test_it_says_that_the_server_is_gone_and_comes_back(server: Server, visit: Callable[..., Visit]) -> None:
    """In words, with the age of what is shown; without a reload."""
    server.write_pool(fake("m"))
    server.start()
    server.wait_ready()
    seen = visit(server.url)
    page = seen.open()
    page.locator("button.name").click()
    page.locator(".chart canvas").first.wait_for()
    port = urlsplit(server.url).port
    family = [server.process, *server.process.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    expect(page.locator("#banner")).to_contain_text("The server does not answer", timeout=WAIT_MS)
    drawn = page.evaluate("uPlot.sync('m').plots.map((chart) => [chart.data[0].at(-1), chart.scales.x.max])")
    newest_s = page.evaluate("import('./ui/app.js').then(({ app }) => app.newestAt / 1000)")
    assert drawn == [[newest_s, newest_s]] * 3  # not of now, when nothing is known
    page.locator("button.name").click()
    assert page.evaluate("uPlot.sync('m').plots.length") == 0  # nobody sees them: they are given up
    server.pid_file.unlink(missing_ok=True)
    server.cli("pool", "start", "--detach", "--port", str(port))
    server.wait_ready()
    expect(page.locator("#banner")).to_be_empty(timeout=WAIT_MS)
    expect(page.locator("tr.model .state")).to_contain_text("ready", timeout=WAIT_MS)
    server.stop()


def test_how_often_it_asks(served: Server, visit: Callable[..., Visit]) -> None:
    """At most once in two seconds; not at all while nobody sees it, or while it is paused."""
    seen = visit(served.url)
    seen.page.clock.install()
    page = seen.open()

    def asked_in(seconds: int) -> int:
        before = len(polls())
        for _ in range(seconds * 2):
            page.clock.run_for(500)
            page.evaluate("fetch('health').then(() => 0)")  # an answer that is under way comes before this one
        return len(polls()) - before

    def polls() -> list[str]:
        return [one.url for one in seen.asked if any(f"/{path}" in one.url for path in ("live", "log?", "v1/"))]

    for view in ("models", "jobs", "log", "playground"):
        page.evaluate(f"location.hash = '{view}'")
        asked_in(2)
        assert 5 <= asked_in(20) <= 10, view
    assert "process=" in next(url for url in reversed(polls()) if "/live" in url)
    page.evaluate("location.hash = 'jobs'")
    page.get_by_role("button", name="Pause").click()
    asked_in(2)
    assert asked_in(10) == 0
    page.get_by_role("button", name="Go on").click()
    assert asked_in(10) >= 3
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    asked_in(2)
    assert asked_in(20) == 0
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    assert asked_in(10) >= 3
    page.evaluate("location.hash = 'models'")
    page.route(LIVE, lambda route: None)  # a server that hangs
    asked_in(30)
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    page.unroute(LIVE)
    asked_in(20)
    expect(page.locator("#banner")).to_be_empty()


def test_an_answer_to_another_key_is_none(served: Server, visit: Callable[..., Visit]) -> None:
    """What was asked with the key before is not shown, however late it comes; before any answer the page stands."""
    seen = visit(served.url)
    page = seen.page
    held: list[Route] = []
    page.route(LIVE, lambda route: route.continue_() if held else held.append(route))
    page.goto(f"{served.url}/ui")
    expect(page.locator("#nav")).to_contain_text("Playground")
    expect(page.locator("#main")).to_contain_text("Asking the server")
    assert page.locator(".age").count() == 0
    seen.use_key("another")
    page.locator("tr.model").first.wait_for()
    for route in held:
        route.fulfill(status=401, json={"error": {"code": "unauthorized", "message": "late"}})
    page.evaluate("fetch('health').then(() => 0)")
    assert page.locator("tr.model").count() > 0
    assert "late" not in page.content()


def test_by_keyboard_alone(served: Server, visit: Callable[..., Visit]) -> None:
    """A view, a row, an order, a tab, and a text that is copied where the browser has no clipboard for the page."""
    seen = visit(served.url)
    page = seen.open()
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Texts/s").focus()
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Texts/s")
    page.locator("button.name").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("tr.details")).to_be_visible()
    page.keyboard.press("Space")
    expect(page.locator("tr.details")).to_have_count(0)
    page.get_by_role("link", name="Playground").focus()
    page.keyboard.press("Enter")
    page.locator("#tab-vectors").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(":focus")).to_have_id("tab-code")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("in the clipboard")
    page.locator("form.ask textarea").fill("")
    page.locator("form.ask textarea").focus()
    page.keyboard.press("Control+V")
    expect(page.locator("form.ask textarea")).to_have_value(re.compile("^curl -s http"))


def test_keys(make_server: Callable[..., Server], visit: Callable[..., Visit]) -> None:
    """Without one the page says what it needs; a wrong one is refused; one of scope embed sees no error's text. None is
    kept where others may find it."""
    server = make_server(
        EMBEDPOOL_SECURITY__EMBED_KEY_ENV="EMBEDPOOL_SECRET_E", EMBEDPOOL_SECRET_E="letmein-embed-1234567"
    )
    server.environment |= {
        "EMBEDPOOL_SECURITY__ADMIN_KEY_ENV": "EMBEDPOOL_SECRET_A", "EMBEDPOOL_SECRET_A": "letmein-admin-1234567",
    }  # fmt: skip
    server.write_pool(fake("m"), fake("broken", fault="load"))
    server.start()
    wait_for_key = {"Authorization": "Bearer letmein-embed-1234567"}
    seen = visit(server.url)
    page = seen.page
    page.goto(f"{server.url}/ui")
    expect(page.locator("#main")).to_contain_text("A key is asked for")
    seen.use_key("wrong-key-1234567")
    expect(page.locator("#main")).to_contain_text("(401 unauthorized)", timeout=WAIT_MS)
    seen.use_key("letmein-embed-1234567")
    expect(page.locator("tr.model.failed")).to_contain_text("in trouble", timeout=WAIT_MS)
    assert "fault: load" not in page.content()
    assert page.get_by_role("button", name="Register a model").count() == 0
    seen.use_key("letmein-admin-1234567")
    expect(page.locator("tr.model.failed")).to_contain_text("fault: load", timeout=WAIT_MS)
    page.locator("tr.model", has_text="m").first.locator("button.name").click()
    page.get_by_role("button", name="Disable").click()
    expect(page.locator("#said")).to_contain_text("Disable m: m is disabled (200)", timeout=WAIT_MS)
    found = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    everything = page.content() + page.url + found + "".join(one.url for one in seen.asked)
    assert "letmein" not in everything
    assert "letmein" not in server.log.read_text()
    models = requests.get(f"{server.url}/status", headers=wait_for_key, timeout=20).json()["models"]
    assert {one["model"]: one["enabled"] for one in models} == {"m": False, "broken": True}
    key = server.run("key", "create", "--scopes", "admin").stdout.strip()
    seen.use_key(key)
    expect(page.locator("tr.model.disabled")).to_contain_text("m", timeout=WAIT_MS)
    page.get_by_role("button", name="Pause").click()
    server.cli("key", "revoke", "--id", id_of(key), "--yes")
    as_admin = {"Authorization": f"Bearer {key}"}
    wait_until(lambda: server.get("/status", headers=as_admin).status_code == 401)
    page.get_by_role("button", name="Enable").click()
    expect(page.locator("#said")).to_contain_text("(401 unauthorized)", timeout=WAIT_MS)
    server.environment["EMBEDPOOL_CLIENT__API_KEY_ENV"] = "EMBEDPOOL_SECRET_A"
    server.stop()


def test_what_others_wrote_is_drawn_as_text(server: Server, visit: Callable[..., Visit]) -> None:
    """In errors, prompts, texts and tokens."""
    server.write_pool(
        fake("m", prompts={"p": ANGRY}),
        {"model": "lost", "driver": {"type": "local_st", "config": {"path": f"/nowhere/{ANGRY}"}}},
    )
    server.start()
    seen = visit(server.url)
    page = seen.open()
    expect(page.locator("tr.model.failed")).to_contain_text(ANGRY, timeout=WAIT_MS)
    page.locator("tr.model.failed button.name").click()
    page.goto(f"{server.url}/ui#playground")
    page.locator("details.options summary").click()
    seen.write(ANGRY, f"</textarea>{ANGRY}", "שלום עולם 👩‍👩‍👧")
    for name in TABS:
        seen.tab(name)
        if page.locator("form.ask button.first").count():
            seen.run()
    assert page.title() == "embedpool"
    assert page.locator("img[src=x]").count() == 0
    seen.require_calm()
    server.stop()


def test_a_model_by_clicks_alone(server: Server, visit: Callable[..., Visit]) -> None:
    """Registered, ready, asked, disabled, and gone; what the server refuses is said in its own words."""
    server.start()
    seen = visit(server.url)
    page = seen.open()
    expect(page.locator("#main")).to_contain_text("No model yet")

    def register(name: str) -> None:
        page.get_by_role("button", name="Register a model").click()
        form = page.locator("form.register")
        form.locator("select[name=driver_type]").select_option("fake")
        form.locator("input[name=model]").fill(name)
        form.get_by_role("button", name="Register").click()

    register("not a name!")
    expect(page.locator("#said")).to_contain_text("422 validation_error", timeout=WAIT_MS)
    page.get_by_role("button", name="Close").click()
    register("mine")
    expect(page.locator("#said")).to_contain_text("mine is ready", timeout=WAIT_MS)
    page.goto(f"{server.url}/ui#playground")
    seen.write("a text")
    seen.run()
    expect(page.locator("article.vector")).to_contain_text("norm 1.0000")
    page.goto(f"{server.url}/ui#models")
    page.locator("button.name").click()
    page.get_by_label("Alias").fill("nick")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("tr.model")).to_contain_text("as nick", timeout=WAIT_MS)
    page.get_by_role("button", name="Disable").click()
    expect(page.locator("tr.model .state")).to_contain_text("disabled", timeout=WAIT_MS)
    page.get_by_role("button", name="Unregister").click()
    expect(page.locator("#said")).to_contain_text("Type the name")
    page.get_by_label("Unregister: type the name").fill("mine")
    page.get_by_role("button", name="Unregister").click()
    expect(page.locator("#main")).to_contain_text("No model yet", timeout=WAIT_MS)
    assert server.get("/status").json()["models"] == []
    server.stop()


def test_a_fault_of_pool_yml_is_shown_with_its_line(served: Server, visit: Callable[..., Visit]) -> None:
    """And is gone when the file is mended."""
    page = visit(served.url).open()
    whole = served.pool_yml.read_text()
    served.pool_yml.write_text("version: 1\nmodels:\n  - model: [\n")
    expect(page.locator(".card.failed")).to_contain_text("line", timeout=WAIT_MS)
    served.pool_yml.write_text(whole)
    expect(page.locator(".card.failed")).to_have_count(0, timeout=WAIT_MS)


@pytest.mark.parametrize("path", ["/pool/ui", "/pool/ui/", "/pool/ui/index.html"])
def test_behind_a_prefix(served: Server, visit: Callable[..., Visit], path: str) -> None:
    """Of a proxy that takes it away; with a slash at the end, too."""
    with proxied(served.url, "/pool") as url:
        seen = visit(url)
        page = seen.page
        page.goto(url + path + "#playground")
        seen.run()
        expect(page.locator("article.vector").first).to_contain_text("norm", timeout=WAIT_MS)
        assert all(urlsplit(one.url).path.startswith("/pool/") for one in seen.asked)
        assert page.get_by_role("link", name="API").evaluate("link => link.href") == f"{url}/pool/docs"
        seen.require_calm()


@contextlib.contextmanager
def proxied(url: str, prefix: str) -> Iterator[str]:
    """A proxy in front of a server, at a prefix."""
    there = urlsplit(url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=20)
            path = self.path.removeprefix(prefix)
            headers = {name: value for name, value in self.headers.items() if name != "Connection"}
            connection.request(self.command, path, body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name not in ("Transfer-Encoding", "Connection", "Content-Length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_POST = pass_on

        def log_message(self, *arguments: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def test_several_processes(server: Server, visit: Callable[..., Visit]) -> None:
    """The page says which one answers and where its replicas run, and waits for a model that this one has not yet."""
    server.write_pool({**fake("m"), "place": "process"})
    server.start(EMBEDPOOL_SERVER__WORKERS="2")
    server.wait_ready()
    connections: dict[str, requests.Session] = {}

    def both() -> bool:  # a connection stays with the process that took it
        fresh = requests.Session()
        connections.setdefault(fresh.get(f"{server.url}/live", timeout=20).json()["process"], fresh)
        return len(connections) == 2

    wait_until(both)
    turns = itertools.cycle(connections)
    shown = []

    def by_turns(route: Route) -> None:
        process = next(turns)
        body = connections[process].get(route.request.url, timeout=20).text
        shown.append(json.loads(body))
        route.fulfill(body=body, content_type="application/json")

    for number, connection in enumerate(connections.values()):
        for _ in range(3 + number):
            connection.post(f"{server.url}/embed", json={"model": "m", "texts": ["a"]}, timeout=20)
    seen = visit(server.url)
    page = seen.page
    page.clock.install()
    page.route(LIVE, by_turns)
    page.route(LOG, by_turns)
    seen.open()
    pids = {str(child.pid) for child in server.process.children(recursive=True)}
    page.locator("tr.model button.name").click()
    runs = page.locator("tr.details div", has=page.get_by_title("Where this replica runs")).last.inner_text()
    assert any(runs.split("\n") == ["m#1", f"ready · process {pid}"] for pid in pids), runs
    app = "import('./ui/app.js').then(({ app }) => [app.live.number, app.live.process, app.series.m.queue.length])"
    for _ in range(4):
        page.clock.run_for(2000)
        number, process, points = settled(page, app)
        assert (number, process, points) == (shown[-1]["number"], shown[-1]["process"], number)
        assert any(f"pid {pid}" in page.locator("#connection").inner_text() for pid in pids)
    page.evaluate("location.hash = 'log'")
    for _ in range(4):
        page.clock.run_for(2000)
        settled(page)
    of = next(answer["process"] for answer in reversed(shown) if "requests" in answer)
    expect(page.locator("#main")).to_contain_text(f"Of the process {of}")
    assert page.locator("table.log tbody tr", has_text="/embed").count() == 3 + [*connections].index(of)
    page.evaluate("location.hash = 'models'")
    page.get_by_role("button", name="Register a model").click()
    page.locator("select[name=driver_type]").select_option("fake")
    page.locator("input[name=model]").fill("mine")
    page.route(LIVE, lambda route: route.fulfill(json={**shown[0], "number": len(shown)}))  # it has not heard
    page.locator("form.register").get_by_role("button", name="Register").click()
    for _ in range(3):
        settled(page)
        page.clock.run_for(2000)
    expect(page.locator("#said")).to_contain_text("mine is loading")
    page.unroute(LIVE)
    wait_until(lambda: all(one.get(f"{server.url}/ready/mine", timeout=20).ok for one in connections.values()))
    settled(page)
    page.clock.run_for(2000)
    expect(page.locator("#said")).to_contain_text("mine is ready")
    server.stop()


def settled(page: Page, then: str = "0") -> Any:
    """When the page waits for no answer: what an expression is then."""
    return page.evaluate(f"import('./ui/app.js').then(({{ app }}) => app.asking()).then(() => {then})")
