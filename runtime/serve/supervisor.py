"""llama-server as a child: started, waited for, started again when it falls or hangs, stopped.

The child is ready when /health says so; it listens long before, and a model may take minutes to load. A long prompt is
no hang: /health is answered beside it. A child counts as hung when /health is silent and its processors are still.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from runtime.library_log import OUT_OF_MEMORY
from toolchain.base import console
from toolchain.base.errors import FoundryError, MemoryFitError
from toolchain.base.service import Service, start_service

if TYPE_CHECKING:
    import aiohttp

    from runtime.serve.upstream import State

_POLL_S: Final = 0.05
_CPU_OF_IDLE: Final = 0.02  # of a processor: a child that does less does nothing


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to start: ``env`` as of ``command.run``, without the key that the supervisor adds. ``router``: its models
    load after it answers.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None]
    log: Path
    what: str
    router: bool = False


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds: the first wait before a restart and the longest, the health that makes it short again, and how long
    /health may be silent while the child is still (ten times as long while it works). ``starts``: attempts in a row
    that may fail before it is given up.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    healthy_s: float = 60.0
    silent_s: float = 30.0
    ask_every_s: float = 5.0
    starts: int = 5


class Supervisor:
    """Keeps one llama-server running, from the main thread's event loop; it is the front's ``Upstream``."""

    def __init__(self, launch: Launch, patience: Patience | None = None) -> None:
        self.launch = launch
        self.patience = patience or Patience()
        self.state: State = "starting"
        self.base_url = "http://127.0.0.1:9"  # the port that discards, until there is a child
        self.api_key = ""
        self.restarts = 0
        self.load_s = 1.0
        self._until = 0.0  # when the next start is due, on the monotonic clock
        self._child: Service | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def retry_after_s(self) -> int:
        """The wait before the next start and what the last one took, at least a second."""
        return max(1, math.ceil(max(0.0, self._until - time.monotonic()) + self.load_s))

    @property
    def pid(self) -> int | None:
        """The child's process id, if one was started."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Start the child and wait until it serves.

        Raises CommandError when it ends before, MemoryFitError when memory ran out, MissingError without the program.
        """
        began = time.monotonic()
        if self._child is not None:
            self._child.kill()  # a router lives on when a model of its does not load
        self.launch.log.unlink(missing_ok=True)
        self.api_key = secrets.token_urlsafe(32)
        self._child = start_service(
            self.launch.argv,
            what=self.launch.what,
            log=self.launch.log,
            env={**self.launch.env, "LLAMA_API_KEY": self.api_key},
        )
        port = await self._port(self._child)
        self.base_url = f"http://127.0.0.1:{port}"
        while not await self._is_ready(self._child):
            await self._alive(self._child)
        self.load_s = time.monotonic() - began
        self.state = "ready"

    async def watch(self) -> None:
        """Start the child again whenever it falls or hangs; raises the last error once it cannot be started."""
        wait_s = self.patience.first_s
        while True:
            began = time.monotonic()
            failure = await self._until_down()
            self.state = "restarting"
            if time.monotonic() - began >= self.patience.healthy_s:
                wait_s = self.patience.first_s
            kept = self._kept_log()
            for attempt in range(1, self.patience.starts + 1):
                console.warn(f"{failure.message}; started again in {wait_s:g} s (log of the first fall: {kept})")
                self.restarts += 1
                self._until = time.monotonic() + wait_s
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self.patience.longest_s)
                try:
                    await self.start()
                except FoundryError as error:
                    failure = error
                    if attempt == self.patience.starts:
                        error.message += f"; given up after {attempt} starts"
                        error.args = (error.message,)
                        raise
                else:
                    console.say(f"llama-server serves again (process {self.pid})")
                    break

    async def stop(self, limit_s: float) -> None:
        """End the child: SIGTERM, and SIGKILL to all of it once ``limit_s`` are over."""
        self.state = "stopping"
        if self._child is not None:
            self._child.ask_to_end()
            deadline = time.monotonic() + limit_s
            while self._child.status() is None and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_S)
            self._child.kill()
        if self._session is not None:
            await self._session.close()

    def kill(self) -> None:
        """End the child at once."""
        self.state = "stopping"
        if self._child is not None:
            self._child.kill()

    async def _until_down(self) -> FoundryError:
        """Returns, once the child has ended or was killed because it hung, what happened."""
        child = self._child
        assert child is not None
        asked = time.monotonic()
        silent_since, busy_s = None, 0.0
        while child.status() is None:
            await asyncio.sleep(2 * _POLL_S)
            now = time.monotonic()
            if now - asked < self.patience.ask_every_s:
                continue
            asked = now
            if await self._get("/health") is not None:
                silent_since = None
            elif silent_since is None:
                silent_since, busy_s = now, _busy_s(child.pid)
            elif self._hangs(now - silent_since, _busy_s(child.pid) - busy_s):
                failure = child.failed(f"has not answered for {now - silent_since:.0f} s")
                child.kill()
                return failure
        return child.failed()

    def _hangs(self, silent_s: float, busy_s: float) -> bool:
        still = busy_s < _CPU_OF_IDLE * silent_s
        return silent_s > (self.patience.silent_s if still else 10 * self.patience.silent_s)

    async def _port(self, child: Service) -> int:
        """The port that the child itself listens on: nobody else can have taken it."""
        while True:
            for each in _listening(child.pid):
                return each
            await self._alive(child)

    async def _is_ready(self, child: Service) -> bool:
        if await self._get("/health") is None:
            return False
        if not self.launch.router:
            return True
        answer = await self._get("/models")
        states = [model["status"] for model in answer["data"]] if answer else []
        if failed := next((state for state in states if state.get("failed")), None):
            error = child.failed(f"could not load a model (status {failed.get('exit_code')})")
            raise _as_memory(error)
        return answer is not None and all(state["value"] != "loading" for state in states)

    async def _alive(self, child: Service) -> None:
        """Wait a little; raise the error of a child that has ended."""
        if child.status() is not None:
            raise _as_memory(child.failed())
        await asyncio.sleep(_POLL_S)

    async def _get(self, path: str) -> Any:
        """The JSON at ``path``, or None while there is none with status 200."""
        import aiohttp

        if self._session is None:
            limit = aiohttp.ClientTimeout(total=self.patience.ask_every_s)
            fresh = aiohttp.TCPConnector(force_close=True)  # llama-server closes idle ones, which is no silence
            self._session = aiohttp.ClientSession(connector=fresh, timeout=limit, trust_env=False)
        headers = {"Authorization": f"Bearer {self.api_key}"}
        try:
            async with self._session.get(self.base_url + path, headers=headers) as answer:
                return await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    def _kept_log(self) -> Path:
        """The log of a fallen child, moved beside the next one's."""
        kept = self.launch.log.with_suffix(".fallen.log")
        if self.launch.log.exists():
            self.launch.log.replace(kept)
        return kept


def _listening(pid: int) -> list[int]:
    """Loopback ports that process ``pid`` listens on."""
    try:
        found = psutil.Process(pid).net_connections(kind="tcp4")
    except psutil.Error:
        return []
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN and each.laddr.ip == "127.0.0.1"]


def _busy_s(pid: int) -> float:
    """Seconds of processor time that ``pid`` has had."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _as_memory(error: FoundryError) -> FoundryError:
    """MemoryFitError in place of ``error`` where its last lines say that memory ran out."""
    if not OUT_OF_MEMORY.search(error.evidence):
        return error
    hint = "lower --n-ctx or --parallel, put fewer layers on the GPU (--n-gpu-layers), or take a smaller model"
    return MemoryFitError(f"{error.message}: memory ran out", evidence=error.evidence, hint=hint)
