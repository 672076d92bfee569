"""The page at /ui: files that lie in the package, nothing from elsewhere, and no data."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from flask import Blueprint, Response, request

from embedpool.errors import NotFound

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types lit-html"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a page of before an upgrade is worse than a question
}


def blueprint() -> Blueprint:
    """The page and its parts."""
    routes = Blueprint("ui", __name__)

    @routes.get("/ui")
    def index() -> Response:
        return _answer("index.html")

    @routes.get("/ui/<path:file>")
    def part(file: str) -> Response:
        return _answer(file.removeprefix("ui/"))  # as a page that was asked for as /ui/ reads its addresses

    return routes


def _answer(name: str) -> Response:
    """A file of the package, or that it has not changed. Raises NotFound."""
    found = _files().get(name)
    if found is None:
        raise NotFound(f"nothing at {request.path}")
    content, tag = found
    response = Response(content, mimetype=TYPES[Path(name).suffix], headers=HEADERS)
    response.set_etag(tag)
    return response.make_conditional(request)  # type: ignore[return-value]


@functools.cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Every file of the page by its path below /ui, with its hash."""
    files = [file for file in FOLDER.rglob("*") if file.suffix in TYPES]
    contents = {file.relative_to(FOLDER).as_posix(): file.read_bytes() for file in files}
    return {name: (content, hashlib.sha256(content).hexdigest()[:32]) for name, content in contents.items()}
