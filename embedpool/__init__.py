"""embedpool: one server, many embedding models, one address.

The road of a request, each file entered once on the way in and once on the way out:

    web/native.py         POST /embed: a body becomes a task, and the result becomes an answer
    web/body.py           the body is read, unpacked and parsed
    web/schemas.py        its schema
    web/submit.py         the one way into the pool: the task, and a call that says for whom it is
    pool/pool.py          a name or an alias finds its model, a permit admits the request
    tasks/embed.py        the task: prompts and truncation make items of texts, and rows get their final form
    pool/admission.py     the request is measured, put into the queue, waited for and finished
    pool/model_queue.py   items wait, bounded in number
    pool/cache.py         but for those whose rows are known from before
    pool/fair_order.py    the order of service among requests and callers
    pool/planner.py       a replica's thread takes the items that make the best batch now
    pool/runner.py        every item of the batch gets its row or its error
    tasks/driver.py       the place where the driver runs: in this process, or places/process.py, or places/ray_place.py
    drivers/local_st.py   the batch becomes rows, by drivers/pipeline.py; drivers/http.py and drivers/fake.py do so too
    web/encoding.py       rows become JSON, base64 or npy

What they hand on: tasks/item.py (items and batches), tasks/rows.py, pool/request.py (a call, a request, a result).
What all tasks have: tasks/task.py. Other tasks take the same road: tasks/score.py, tasks/sparse.py,
tasks/multivector.py, tasks/by_vectors.py (scores of those that give vectors), tasks/hybrid.py (several outputs of one
pass) and tasks/late_chunking.py.
A dialect in web/dialects/ takes the place of web/native.py; web/ndjson.py serves bodies of lines.

What a model's folder holds: drivers/layout.py, and of a multi-vector model drivers/late_interaction.py. What computes:
drivers/static.py, drivers/openvino_graph.py, drivers/torch_run.py, and drivers/library.py, with which
drivers/fidelity.py compares the others. What of a model they compute says drivers/body.py; drivers/heads.py makes
sparse rows, or a vector for each token, of what that gives. Graphs are made by drivers/openvino_export.py and kept by
drivers/openvino_cache.py; drivers/padding.py gives each text a row, drivers/packing.py lets texts share their rows.
drivers/convert.py makes safetensors of pickles.

Around the road: web/app.py puts web/ together, with web/http_request.py, web/access.py (keys), web/intake.py (bodies),
web/rate_limit.py, web/metrics.py, web/request_log.py, web/error_response.py, web/compat.py (what the APIs of others
have in common), web/cors.py (pages in a browser) and web/root.py. The page is web/ui.py and the files of web/page/; its
data are web/live.py and web/history.py (the last ten minutes). pool/served_model.py is the life of a
model, pool/replica_set.py says how many replicas it has and runs their threads, pool/replica.py is the life of one,
pool/backoff.py says when to open it again, pool/quarantine.py holds items that are not run again, pool/stats.py counts,
pool/settings.py holds the settings that all models share, cache/disk.py the rows that outlive the server, by
cache/row_bytes.py. tasks/ defines the contracts of tasks, drivers, places and tokenizers; places/ and drivers/ fulfil
them.

Work that outlives a request: jobs/windows.py, the engine, which web/ndjson.py uses too. jobs/file_job.py goes from
jobs/sources.py to jobs/sinks.py, for cli/files.py, on a server or by in_process.py. jobs/batches.py says which of the
batches runs that web/dialects/batches.py enters into jobs/store.py, and jobs/batch_run.py runs it: jobs/batch_input.py
checks what it asks for, and jobs/speed.py tells how fast it is. jobs/durable.py is their hand on the disk.

Beside the road: serve/ (sockets, processes, signals), server.py (where the parts meet), config/ (config.yml, pool.yml,
keys.yml), reconcile.py (pool.yml becomes the live pool), logs.py, tracing.py, bounds.py, errors.py,
client.py with each.py (inputs that fail alone), outputs.py (rows that are no vectors) and upload.py, embedder.py
(columns of data, for Ray Data), and cli/.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Client", "Embedder", "__version__"]

if TYPE_CHECKING:
    from embedpool.client import Client
    from embedpool.embedder import Embedder


def __getattr__(name: str) -> Any:
    """`Client` and `Embedder`, imported on use: the server needs no requests, the command line no numpy."""
    if name == "Client":
        from embedpool.client import Client

        return Client
    if name == "Embedder":
        from embedpool.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'embedpool' has no attribute {name!r}")
