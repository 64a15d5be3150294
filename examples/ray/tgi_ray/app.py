"""The application: ``serve run tgi_ray.app:build replicas=2 arguments="--model-id org/model"``."""

from __future__ import annotations

import os
import shlex

from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from tgi_gateway.settings import Settings
from tgi_ray.ingress import Ingress
from tgi_ray.replica import Replica
from tgi_ray.router import PrefixRouter

MARGIN_S = 10.0
"""What an orderly end of a server may take beyond the time that its requests get."""
ROOM = 1_000_000
"""Requests that Serve lets in: far more than there are, because the servers know better when they are full."""


class Options(BaseModel, extra="forbid"):
    """What `serve run` takes as NAME=VALUE, and a file of `serve deploy` under `args`."""

    arguments: str = ""
    """The flags of each server, as on `tgi-gateway`'s command line. Secrets belong into `variables`."""
    variables: dict[str, str] = {}
    """Its environment variables, e.g. API_KEY."""
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    """Of each replica: where Ray may place it, and no bound on what it uses."""
    gpus: float = Field(0.0, ge=0)
    """Of each replica; Ray tells it which by CUDA_VISIBLE_DEVICES."""
    ingresses: int = Field(1, ge=1)
    """Each learns by itself which replica has which prefix."""
    slack: int = Field(8, ge=0)
    """A prefix is followed to a replica with up to ``slack + factor * (the fewest of any)`` open requests."""
    factor: float = Field(1.5, ge=1)
    remembered_blocks: int = Field(65_536, ge=1)
    """Of 128 bytes of prompt, per replica, in each ingress: 65,536 are 8 MiB of prompts and take about 10 MB."""


def build(options: Options) -> Application:
    """Raises `SettingsError` for flags that no server would take."""
    arguments = shlex.split(options.arguments)
    settings = Settings.parse(arguments, {**os.environ, **options.variables})
    stop_s = settings.shutdown_timeout + MARGIN_S
    replicas = serve.deployment(Replica).options(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=ROOM,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + stop_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "max_blocks": options.remembered_blocks,
                "slack": options.slack,
                "factor": options.factor,
            },
        ),
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=options.ingresses,
        max_ongoing_requests=ROOM,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )
    return ingress.bind(replicas.bind(arguments, options.variables, stop_s), settings.payload_limit)
