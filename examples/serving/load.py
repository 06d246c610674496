"""Load `yan serve` on loopback: requests a second and latency, beside an AR model of equal size; or a long soak.

    python examples/serving/load.py --output docs/benchmarks/serving.json
    python examples/serving/load.py --soak --minutes 20 --output docs/benchmarks/serving.json
    python examples/serving/load.py --page docs/guides/serve.md --output docs/benchmarks/serving.json

The load is on two models with fresh weights and one server: YAN of a preset, and a decoder with as many parameters.
Both write texts of the same number of tokens. The soak is on a bundled model, so that every text can be checked.
"""

import argparse
import http.client
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import make_baseline

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "examples" / "checkpoints" / "yan-transformer-tiny"
CLIENTS = (1, 8, 64)
TIMEOUT_S = 60
ROUNDS = 3
MAX_BODY = 20_000
PLACES = ("kitchen", "garden", "office", "hall")
PROMPTS = [f"Where is the apple? Mary went to the {place}. Mary took the apple." for place in PLACES]
BEGIN, END = "<!-- serving -->", "<!-- end of serving -->"
SERVE = """
import json, sys
from modeling_yan.serving.server import Settings, serve
serve(Settings(**json.loads(sys.argv[1])), port=int(sys.argv[2]))
"""
# what a client of the soak does, and how often
MANNERS = {"whole": 70, "stream": 15, "vanish": 5, "slow": 5, "oversized": 5}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="yan-transformer-tiny", help="folder in configuration/")
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS, help="numbers of clients at once")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of measurement, for each model and number of clients"
    )
    parser.add_argument("--length", type=int, default=40, help="tokens of a text")
    parser.add_argument("--replicas", type=int, default=1, help="models a server")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each replica")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda:0")
    parser.add_argument("--soak", action="store_true", help="clients that vanish, read slowly or send too much")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak")
    parser.add_argument("--page", type=Path, help="measure nothing: write the figures into this page")
    parser.add_argument("--output", type=Path, required=True, help="JSON; what it has of the other kind stays")
    return parser.parse_args(arguments)


def make_models(preset: str, length: int, folder: Path) -> dict[str, dict]:
    """Folders of a YAN and of a decoder of equal size, with fresh weights and the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    config = YanConfig.from_pretrained(ROOT / "configuration" / preset)
    config = config.with_fields(vocab_size=len(tokenizer), canvas_length=length)
    torch.manual_seed(0)
    made = {"yan": YanForFlowGeneration(config), "decoder": make_baseline("decoder", config)}
    for name, model in made.items():
        # no text ends early
        options = {"max_new_tokens": length, "suppress_tokens": [config.eos_token_id], "do_sample": False}
        for option, value in options.items():
            setattr(model.generation_config, option, value)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: {"path": str(folder / name), "parameters": model.num_parameters()} for name, model in made.items()}


@contextmanager
def running(**settings):
    """A server on a free port, as its process and the port; its end is waited for."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-c", SERVE, json.dumps({"name": "model", "max_body": MAX_BODY, **settings}), str(port)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"})
    try:
        while ask(port, "GET", "/health")[0] != 200:
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.2)
        yield process, port
    finally:
        tree = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for left in tree:
            with suppress(psutil.Error, ProcessLookupError):
                left.kill()


def ask(port: int, method: str, path: str, fields: dict | None = None, connection=None) -> tuple[int, bytes]:
    """Status and body of an answer; status 0 where there is none."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        own.request(method, path, None if fields is None else json.dumps(fields), {"Content-Type": "application/json"})
        answer = own.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        own.close()
        return 0, b""
    finally:
        if connection is None:
            own.close()


def in_threads(number: int, work):
    """Do the work, a function of its number, in so many threads at once."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass
class Load:
    """What clients got that ask one request after the other."""

    latencies: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0

    def measure(self, port: int, clients: int, seconds: float, length: int):
        """Ask for so long."""
        start = time.monotonic()

        def work(number):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            while (began := time.monotonic()) - start < seconds:
                fields = {"model": "model", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": length}
                status, content = ask(port, "POST", "/v1/completions", fields, connection)
                if status == 200 and json.loads(content)["usage"]["completion_tokens"] == length:
                    self.latencies.append(time.monotonic() - began)
                else:
                    self.failed += 1
            connection.close()

        in_threads(clients, work)
        self.seconds += time.monotonic() - start

    def summary(self) -> dict:
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        rate = len(self.latencies) / self.seconds
        return {
            "requests": len(self.latencies),
            "failed": self.failed,
            "requests_per_s": round(rate, 2),
            "p50_s": round(cuts[49], 4),
            "p99_s": round(cuts[98], 4),
        }


def load(options) -> dict:
    """The figures of both models, in rounds by turns, so that what slows the machine down slows both."""
    chosen = {name: getattr(options, name) for name in ("device", "replicas", "threads")}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models, ports = make_models(options.preset, options.length, Path(folder)), {}
        for name, model in models.items():
            server = running(model=model.pop("path"), batch_size=64, max_new_tokens=options.length, **chosen)
            ports[name] = stack.enter_context(server)[1]
            Load().measure(ports[name], max(options.clients), 1, options.length)  # warm
            model["clients"] = {}
        for clients in options.clients:
            loads = {name: Load() for name in models}
            for _ in range(ROUNDS):
                for name, port in ports.items():
                    loads[name].measure(port, clients, options.seconds / ROUNDS, options.length)
            for name, found in loads.items():
                models[name]["clients"][clients] = found.summary()
    return {"preset": options.preset, "length": options.length, "replicas": options.replicas, "models": models}


class Soak:
    """Clients that behave in many ways, and what became of their requests."""

    def __init__(self, port: int, expected: dict[str, str], seconds: float):
        self.port, self.expected, self.end, self.found = port, expected, time.monotonic() + seconds, Counter()

    def work(self, number: int):
        random_ = random.Random(number)
        while time.monotonic() < self.end:
            manner = random_.choices(list(MANNERS), list(MANNERS.values()))[0]
            prompt = random_.choice(PROMPTS)
            self.found[f"{manner}: {getattr(self, manner)(prompt)}"] += 1

    def whole(self, prompt) -> str:
        status, content = ask(self.port, "POST", "/v1/completions", {"model": "model", "prompt": prompt})
        return self._judge(status, prompt, lambda: json.loads(content)["choices"][0]["text"])

    def stream(self, prompt) -> str:
        fields = {"model": "model", "prompt": prompt, "stream": True, "drafts": True}
        status, content = ask(self.port, "POST", "/v1/completions", fields)
        return self._judge(status, prompt, lambda: _text_of_events(content))

    def oversized(self, prompt) -> str:
        status, _ = ask(self.port, "POST", "/v1/completions", {"model": "model", "prompt": prompt * 1000})
        return "refused" if status in (0, 413) else f"status {status}"  # 0: closed while it was still being sent

    def vanish(self, prompt) -> str:
        with self._sent(prompt):
            return "gone"

    def slow(self, prompt) -> str:
        content = b""
        with self._sent(prompt) as connection:
            while (piece := connection.recv(64)) and not content.endswith(b"[DONE]\n\n"):
                content += piece
                time.sleep(0.05)
        status = int(content.split(b" ")[1]) if content else 0
        return self._judge(status, prompt, lambda: _text_of_events(content))

    @contextmanager
    def _sent(self, prompt):
        """A connection over which a stream was asked for."""
        body = json.dumps({"model": "model", "prompt": prompt, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S) as connection:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            yield connection

    def _judge(self, status: int, prompt: str, read) -> str:
        if status != 200:
            return "lost" if status in (0, 500, 502, 504) else f"status {status}"
        return "right" if read() == self.expected[prompt] else "wrong"


def _text_of_events(content: bytes) -> str:
    lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice.get("text", "") for line in lines for choice in json.loads(line).get("choices", ()))


def soak(options) -> dict:
    """Counts of a soak, and the memory of all processes at its beginning and end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    expected = {prompt: write_alone(model, tokenizer, prompt) for prompt in PROMPTS}
    chosen = {name: getattr(options, name) for name in ("device", "replicas", "threads")}
    with running(model=str(BUNDLED), batch_size=64, **chosen) as (process, port):
        measured, soak_ = [], Soak(port, expected, options.minutes * 60)
        crowd = threading.Thread(target=in_threads, args=(max(options.clients), soak_.work))
        crowd.start()
        while crowd.is_alive():
            crowd.join(options.minutes * 60 / 40)
            measured.append(memory_mib(process.pid))
    quarter = max(len(measured) // 4, 1)
    memory = {"second_quarter": measured[quarter : 2 * quarter], "last_quarter": measured[-quarter:]}
    means = {f"mib_{name}": round(statistics.mean(found)) for name, found in memory.items() if found}
    counts = dict(sorted(soak_.found.items()))
    return {"minutes": options.minutes, "clients": max(options.clients), "counts": counts, **means}


def write_alone(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.decode(model.generate(**inputs, return_prompt=False)[0], skip_special_tokens=True)


def memory_mib(pid: int) -> float:
    """Of a process and all that it started."""
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().uss
    return total / 2**20


def about() -> dict:
    """Command, machine and date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    machine = f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
    command = " ".join(["python", "examples/serving/load.py", *sys.argv[1:]])
    date = datetime.now(timezone.utc).date().isoformat()
    load_average = round(os.getloadavg()[1], 1)  # before there is any load of ours
    return {
        "command": command,
        "machine": machine,
        "load_average": load_average,
        "torch": torch.__version__,
        "date": date,
    }


def section(figures: dict) -> str:
    """The figures as the section of a page."""
    lines = [BEGIN]
    if "load" in figures:
        found = figures["load"]
        lines += ["| clients | model | requests/s | p50 | p99 |", "|---|---|---|---|---|"]
        names = {"yan": "YAN", "decoder": "AR decoder"}
        for clients in next(iter(found["models"].values()))["clients"]:
            for name, model in found["models"].items():
                row = model["clients"][clients]
                times = f"{row['p50_s']:.3f} s | {row['p99_s']:.3f} s"
                lines.append(f"| {clients} | {names[name]} | {row['requests_per_s']} | {times} |")
        lines += ["", _origin(found)]
    if "soak" in figures:
        found = figures["soak"]
        lines += ["", f"{found['minutes']:g} minutes at {found['clients']} clients, some of which vanish, read slowly"]
        lines += ["or send too much. What each did, what came of it, and how often:"]
        lines += ["; ".join(f"{name} {number}" for name, number in found["counts"].items()) + "."]
        memory = [f"{found[name]} MiB" for name in ("mib_second_quarter", "mib_last_quarter") if name in found]
        lines += [f"Memory of all processes, mean of the second quarter and of the last: {', '.join(memory)}."]
        lines += ["", _origin(found)]
    return "\n".join([*lines, END])


def _origin(found: dict) -> str:
    return f"`{found['command']}`; {found['machine']}, load average {found['load_average']} before; {found['date']}."


def write_page(page: Path, figures: dict):
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + section(figures) + rest.split(END)[1], encoding="utf-8")


def main(arguments=None):
    options = parse_arguments(arguments)
    figures = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.page:
        write_page(options.page, figures)
        return
    origin = about()
    name, measure_all = ("soak", soak) if options.soak else ("load", load)
    figures[name] = {**origin, **measure_all(options)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures[name], indent=1))


if __name__ == "__main__":
    main()
