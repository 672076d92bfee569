"""embedpool: one server, many embedding models, one address.

The road of a request, file by file:

    web/native.py         POST /embed: HTTP to a request
    web/schemas.py        what may come in
    pool/pool.py          the name or alias finds its model; a permit admits the request
    pool/served_model.py  texts are measured, truncated, split into jobs
    pool/model_queue.py   jobs wait here, counted in texts, served in fair order
    pool/replica_set.py   replicas grow and shrink; replica.py is the life of one
    pool/worker.py        a replica's thread takes what waits
    pool/batcher.py       waiting jobs become batches
    drivers/*.py          a batch becomes vectors
    pool/answer.py        vectors get their final form: normalised, cut, quantised
    web/encoding.py       vectors become JSON, base64 or npy

Beside the road: config/ (config.yml and pool.yml), reconcile.py (the file becomes the live pool), server.py (where the
parts meet), serve/ (HTTP, read and answered by waitress's parts under gunicorn or alone; pid file, detach, stop),
web/metrics.py, web/request_log.py, logs.py and tracing.py (what can be seen of it), client.py and cli/ (the operator's
hands).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]

if TYPE_CHECKING:
    from embedpool.client import Client


def __getattr__(name: str) -> Any:
    """`embedpool.Client`, imported on use: the server needs no requests, the command line no numpy."""
    if name == "Client":
        from embedpool.client import Client

        return Client
    raise AttributeError(f"module 'embedpool' has no attribute {name!r}")
