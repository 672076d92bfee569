"""embedpool: one server, many text-embedding models, one address.

Usage:
  embedpool init [--root DIR] [--config FILE]
  embedpool pool start [--detach] [--server NAME] [--host H] [--port P] [--threads N] [--insecure]
                       [--config FILE]
  embedpool pool stop [--config FILE]
  embedpool pool status [--json] [--config FILE]
  embedpool pool health [--json] [--config FILE]
  embedpool register --model M --type T [--alias A] [--place P] [--resources JSON]
                     [--max-seq-length N] [--normalize | --no-normalize] [--dtype D]
                     [--base-url URL] [--remote-model R] [--timeout-s S] [--protocol P]
                     [--min N] [--max N] [--idle-ttl-s S] [--queue-max N] [--inflight N]
                     [--disabled] [--replace] [--set KEY=VALUE]... [--json] [--config FILE]
  embedpool set-alias --model M --alias A [--json] [--config FILE]
  embedpool enable --model M [--json] [--config FILE]
  embedpool disable --model M [--json] [--config FILE]
  embedpool unregister --model M [--json] [--config FILE]
  embedpool pull MODEL [--revision R] [--to DIR] [--convert] [--set KEY=VALUE]... [--json] [--config FILE]
  embedpool embed [--model M] [--output NAMES] [--set KEY=VALUE]... [--config FILE] [--] TEXT...
  embedpool embed (--in FILE)... [MORE]... [--out FILE] [--column C] [--id-column C] [--model M] [--output NAMES]
                  [--resume] [--local] [--set KEY=VALUE]... [--config FILE]
  embedpool rerank (--in FILE)... [MORE]... [--out FILE] [--query-column C] [--column C] [--id-column C] [--model M]
                   [--resume] [--local] [--set KEY=VALUE]... [--config FILE]
  embedpool rerank [--model M] [--top N] [--set KEY=VALUE]... [--json] [--config FILE] [--] QUERY [FILE]
  embedpool batch create FILE [--endpoint E] [--window W] [--json] [--config FILE]
  embedpool batch list [--json] [--config FILE]
  embedpool batch show ID [--json] [--config FILE]
  embedpool batch cancel ID [--json] [--config FILE]
  embedpool batch fetch ID [--out FILE] [--json] [--config FILE]
  embedpool cache show [--json] [--config FILE]
  embedpool cache clear [--model M] [--json] [--config FILE]
  embedpool key create [--name NAME] [--scopes NAMES] [--models NAMES] [--weight W] [--requests-per-s N]
                       [--texts-per-s N] [--concurrent N] [--json] [--config FILE]
  embedpool key list [--json] [--config FILE]
  embedpool key revoke --id ID [--yes] [--json] [--config FILE]
  embedpool --help
  embedpool --version

Commands:
  init          Write config.yml, pool.yml and the folders they name. Never overwrites a file.
  pool start    Serve in the foreground until Ctrl-C, or with --detach in the background.
  pool stop     Stop the server after it has finished the requests it has accepted.
  pool status   Show models, their states, queues and counters.
  pool health   Check whether the server answers.
  register      Add a model and wait until it is ready. The same registration twice is a success.
  set-alias     Give a model a second name; --alias "" removes it.
  enable        Enable a model and wait until it is ready.
  disable       Disable a model; it stays registered.
  unregister    Remove a model.
  pull          Fetch a local model, check it, and export it for the runtime, before it is needed. Needs no server.
  key create    Create an API key and print it once; the server keeps only its hash. After the first key every
                request needs one: embedding a key of any scope, management one of scope admin.
  key list      List the keys, without their secrets.
  key revoke    Revoke a key; a running server follows within a second. The last key needs --yes or a yes.
  embed         Print the vector of each text as a JSON list; with - read texts from standard input, one a line. Given
                files with --in, write their vectors.
  rerank        Print the lines of a file, or of standard input, in the order of their relevance to QUERY. Given
                files with --in, write the scores of their pairs.
  batch create  Upload a file of requests, as for OpenAI's batch API, and have the server run them.
  batch list    List the batches of the caller, the newest first.
  batch show    Show how far a batch is, and what is wrong with it.
  batch cancel  End a batch; what is finished is kept.
  batch fetch   Write the results of a batch to a file, and its failures beside it.
  cache show    Show what the cache holds, and of each model how often it had a row that was asked for.
  cache clear   Forget the rows of a model, or all of them.

  Without a running server, register, set-alias, enable, disable and unregister edit pool.yml.

Options:
  --config FILE       Settings. Default: $EMBEDPOOL_CONFIG, else .config/config.yml.
  --root DIR          Folder for config.yml, pool.yml and state [default: .config].
  --detach            Start in the background; returns when the server answers.
  --server NAME       gunicorn or waitress; default server.server.
  --host H            Address to bind; default server.host.
  --port P            Port to bind; default server.port.
  --threads N         Request threads; default server.threads.
  --yes               Revoke the last key without being asked.
  --insecure          Listen beyond this machine although no key exists.
  --model M           Name of the model (of a local model its Hugging Face id), or the alias of a registered one.
                      embed needs none if the pool has only one model, rerank if it has only one reranker.
  --type T            local_st, http or fake.
  --alias A           Second name of the model.
  --place P           Where a local model runs: in a thread of the server, in a process of its own, or on a ray cluster.
  --resources JSON    What a replica of place ray asks for, such as {"num_cpus": 2}.
  --max-seq-length N  Number of tokens kept of a text (local_st, fake).
  --normalize         Vectors of length 1; this is the default.
  --no-normalize      Vectors as the model gives them.
  --dtype D           Type of the vectors given out: float32 or float16.
  --base-url URL      Address of the remote service (http).
  --remote-model R    The model's name there (http).
  --timeout-s S       Time-out of a call, in seconds (http).
  --revision R        Branch, tag or commit of the model on the hub.
  --to DIR            Copy the model into this new folder, to be carried to another machine.
  --convert           Make safetensors of weights that the model has as pickles alone; with --to.
  --protocol P        API of the service: embedpool, openai, tei, cohere, jina, voyage, ollama or template (http).
  --min N             Minimum number of replicas; 0 loads the model at first use.
  --max N             Maximum number of replicas.
  --idle-ttl-s S      Seconds that a replica above --min may be idle.
  --queue-max N       Longest queue of the model, in texts.
  --inflight N        Number of batches that a replica runs at once.
  --disabled          Register the model without serving it.
  --replace           Replace a model registered with a different spec.
  --set KEY=VALUE     Any other key of driver.config, or an option of embed or rerank; YAML, or a text.
  --in FILE           Files of inputs, a folder of such, or a glob: txt (a text a line), jsonl, csv, tsv, parquet.
  --out FILE          File of results: jsonl, npy or parquet; default the first input's name and .vectors.jsonl, or
                      .scores.jsonl.
  --output NAMES      What is wanted of each text: dense, sparse or multivector, or several of them with commas between;
                      default what the model is for.
  --column C          Column of the texts, by default text; for rerank that of the documents, by default document.
  --query-column C    Column of the queries, by default query.
  --id-column C       Column of the ids; by default the number of the row, from 0.
  --endpoint E        What the requests are for [default: /v1/embeddings].
  --window W          How long the batch may take, such as 24h or 7d [default: 24h].
  --resume            Go on with a job that has ended early, however it did.
  --local             Compute in this process, without a server.
  --top N             Number of lines that rerank prints; default all.
  --name NAME         Name of the key's owner.
  --scopes NAMES      embed, admin or both, separated by a comma [default: embed].
  --models NAMES      Names or aliases of models the key may use, separated by commas; default all.
  --weight W          The key's share of a busy model beside other keys; default 1.
  --requests-per-s N  Requests per second that the key may send.
  --texts-per-s N     Texts per second that the key may send.
  --concurrent N      Concurrent requests that the key may have.
  --id ID             First part of a key, as key list shows it.
  --json              Machine-readable output.
  -h --help           Show this text.
  --version           Show the version.

Exit codes:
  0 done   1 failed   2 wrong usage   3 the server is not running   4 no such model
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable

from docopt import DocoptExit, docopt

from embedpool import __version__
from embedpool.cli import batches, cache, embed, keys, models, pull, rerank, server
from embedpool.cli.common import FAILED, NO_SUCH_MODEL, OK, USAGE, Arguments, UsageError
from embedpool.errors import EmbedpoolError, near_names


def main(argv: list[str] | None = None) -> int:
    """The `embedpool` command. Gives the exit code."""
    try:
        arguments = docopt(__doc__, argv, version=f"embedpool {__version__}")
    except DocoptExit:
        print(_wrong_usage(sys.argv[1:] if argv is None else argv), file=sys.stderr)
        return USAGE
    try:
        return _command_of(arguments)(arguments)
    except UsageError as error:
        print(f"embedpool: {error.message}", file=sys.stderr)
        return USAGE
    except EmbedpoolError as error:
        if arguments["--json"]:
            print(json.dumps({"ok": False, "error": {"code": error.code, "message": error.message}}))
        else:
            print(f"embedpool: {error.message}", file=sys.stderr)
        return NO_SUCH_MODEL if error.code == "model_not_found" else FAILED
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:  # `embedpool pool status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _command_of(arguments: Arguments) -> Callable[[Arguments], int]:
    commands: dict[str, Callable[[Arguments], int]] = {
        "batch": batches.batch,
        "cache": cache.cache,
        "init": server.init,
        "start": server.start,
        "stop": server.stop,
        "status": server.status,
        "health": server.health,
        "register": models.register,
        "set-alias": models.set_alias,
        "enable": models.enable,
        "disable": models.disable,
        "unregister": models.unregister,
        "create": keys.create,
        "list": keys.show,
        "revoke": keys.revoke,
        "pull": pull.pull,
        "embed": embed.embed,
        "rerank": rerank.rerank,
    }
    return next(function for name, function in commands.items() if arguments[name])


def _wrong_usage(argv: list[str]) -> str:
    """What is wrong with a command line that docopt refused, in a sentence, and the usage it should have had."""
    usage = __doc__.split("Usage:\n")[1].split("\n\n")[0]
    commands = [entry.strip() for entry in re.split(r"\n  (?=embedpool )", "\n" + usage) if entry.strip()]
    names = [re.match(r"embedpool ((?:pool |key |batch |cache )?\w[\w-]*)", entry) for entry in commands]
    known: dict[str, str] = {}
    for match, entry in zip(names, commands, strict=True):
        if match:  # some are used in several ways
            known[match[1]] = f"{known[match[1]]}\n  {entry}" if match[1] in known else entry
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    name = " ".join(words[:2] if words[:1] in (["pool"], ["key"], ["batch"], ["cache"]) else words[:1])
    if name not in known:
        near = near_names(name, known) or [k for k in known if name and k.endswith(f" {name}")]
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(known)}"
        return f"embedpool: no command {name!r}; {hint}"
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    options = re.findall(r"--[a-z-]+", known[name])
    for option in given:
        if option not in options:
            near = near_names(option, options)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            return f"embedpool: {name} has no option {option}{hint}\n{known[name]}"
    if "\n  embedpool" in known[name]:
        return f"embedpool: {name} lacks something, or its options do not go together\n{known[name]}"
    needed = re.findall(r"--[a-z-]+", re.sub(r"\[[^][]*\]", "", known[name]))
    missing = [option for option in needed if option not in given]
    if missing:
        return f"embedpool: {name} needs {' and '.join(missing)}\n{known[name]}"
    return f"embedpool: {name} lacks something, or its options do not go together\n{known[name]}"
