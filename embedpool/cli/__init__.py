"""embedpool: one server, many text-embedding models, one address.

Usage:
  embedpool init [--root DIR] [--config FILE]
  embedpool pool start [--detach] [--server NAME] [--host H] [--port P] [--threads N] [--insecure]
                       [--config FILE]
  embedpool pool stop [--config FILE]
  embedpool pool status [--json] [--config FILE]
  embedpool pool health [--json] [--config FILE]
  embedpool register --model M --type T [--alias A] [--place P]
                     [--max-seq-length N] [--normalize | --no-normalize] [--dtype D]
                     [--base-url URL] [--remote-model R] [--timeout-s S] [--protocol P]
                     [--min N] [--max N] [--idle-ttl-s S] [--queue-max N] [--inflight N]
                     [--disabled] [--replace] [--set KEY=VALUE]... [--json] [--config FILE]
  embedpool set-alias --model M --alias A [--json] [--config FILE]
  embedpool enable --model M [--json] [--config FILE]
  embedpool disable --model M [--json] [--config FILE]
  embedpool unregister --model M [--json] [--config FILE]
  embedpool embed [--model M] [--set KEY=VALUE]... [--config FILE] [--] TEXT...
  embedpool key create [--name NAME] [--scopes NAMES] [--models NAMES] [--weight W] [--requests-per-s N]
                       [--texts-per-s N] [--concurrent N] [--json] [--config FILE]
  embedpool key list [--json] [--config FILE]
  embedpool key revoke --id ID [--json] [--config FILE]
  embedpool --help
  embedpool --version

Commands:
  init          Write config.yml, pool.yml and the folders they name. Never overwrites a file.
  pool start    Serve in the foreground until Ctrl-C, or with --detach in the background.
  pool stop     Let the server finish what it has accepted, then end it.
  pool status   Models, their states, queues and counters.
  pool health   Whether the server answers.
  register      Add a model and wait until it is ready. The same registration twice is a success.
  set-alias     Give a model a second name; --alias "" takes it away.
  enable        Switch a model on and wait until it is ready.
  disable       Switch a model off; it keeps its place.
  unregister    Remove a model.
  key create    Make an API key and print it, this once; the server's file holds its hash. With the first key of
                scope embed every request needs one, with the first of scope admin management does.
  key list      The keys, without what is secret.
  key revoke    Take a key away; a running server knows within a second.
  embed         Print the vectors of texts, a JSON list a line; with - the texts are the lines of standard input.

  Without a running server, register, set-alias, enable, disable and unregister edit pool.yml.

Options:
  --config FILE       Settings. Default: $EMBEDPOOL_CONFIG, else .config/config.yml.
  --root DIR          Folder for everything init writes [default: .config].
  --detach            Start in the background; returns when the server answers.
  --server NAME       gunicorn or waitress; default server.server.
  --host H            Address to bind; default server.host.
  --port P            Port to bind; default server.port.
  --threads N         Request threads; default server.threads.
  --insecure          Listen beyond this machine although there is no key.
  --model M           Name of a model, for a local one its Hugging Face id; where it exists already, or its alias.
                      embed needs none where there is only one.
  --type T            local_st, http or fake.
  --alias A           Second name of the model.
  --place P           Where a local model runs: in a thread of the server, or in a child process.
  --max-seq-length N  Tokens kept of a text (local_st, fake).
  --normalize         Vectors of length 1; this is the default.
  --no-normalize      Vectors as the model gives them.
  --dtype D           Type of the vectors given out: float32 or float16.
  --base-url URL      Address of the remote service (http).
  --remote-model R    The model's name there (http).
  --timeout-s S       Longest wait for one answer of it, in seconds (http).
  --protocol P        What it speaks: embedpool, openai or tei (http).
  --min N             Replicas kept; 0 loads on first use.
  --max N             Replicas at most.
  --idle-ttl-s S      Seconds after which an idle replica above --min goes.
  --queue-max N       Bound of the model's queue, in texts.
  --inflight N        Batches at once in a replica.
  --disabled          Register without serving it.
  --replace           Replace a model registered with a different spec.
  --set KEY=VALUE     Any other key of driver.config, with embed an option of it; the value is read as YAML.
  --name NAME         Whose key it is.
  --scopes NAMES      embed, admin or both, with a comma between [default: embed].
  --models NAMES      Names or aliases the key is for, with commas between; default all.
  --weight W          Share of the key in the fair queue; default 1.
  --requests-per-s N  Requests a second that the key may send.
  --texts-per-s N     Texts a second that the key may send.
  --concurrent N      Requests at once that the key may have.
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
from embedpool.cli import embed, keys, models, server
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
        "embed": embed.embed,
    }
    return next(function for name, function in commands.items() if arguments[name])


def _wrong_usage(argv: list[str]) -> str:
    """What is wrong with a command line that docopt refused, in a sentence, and the usage it should have had."""
    usage = __doc__.split("Usage:\n")[1].split("\n\n")[0]
    commands = [entry.strip() for entry in re.split(r"\n  (?=embedpool )", "\n" + usage) if entry.strip()]
    names = [re.match(r"embedpool ((?:pool |key )?\w[\w-]*)", entry) for entry in commands]
    known = {match[1]: entry for match, entry in zip(names, commands, strict=True) if match}
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    name = " ".join(words[:2] if words[:1] in (["pool"], ["key"]) else words[:1])
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
    needed = re.findall(r"--[a-z-]+", re.sub(r"\[[^][]*\]", "", known[name]))
    missing = [option for option in needed if option not in given]
    if missing:
        return f"embedpool: {name} needs {' and '.join(missing)}\n{known[name]}"
    return f"embedpool: {name} lacks something, or its options do not go together\n{known[name]}"
