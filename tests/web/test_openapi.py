"""The API's document tells what is served, and what is served keeps to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from embedpool.pool.settings import PoolSettings
from embedpool.web.openapi import DOCS, DOCS_FILES, document
from embedpool.web.schemas import TIMEOUT_HEADER
from tests.conftest import settle
from tests.web.conftest import MODEL, Web, refused, serving

EXAMPLES = 60  # of each kind, for each of the operations: over 2,000 cases


def test_every_route_is_told(web: Web) -> None:
    """What the app serves and what the document tells are the same; below a model's TEI address it tells more."""
    told = {(m, p) for p, item in document()["paths"].items() for m in item}
    served = {
        (method.lower(), re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in web.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    below_tei = {(m, p) for m, p in told if p.startswith("/tei/{name}/")}
    assert told - below_tei == served
    assert web.get("/openapi.json").json == {**document(), "servers": [{"url": "/"}]}


@pytest.mark.parametrize(("given", "url"), [
    ("/embeddings", "/embeddings"), ("/a/b-c/", "/a/b-c"), ("//evil.example", "/"), ("/a b", "/"), ("https://x", "/"),
    ("", "/"),
])  # fmt: skip
def test_a_proxys_prefix_is_told_if_it_is_a_plain_path(web: Web, given: str, url: str) -> None:
    """Anybody may send the header."""
    answer = web.get("/openapi.json", headers={"X-Forwarded-Prefix": given})
    assert answer.json["servers"] == [{"url": url}]


def test_null_means_absent_in_the_document_too() -> None:
    """A field that may be left out may be null."""
    schemas = document()["components"]["schemas"]
    options = schemas["Options"]["properties"]
    assert options["normalize"]["type"] == ["boolean", "null"]
    assert options["truncate"]["enum"] == ["error", "left", "right", None]
    assert {"type": "null"} in schemas["Embed"]["properties"]["options"]["anyOf"]
    assert schemas["Embed"]["properties"]["model"]["type"] == "string"


def test_the_page_loads_nothing_from_elsewhere(web: Web) -> None:
    """Its script and style come from the package, by relative links that any proxy's prefix suits, and nothing else."""
    page = web.get("/docs")
    assert page.mimetype == "text/html"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    links = re.findall(r'(?:src|href|data-spec)="(?!data:)([^"]+)"', page.text)
    assert set(links) == {
        "openapi.json", *(f"docs/{name}" for name in DOCS_FILES),
    }  # fmt: skip
    for name in DOCS_FILES:
        assert web.get(f"/docs/{name}").data == (DOCS / name).read_bytes()


@pytest.mark.parametrize("name", ["LICENSE", "index.html", "..%2Fapp.py", "nothing"])
def test_the_page_needs_no_other_file(web: Web, name: str) -> None:
    """What is not named is not served."""
    refused(web.get(f"/docs/{name}"), 404, "not_found")


@pytest.mark.parametrize("page", ["docs", "ui"])
def test_a_slash_for_a_file_is_the_page(web: Web, page: str) -> None:
    """As slashes in a row are one; the document tells of it."""
    answer = web.get(f"/{page}/%2F")
    assert answer.mimetype == "text/html"
    operation = document()["paths"][f"/{page}/{{file}}"]["get"]
    assert answer.mimetype in operation["responses"]["200"]["content"]


# --- what is served keeps to the document


@pytest.fixture
def fuzzed(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Any]:
    """The document of an app with two ready models."""
    with serving(tmp_path, pool_settings, MODEL, "model: other") as web:
        settle(web.pool)

        def from_this_machine(environ: dict[str, Any], start_response: Any) -> Any:
            return web.app({**environ, "REMOTE_ADDR": "127.0.0.1"}, start_response)

        yield schemathesis.openapi.from_wsgi("/openapi.json", from_this_machine)


# Where there is nothing to get wrong there is only the right way to ask.
KINDS = [
    (method, path, mode)
    for path, item in document()["paths"].items()
    for method, operation in item.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "requestBody" in operation
]


@pytest.mark.parametrize(("method", "path", "mode"), KINDS, ids=str)
def test_no_answer_is_outside_the_document(fuzzed: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Whatever is sent, sane or not: no 5xx, no undocumented status, type or shape.

    What no schema can say (two fields that contradict each other) may be refused, though it fits the schema.
    """

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(fuzzed[path][method.upper()].as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and path == "/models/register":
            case.body.update(driver_type="fake", driver_config={"dim": 8})  # others would look for a model elsewhere
        elif path == "/models/register":  # what is wrong may be the query alone
            assume(not isinstance(case.body, dict) or case.body.get("driver_type") not in ("local_st", "http"))
        elif mode is GenerationMode.POSITIVE and method != "delete":
            ask_for_a_known_model(case)
        if str((case.headers or {}).get(TIMEOUT_HEADER, "")).isdigit():
            case.headers[TIMEOUT_HEADER] = "20000"  # what a millisecond is too short for is no fault
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    run()


def ask_for_a_known_model(case: Case) -> None:
    """Names that are generated are nobody's; what is right with a request shows with a name that is."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "m"
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "m"
