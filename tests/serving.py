"""What tests of servers have in common: a model, prompts, what it answers, and how long a machine may take for it."""

import json
import socket
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "examples" / "checkpoints" / "yan-transformer-tiny")
PROMPT = "Where is the apple? Mary went to the kitchen. Mary took the apple."
ANSWER = "The apple is in the kitchen."
PROMPTS = [PROMPT, "Who has the hat? Anna took the hat.", "Where is Tom? Tom went to the garden.", "Who is lucky?"]
START_S, ANSWER_S = 400, 60  # of a machine that does other things, too


def body(**fields) -> bytes:
    """The body of a request."""
    return json.dumps({"prompt": PROMPT, **fields}).encode()


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
