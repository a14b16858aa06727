"""The server as a deployment of Ray Serve: replicas on one machine or many, scaled by load, updated one by one.

    pip install "layerskip[serve]" "ray[serve]"
    serve run examples.ray_serve:app                                   # or, with other settings:
    python -c "from ray import serve; from examples.ray_serve import built; serve.run(built('./mine', most=4))"

Each replica loads the model, warms up before it is given requests, and answers Ray's health checks from its
worker. A replica that goes away finishes what it has. One that dies takes its running streams with it; Ray sends a
request to another replica only if it had not reached one, so clients retry (OpenAI's does so by itself, twice).
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI  # noqa: TC002 - Ray reads the annotation
from ray import serve

from layerskip.decode.load import load
from layerskip.serve.app import create_app
from layerskip.serve.metrics import Metrics
from layerskip.serve.service import Service
from layerskip.serve.settings import ServeOptions

# Behind a proxy the address is the proxy's: host says that others may call.
DEFAULTS = {"host": "0.0.0.0", "rows": 4, "context": 1024}


def made(model: str, loading: dict[str, Any], settings: dict[str, Any], key: str | None) -> FastAPI:
    """Load a model and make its application, warm."""
    name = settings.get("name") or model
    metrics = Metrics(name)
    service = Service(
        load(model, progress=False, **loading), ServeOptions(**DEFAULTS | settings), name, metrics
    )
    service.start()
    return create_app(service, metrics, key)


def built(
    model: str = "smollm2-135m",
    *,
    least: int = 1,
    most: int = 2,
    at_once: int = 8,
    cpus: float = 1,
    loading: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    key: str | None = None,
) -> serve.Application:
    """Describe the deployment: from `least` to `most` replicas, one more for every `at_once` requests under way."""
    holder: dict[str, FastAPI] = {}

    def app() -> FastAPI:
        if "app" not in holder:  # in the replica's process
            holder["app"] = made(model, loading or {"threads": max(1, int(cpus))}, settings or {}, key)
        return holder["app"]

    @serve.deployment(
        name="layerskip",
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=4 * at_once,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=120,
        autoscaling_config={
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": at_once,
            "upscale_delay_s": 3, "downscale_delay_s": 60,
        },
    )  # fmt: skip
    @serve.ingress(app)
    class Replica:
        async def check_health(self) -> None:
            """Raise where the worker has ended; Ray starts another replica then."""
            worker = app().state.service.worker
            if not worker.healthy:
                raise RuntimeError(f"the worker has ended: {worker.fault!r}")

        async def __del__(self) -> None:
            await asyncio.to_thread(app().state.service.worker.drain, 110)

    return Replica.bind()


app = built()
__all__ = ["app", "built"]
