"""The server of `yan serve` on Ray Serve: replicas come when load grows and go when it falls, on one machine or many.

    pip install "modeling-yan[ray]"
    serve run modeling_yan.serving.ray_app:build model=examples/checkpoints/yan-transformer-tiny max_replicas=4

A front reads requests and answers them; writers have a model each, and batch what comes together. A writer that dies
is replaced, and what it took with it is handed to another one. The front must live: its open requests die with it.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from starlette.concurrency import iterate_in_threadpool

from .requests import Job
from .routes import ROUTES, Routes, checked, died, shape_errors, too_late
from .settings import Settings, make_reader, make_writer


class Options(BaseModel):
    """The words after `build`; `gpus` and `cpus` are of a writer."""

    model: str
    name: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    load: int = 16
    """Open requests of a writer that another one is started for."""
    upscale_delay_s: float = 10
    downscale_delay_s: float = 300
    gpus: float = 0
    cpus: float = 1
    batch_size: int = 32
    batch_wait_s: float = 0.005
    max_queue: int = 256
    timeout_s: float = 60


@serve.deployment
class Writer:
    """A model that answers batches."""

    def __init__(self, settings: Settings) -> None:
        self.writer = make_writer(settings, settings.device)
        self.write.set_max_batch_size(settings.batch_size)
        self.write.set_batch_wait_timeout_s(settings.batch_wait_s)

    @serve.batch()  # the sizes are set above
    async def write(self, jobs: list[Job]) -> AsyncIterator[list[Any]]:
        """Rounds of pieces, one list of them for every job, and the size of the batch first."""
        yield [[{"batch": len(jobs)}]] * len(jobs)
        async for round_ in iterate_in_threadpool(self.writer.write(jobs)):
            yield round_

    async def __call__(self, job: Job) -> AsyncIterator[list[Any]]:
        """Rounds of pieces of one job, which is answered with those that come at the same time."""
        async for pieces in self.write(job):
            yield pieces


class Ticket:
    """A job on its way to a writer, and what comes back of it."""

    def __init__(self, job: Job, writers: Any) -> None:
        self.job, self.writers, self.num_open_texts = job, writers, job.num_texts
        self.hand_in()

    def hand_in(self) -> None:
        self.response = self.writers.remote(self.job)


class RayRoutes(Routes):
    """The routes of `yan serve`, in front of the writers."""

    def __init__(self, settings: Settings, writers: Any) -> None:
        super().__init__(settings, make_reader(settings))
        self.writers = writers.options(stream=True)

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None, dependencies=[Depends(self.authorize)])
        for path, (method, name) in ROUTES.items():
            app.add_api_route(path, getattr(self, name), methods=[method])
        app.add_api_route("/health", lambda: "ok")
        shape_errors(app)
        return app

    def _submit(self, job: Job) -> Ticket:
        return Ticket(job, self.writers)

    async def _read(self, ticket: Ticket, deadline: float) -> AsyncIterator[dict[str, Any]]:
        """The pieces of a job, which is handed in again if its writer dies before a part of its text was sent."""
        has_begun = False
        while ticket.num_open_texts:
            try:
                pieces = await asyncio.wait_for(anext(ticket.response), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                raise too_late() from None
            except RayActorError:
                if has_begun:
                    raise died() from None
                ticket.hand_in()
                continue
            for piece in checked(pieces):
                if "batch" in piece:
                    self.metrics.batches.observe(piece["batch"])
                    continue
                has_begun = True
                ticket.num_open_texts -= bool(piece.get("finish"))
                yield piece


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})  # the cores are for the writers
@serve.ingress()
class Front:
    """What speaks HTTP."""

    def __init__(self, settings: Settings, writers: Any) -> None:
        self.routes = RayRoutes(settings, writers)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.routes.app()


def build(options: Options) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `serve.run`."""
    own = {name: getattr(options, name) for name in "model name batch_size batch_wait_s max_queue timeout_s".split()}
    device = "cuda" if options.gpus else "cpu"
    settings = Settings(**own, device=device, api_key=os.environ.get("YAN_API_KEY") or None)
    scaling = {"target_ongoing_requests": options.load}
    for name in ("min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"):
        scaling[name] = getattr(options, name)
    writers = Writer.options(
        autoscaling_config=scaling,
        max_ongoing_requests=2 * options.batch_size,  # one batch is generated while the next one gathers
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
    )
    return Front.bind(settings, writers.bind(settings))
