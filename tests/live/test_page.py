"""The page in a real browser: what it shows, what it sends, and what it never does."""

from __future__ import annotations

import contextlib
import http.client
import json
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
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.live.conftest import Server, fake

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
AXE = Path(sys.prefix) / "clients" / "node_modules" / "axe-core" / "axe.min.js"
TABS = ("vectors", "compare", "search", "map", "side", "sparse", "match", "rerank", "classify", "code")
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
WAIT_MS = 20_000
ANGRY = "<img src=x onerror=document.title='angry'>"
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
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


@pytest.fixture
def served(server: Server) -> Iterator[Server]:
    server.write_pool(
        fake("org/embedder", alias="em", max_seq_length=8),
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
    if AXE.exists():
        page.evaluate(AXE.read_text())
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
        f"{told['requests']} requests, {told['items']} texts, {told['tokens']} tokens"
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
    cells = [float(cell) for cell in page.locator("table.heat tbody td").all_text_contents()]
    assert cells == pytest.approx((vectors @ vectors.T).ravel().tolist(), abs=0.00501)
    seen.tab("search")
    page.locator("input.query").fill("a query")
    seen.run()
    query = np.array(served.vectors("em", ["a query"], normalize=True, input_type="query"))[0]
    scores = [float(one) for one in page.locator(".ranked .score").all_text_contents()]
    assert scores == pytest.approx(sorted(vectors @ query, reverse=True), abs=1e-4)


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
    seen.write(" ".join(words), "short")
    seen.run()
    first, second = page.locator("article.vector").all()
    kept = first.locator(".token:not(.lost):not(.special)").all_text_contents()
    assert kept == (words[:6] if side == "right" else words[-6:])
    expect(first).to_contain_text(f"14 tokens at the {'end' if side == 'right' else 'beginning'} are lost")
    assert second.locator(".lost").count() == 0
    alone, whole = served.vectors("em", [" ".join(kept)]), served.vectors("em", [" ".join(words)], truncate=side)
    np.testing.assert_allclose(alone, whole)


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


def test_the_code_does_what_it_says(served: Server, visit: Callable[..., Visit], tmp_path: Path) -> None:
    """Every snippet runs, and gives the vectors of the texts, which hold quotation marks of each kind."""
    texts = ['it\'s "true"', "null \\ and $HOME"]
    seen = visit(served.url)
    page = seen.open("#playground")
    seen.write(*texts)
    seen.tab("code")
    expected = served.vectors("em", texts, input_type="document")
    ran = []
    for section in page.locator("section.code").all():
        title, code = section.locator("h3").inner_text(), section.locator("pre").inner_text()
        if title.startswith("Python"):
            program = f"{code}\nimport json\nimport numpy\nprint(json.dumps(numpy.asarray(vectors).tolist()))"
            said = run(sys.executable, "-c", program)
        elif title == "JavaScript":
            if shutil.which("node") is None:
                continue
            (tmp_path / "code.mjs").write_text(f"{code}\nconsole.log(JSON.stringify(vectors));")
            said = run("node", str(tmp_path / "code.mjs"))
        else:
            said = json.dumps(json.loads(run("bash", "-c", code))["vectors"])
        np.testing.assert_allclose(json.loads(said.splitlines()[-1]), expected, atol=1e-6, err_msg=title)
        ran.append(title)
    assert {"curl", "Python: openai", "Python: cohere", "Python: requests", "Python: embedpool"} <= set(ran)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
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
    port = urlsplit(server.url).port
    family = [server.process, *server.process.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    expect(page.locator("#banner")).to_contain_text("The server does not answer", timeout=WAIT_MS)
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
        return [one.url for one in seen.asked if "/live" in one.url]

    assert 5 <= asked_in(20) <= 10
    page.get_by_role("button", name="Pause").click()
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
    expect(page.locator("#main")).to_contain_text("key", timeout=WAIT_MS)
    seen.use_key("letmein-embed-1234567")
    expect(page.locator("tr.model.failed")).to_contain_text("in trouble", timeout=WAIT_MS)
    assert "fault: load" not in page.content()
    assert page.get_by_role("button", name="Register a model").count() == 0
    seen.use_key("letmein-admin-1234567")
    expect(page.locator("tr.model.failed")).to_contain_text("fault: load", timeout=WAIT_MS)
    page.locator("tr.model", has_text="m").first.locator("button.name").click()
    page.get_by_role("button", name="Disable").click()
    expect(page.locator("#said")).to_contain_text("done", timeout=WAIT_MS)
    found = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    everything = page.content() + page.url + found + "".join(one.url for one in seen.asked)
    assert "letmein" not in everything
    assert "letmein" not in server.log.read_text()
    models = requests.get(f"{server.url}/status", headers=wait_for_key, timeout=20).json()["models"]
    assert {one["model"]: one["enabled"] for one in models} == {"m": False, "broken": True}
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


@pytest.mark.parametrize("path", ["/pool/ui", "/pool/ui/"])
def test_behind_a_prefix(served: Server, visit: Callable[..., Visit], path: str) -> None:
    """Of a proxy that takes it away; with a slash at the end, too."""
    with proxied(served.url, "/pool") as url:
        seen = visit(url)
        page = seen.page
        page.goto(url + path + "#playground")
        seen.run()
        expect(page.locator("article.vector").first).to_contain_text("norm", timeout=WAIT_MS)
        assert all(urlsplit(one.url).path.startswith("/pool/") for one in seen.asked)
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
    """The page says which one answers, and which one runs a replica of its own."""
    server.write_pool({**fake("m"), "place": "process"})
    server.start(EMBEDPOOL_SERVER__WORKERS="2")
    server.wait_ready()
    page = visit(server.url).open()
    pids = {str(child.pid) for child in server.process.children(recursive=True)}
    shown = page.locator("#connection").inner_text()
    assert any(f"pid {pid}" in shown for pid in pids)
    page.locator("tr.model button.name").click()
    runs = page.locator("tr.details div", has=page.get_by_title("Where this replica runs")).last.inner_text()
    assert any(runs.split("\n") == ["m#1", f"ready · process {pid}"] for pid in pids), runs
    server.stop()
