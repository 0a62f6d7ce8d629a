"""The router as a Ray Serve application: vLLM in Ray Serve LLM, with the OpenAI API in front.

All that touches Ray Serve LLM is here. Written against Ray 2.60.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from expertmesh.args import RouterArgs
from expertmesh.artifact.manifest import TRUNK_DIRECTORY, read_manifest
from expertmesh.config import EngineSection
from router_service.admission import Admission
from router_service.api_keys import ApiKeys
from router_service.connection import SETTINGS_KEY, RouterSettings
from router_service.error_shape import ErrorShape
from router_service.request_errors import handle_request_errors
from router_service.survival import surviving

DEPLOYMENT = "Router"
"""Ray Serve shows it as `LLMServer:Router`."""
INGRESS = "OpenAiIngress"
SPINS = "20000"
"""How often threads that share cores with replicas look for work before they sleep: for some hundred microseconds. By
default OpenMP's look for much longer, while the replicas wait."""
CPU_COMPILATION = {"custom_ops": ["-rotary_embedding"]}
"""vLLM 0.32's CPU kernel rotates the strided heads of MLA wrongly; its PyTorch form is right."""
EXECUTOR = "router_service.vllm_executor.InProcessExecutor"
WORKER = "router_service.vllm_worker.OverlappingWorker"
ENGINE = "router_service.engines.serve_engine.InProcessEngine"
GPU_COMPILATION = {"cudagraph_mode": "PIECEWISE"}
"""A CUDA graph cannot hold an exchange with replicas; the plugin splits the graphs there."""


class Ingress(OpenAiIngress):  # type: ignore[misc]  # Ray has no types here
    """Ray Serve LLM's, whose answers survive the end of a router where they can."""

    def _get_response(self, **request: Any) -> AsyncIterator[Any]:
        ask = super()._get_response
        return surviving(lambda: ask(**request))


def build(args: dict[str, Any]) -> Application:
    """The application; `args` are RouterArgs. Raises ArtifactError where there is no artifact."""
    given = RouterArgs.model_validate(args)
    config = llm_config(given)
    options = {**Ingress.get_deployment_options([config]), "name": INGRESS, "num_replicas": 1}
    options.pop("autoscaling_config", None)
    options["ray_actor_options"] = {"num_cpus": 1, "resources": dict(given.engine.resources)}  # beside the routers
    ingress = serve.deployment(make_fastapi_ingress(Ingress, app=http_app(given)), **options)
    return ingress.bind(
        llm_deployments={given.name: build_llm_deployment(config)},
        model_cards={given.name: to_model_metadata(given.name, config)},
        lora_paths={},
    )


def http_app(args: RouterArgs) -> FastAPI:
    """Ray Serve LLM's HTTP application, without routes yet, behind our middleware."""
    app: FastAPI = init()
    handle_request_errors(app)
    app.add_middleware(ErrorShape)
    engine = args.engine
    app.add_middleware(Admission, max_requests=engine.max_requests, max_body_bytes=int(engine.max_body_mib * 2**20))
    if args.api_keys is not None:
        app.add_middleware(ApiKeys, path=Path(args.api_keys))  # the last one added comes first
    return app


def llm_config(args: RouterArgs) -> LLMConfig:
    """Ray Serve LLM's configuration of one model: resources, engine arguments and the process's environment."""
    engine = args.engine
    return LLMConfig(
        model_loading_config={
            "model_id": args.name,
            "model_source": str((Path(args.artifact) / TRUNK_DIRECTORY).absolute()),
        },
        engine_kwargs=engine_arguments(args),
        deployment_config={"name": DEPLOYMENT, "num_replicas": 1},
        placement_group_config={"bundles": [_resources(engine.num_cpus, engine.num_gpus) | engine.resources]},
        runtime_env={"env_vars": environment(engine)},
    )


def engine_arguments(args: RouterArgs) -> dict[str, Any]:
    """vLLM's engine arguments: ours, over which the config's `engine.kwargs` go."""
    engine, manifest = args.engine, read_manifest(Path(args.artifact))
    settings = RouterSettings(
        directory=args.directory,
        directory_tls=args.tls,
        wait_for_experts_s=engine.wait_for_experts_s,
        degrade_after_s=engine.degrade_after_s,
        attention_threads=None if engine.num_gpus else engine.attention_threads,
        checksums=engine.checksums,
        tls=args.tls,
    )
    arguments: dict[str, Any] = {
        "dtype": manifest.dtype if engine.dtype == "auto" else engine.dtype,
        "distributed_executor_backend": EXECUTOR,
        "enforce_eager": not _compiles(engine) if engine.enforce_eager is None else engine.enforce_eager,
        "additional_config": {SETTINGS_KEY: settings.model_dump(mode="json")},
    }
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if not engine.num_gpus:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
        arguments["compilation_config"] = CPU_COMPILATION
        if engine.dbo_token_threshold is not None:
            arguments |= overlapping(engine.dbo_token_threshold)
    elif not arguments["enforce_eager"]:
        arguments["compilation_config"] = GPU_COMPILATION
    return arguments | engine.kwargs


def overlapping(threshold: int) -> dict[str, Any]:
    """Engine arguments with which steps of so many tokens run as two halves."""
    return {
        "worker_cls": WORKER,
        "dbo_decode_token_threshold": threshold,
        "dbo_prefill_token_threshold": threshold,
    }


def _compiles(engine: EngineSection) -> bool:
    """On CPUs, where torch.compile finds a C++ compiler. Graphs in pieces have not been tried on a GPU yet."""
    return not engine.num_gpus and shutil.which(os.environ.get("CXX", "g++")) is not None


def environment(engine: EngineSection) -> dict[str, str]:
    """Thread counts by resources, so that router and replicas do not fight for cores; and no look-ups in a hub."""
    threads = str(max(1, math.floor(engine.num_cpus)))
    variables = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"RAYLLM_VLLM_ENGINE_CLS": ENGINE, "VLLM_CONFIGURE_LOGGING": "0"}  # see vllm_logs
    if engine.num_gpus:
        return variables
    variables |= {"GOMP_SPINCOUNT": SPINS} if engine.attention_threads else {}
    return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _resources(num_cpus: float, num_gpus: float) -> dict[str, float]:
    return {"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}
