"""Which pages in a browser may call the embedding APIs (CORS): none, unless `server.cors_origins` names them.

Never the management, and never with a browser's own credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from flask import Flask, Response, request

ANY = "*"
METHODS = "GET, POST, HEAD, OPTIONS"
LONGEST_S = 600  # that a browser keeps the answer to its question
EXPOSED = (
    "Retry-After", "X-Request-Id", "X-Embedpool-Cached", "X-Embedpool-Failed", "X-Embedpool-Ignored",
    "X-Embedpool-Model", "X-Embedpool-Prompt", "X-Embedpool-Space", "X-Embedpool-Token-Ids", "X-Embedpool-Tokens",
    "X-Embedpool-Truncated", "X-Embedpool-Truncated-Texts",
)  # fmt: skip


def allow(app: Flask, origins: Sequence[str], blueprints: Collection[str], may_be_any: Callable[[], bool]) -> None:
    """Let pages of these origins in, to these blueprints; `*` means all while they may be any."""
    if not origins:
        return
    allowed = {origin.lower() for origin in origins if origin != ANY}

    @app.after_request
    def tell(response: Response) -> Response:
        if request.blueprint not in blueprints:
            return response
        response.vary.add("Origin")
        origin = request.headers.get("Origin", "")
        lets_all_in = ANY in origins and may_be_any()
        if not origin or not (lets_all_in or origin.lower() in allowed):
            return response
        response.headers["Access-Control-Allow-Origin"] = ANY if lets_all_in else origin
        response.headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED)
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = METHODS
            response.headers["Access-Control-Max-Age"] = str(LONGEST_S)
            if wanted := request.headers.get("Access-Control-Request-Headers"):
                response.headers["Access-Control-Allow-Headers"] = wanted
        return response
