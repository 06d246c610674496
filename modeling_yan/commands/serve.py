"""`yan serve`: a model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from importlib import import_module

from .loading import load_config, prepare_library
from .parsing import Commands, add_command, add_model, whole_number

KEY = "YAN_API_KEY"  # an environment variable: words of a command line are seen by every user of a machine
EXAMPLES = """  yan serve MODEL
  yan serve MODEL --port 9000 --replicas 2 --threads 1
  YAN_API_KEY=secret yan serve MODEL --host 0.0.0.0

  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"model": "MODEL", "prompt": "Who has the hat? Anna took the hat."}'"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    purpose = "Answer OpenAI's clients over HTTP, on this machine alone unless told otherwise."
    parser = add_command(commands, "serve", serve, purpose, EXAMPLES)
    add_model(parser)
    parser.add_argument("--name", help="what clients call the model; MODEL if not given")
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"), help="who may connect")
    parser.add_argument("--port", type=whole_number(1024, 65535), default=8000, help="where")
    parser.add_argument("--device", default="auto", help="such as cpu, cuda or cuda:0; auto takes all GPUs there are")
    parser.add_argument("--replicas", type=whole_number(1), default=1, help="models a device, each in its own process")
    parser.add_argument(
        "--threads", type=whole_number(1), help="CPU threads of a replica; torch's choice if not given"
    )
    parser.add_argument(
        "--batch_size", type=whole_number(1), default=32, help="most requests that are answered together"
    )
    parser.add_argument("--batch_wait_ms", type=whole_number(1), default=5, help="how long the first waits for others")
    parser.add_argument("--max_queue", type=whole_number(1), default=256, help="open requests; others get status 429")
    parser.add_argument("--max_body", type=whole_number(1), default=2**20, help="bytes of a request")
    parser.add_argument("--max_new_tokens", type=whole_number(1), default=1024, help="most that a request may ask for")
    parser.add_argument("--max_prompt_tokens", type=whole_number(1), help="longest prompt; the model's if not given")
    parser.add_argument("--timeout_s", type=whole_number(1), default=60, help="seconds until a request is given up")


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    prepare_library(is_quiet=not options.debug)
    load_config(options.model)
    try:
        server = import_module("modeling_yan.serving.server")
    except ImportError as error:
        message = f"a server needs packages of the extra `serve`: pip install 'modeling-yan[serve]' ({error})"
        raise ImportError(message) from error
    names = "model name device threads replicas batch_size max_queue max_body timeout_s max_new_tokens".split()
    settings = {name: getattr(options, name) for name in (*names, "max_prompt_tokens")}
    settings |= {"batch_wait_s": options.batch_wait_ms / 1000, "api_key": os.environ.get(KEY) or None}
    if options.host != "127.0.0.1" and settings["api_key"] is None:
        print(f"yan serve: whoever reaches {options.host} may ask: set {KEY} for a key", file=sys.stderr)
    print(f"yan serve: http://{options.host}:{options.port}/v1, until Ctrl-C", file=sys.stderr, flush=True)
    server.serve(server.Settings(**settings), options.host, options.port)
