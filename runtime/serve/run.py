"""``serve`` from its start to its end: address, models, child, front, signals."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.serve import address, models, presets
from runtime.serve.command import Door, Served, child_environment, router_argv, server_argv
from runtime.serve.supervisor import Launch, Supervisor
from toolchain.base import console, files
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, MissingError, UsageError

if TYPE_CHECKING:
    from runtime.prepare import Request

CHILD_STOP_S: Final = 10.0
"""Seconds that llama-server has to end after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for. ``requests`` name the models; the rest is as on the command line (None: to be chosen)."""

    requests: Sequence[Request]
    host: str
    port: int
    api_key_file: Path | None
    allowed_hosts: frozenset[str]
    allowed_origins: frozenset[str]
    parallel: int | None
    max_queue: int
    drain_s: float
    ui: bool
    models_max: int | None
    allow_admin: bool
    pooling: str | None = None
    json: bool = False
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Service:
    """What runs: the models, how many of them at once, and the command."""

    models: tuple[Served, ...]
    at_once: int
    argv: tuple[str, ...]

    @property
    def clients(self) -> int:
        """Replies that are generated at once at most."""
        return sum(sorted((model.parallel for model in self.models), reverse=True)[: self.at_once])


def prepare_service(options: Options) -> Service:
    """Plan the models and the command; errors as of ``models.plan_model``, MissingError without llama-server."""
    program = find_server(ui=options.ui)
    door = Door(ui=options.ui, slots=options.allow_admin, verbose=options.verbose)
    if options.models_max is not None and options.models_max < 1:
        raise UsageError(f"--models-max {options.models_max}: at least one model has to be loaded")
    planned = [
        models.plan_model(request, parallel=options.parallel, pooling=options.pooling) for request in options.requests
    ]
    if len(planned) == 1:
        only = planned[0].model
        return Service(models=(only,), at_once=1, argv=server_argv(program, only, door))
    plans = [each.plan for each in planned]
    at_once = min(options.models_max or models.fits_together(plans), len(planned))
    models.require_together(plans, at_once)
    served = presets.distinct([each.model for each in planned])
    written = presets.written(presets.preset_ini(models.sharing(served, plans, at_once), at_start=at_once))
    return Service(models=served, at_once=at_once, argv=router_argv(program, written, at_once, door))


def find_server(*, ui: bool) -> Path:
    """The llama-server of the very build that llama_cpp runs on; MissingError without one, or without its page."""
    from runtime.bench.tools import find_tool
    from runtime.library_id import library_dir

    folder = library_dir()
    if folder is None:
        raise MissingError("llama_cpp is not installed", hint="run `./inv build`")
    found = find_tool("llama-server", folder)
    if isinstance(found, str):
        raise MissingError("there is no llama-server of the installed build", evidence=found, hint="run `./inv build`")
    if ui:
        made = files.read_json(found.path.parent.parent / "toolchain.json")
        if not isinstance(made, dict) or "ui" not in made.get("variants", ()):
            raise MissingError("this build has no web page", hint="`./inv build --ui` makes one with it")
    return found.path


def run(options: Options) -> int:
    """Serve until a signal; the exit code. Raises as ``prepare_service``, ``address.bind`` and ``Supervisor``."""
    keys = address.read_keys(options.api_key_file)
    address.require_key(options.host, keys, options.allowed_origins)
    sockets = address.bind(options.host, options.port)  # before minutes of planning and loading
    try:
        service = prepare_service(options)
        return asyncio.run(_serve(options, service, sockets, keys))
    finally:
        for each in sockets:
            each.close()


async def _serve(options: Options, service: Service, sockets: Sequence[socket.socket], keys: frozenset[str]) -> int:
    from aiohttp import web

    from runtime.serve.endpoints import DANGEROUS
    from runtime.serve.front import FrontConfig, drain, make_app, make_runner

    _allow_connections()
    port = int(sockets[0].getsockname()[1])
    supervisor = Supervisor(_launch(service, port))
    stop = _on_signals(supervisor)
    config = FrontConfig(
        host=options.host,
        port=port,
        api_keys=keys,
        allowed_hosts=options.allowed_hosts,
        allowed_origins=options.allowed_origins,
        parallel=service.clients,
        max_queue=options.max_queue,
        drain_s=options.drain_s,
        ui=options.ui,
        allowed_endpoints=frozenset(DANGEROUS) if options.allow_admin else frozenset(),
        adapters=tuple(scale for _, scale in service.models[0].lora),  # --lora belongs to one model alone
    )
    app = make_app(config, supervisor)
    runner = make_runner(app)
    watch: asyncio.Task[None] | None = None
    try:
        await runner.setup()
        try:
            for each in sockets:
                await web.SockSite(runner, each).start()
        except OSError as error:  # somebody listens there since
            raise address.cannot_listen(options.host, port, error) from error
        with console.step(f"load {', '.join(model.name for model in service.models)}"):
            if not await _unless(stop, supervisor.start()):
                return 0
        _tell_ready(options, service, supervisor, port)
        watch = asyncio.create_task(supervisor.watch())
        if not await _unless(stop, watch):
            watch.cancel()
            _notify("STOPPING=1")
            console.say(f"stopping: running replies have {options.drain_s:g} s to end (a second signal ends them now)")
            await drain(app)
        return 0
    finally:
        if watch is not None:
            watch.cancel()
        await supervisor.stop(CHILD_STOP_S)
        await runner.cleanup()


async def _unless(stop: asyncio.Event, work: Any) -> bool:
    """Whether ``work`` came to its end before ``stop``; it is cancelled then. Its error passes."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait((task,))
        return False
    finally:
        stopped.cancel()


def _launch(service: Service, port: int) -> Launch:
    logs = files.home_dir("logs")
    return Launch(
        argv=service.argv,
        env=child_environment(logs / "no-models"),
        log=logs / f"serve-{port}.log",
        what="serve",
        router=len(service.models) > 1,
    )


def _allow_connections() -> None:
    """As many open files as this user may have: each client takes one, and one more while it is answered."""
    with suppress(ValueError, OSError):  # macOS calls more unlimited than it gives
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _on_signals(supervisor: Supervisor) -> asyncio.Event:
    """Set by SIGTERM and SIGINT; the second one ends everything at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def told() -> None:
        if stop.is_set():
            supervisor.kill()
            os._exit(INTERRUPTED_EXIT_CODE)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    return stop


def _tell_ready(options: Options, service: Service, supervisor: Supervisor, port: int) -> None:
    url = address.url_of(options.host, port)
    each = "; ".join(
        f"{model.name}: {model.parallel} x {model.n_ctx} tokens"
        + (", vectors only" if model.purpose == "embeddings" else "")
        for model in service.models
    )
    loaded = f"; {service.at_once} models at once" if len(service.models) > 1 else ""
    console.say(f"ready: {url}/v1  {each}{loaded}; queue {options.max_queue}")
    for number, (path, scale) in enumerate(service.models[0].lora):
        console.say(f"adapter {number}: {path.name} at {scale:g}")
    if options.ui:
        console.say(f"page: {url}/")
    if options.json:
        console.answer_json(
            {
                "url": url,
                "host": options.host,
                "port": port,
                "models": [as_json(model) for model in service.models],
                "models_max": service.at_once,
                "parallel": service.clients,
                "max_queue": options.max_queue,
                "drain_s": options.drain_s,
                "pid": os.getpid(),
                "server_pid": supervisor.pid,
                "log": str(supervisor.launch.log),
            }
        )
    _notify(f"READY=1\nSTATUS={each}")


def as_json(model: Served) -> dict[str, Any]:
    """The model as ``--json`` shows it."""
    return {
        "name": model.name,
        "path": str(model.path),
        "purpose": model.purpose,
        "parallel": model.parallel,
        "n_ctx": model.n_ctx,
        "adapters": [
            {"id": number, "path": str(path), "scale": scale} for number, (path, scale) in enumerate(model.lora)
        ],
        "settings": model.settings.as_json(),
    }


def _notify(text: str) -> None:
    """Tell systemd, where it started us (sd_notify(3))."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        at = "\0" + place[1:] if place.startswith("@") else place
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sink:
            try:
                sink.sendto(text.encode(), at)
            except OSError as error:
                console.warn(f"systemd was not told: {error}")
