"""GET /: what stands here, in the form that whoever asks expects."""

from __future__ import annotations

from flask import Blueprint, Response, request

from embedpool import __version__
from embedpool.web.encoding import json_response

LINKS = {"docs": "docs", "openapi": "openapi.json", "models": "v1/models", "health": "health", "metrics": "metrics"}
AS_OLLAMA = "Ollama is running"  # its clients look for this before they embed


def blueprint(*, has_page: bool) -> Blueprint:
    """The root, also for HEAD; people are shown the page or, without one, the API."""
    routes = Blueprint("root", __name__)

    @routes.get("/")
    def root() -> Response:
        accepts = request.accept_mimetypes
        # What is named counts, not what a client takes as well: */* is a program that wants to see whether we run.
        named = {kind for kind, quality in accepts if quality > 0}
        if "text/html" in named:
            answer = Response(status=302, headers={"Location": "ui" if has_page else "docs"})
        elif "application/json" in named:
            links = {"ui": "ui", **LINKS} if has_page else LINKS
            answer = json_response({"name": "embedpool", "version": __version__, "links": links})
        else:
            answer = Response(AS_OLLAMA, mimetype="text/plain")
        answer.vary.add("Accept")
        return answer

    return routes
