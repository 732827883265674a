"""A prepared model -> the llama-server command that serves it. Pure: nothing is started or read here.

What llama-server makes of its options (tools/server, common/arg.cpp and llama-context.cpp of 0c1e570): ``--ctx-size``
is the context of all slots together; without ``--kv-unified`` each has its own ``ctx-size / parallel`` tokens, rounded
up to 256 and never more than the model was trained with. A shared cache would let one client take another's room, and
would choose the rotary factors of long-context models by the sum.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.model_file import Purpose
    from runtime.settings import Settings

DEFAULT_PARALLEL: Final = 4
"""Clients that are answered at once unless asked otherwise (as in llama-server)."""
MOST_PARALLEL: Final = 256
"""LLAMA_MAX_SEQ in src/llama-cparams.h."""
MOST_CACHE_MIB: Final = 8192
"""Of finished prompts in the host's memory (--cache-ram), as in llama-server; less where the plan leaves less."""

Options: TypeAlias = tuple[tuple[str, str | None], ...]
"""(long name without dashes, value); None where the option takes none."""

_OWN: Final = ("LLAMA_", "AIP_", "MTMD_BACKEND_DEVICE", "HF_TOKEN", "FOUNDRY_API_KEY")
# Variables that change what llama-server does (LLAMA_ARG_*, AIP_* of Vertex), or are secrets that it has no need of.


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as it is to be served: ``parallel`` clients with ``settings["n_ctx"]`` tokens each.

    ``name`` is what clients call it, and ``aliases`` what else they may. ``lora`` are adapters with their scales;
    ``free_bytes`` of the host's memory are left by the plan.
    """

    name: str
    path: Path
    purpose: Purpose
    settings: Settings
    parallel: int
    aliases: tuple[str, ...] = ()
    lora: tuple[tuple[Path, float], ...] = ()
    mmproj: Path | None = None
    pooling: str | None = None
    free_bytes: int = 0

    @property
    def n_ctx(self) -> int:
        """Tokens of context for each client."""
        return self.settings.number("n_ctx")


@dataclass(frozen=True, kw_only=True)
class Door:
    """How the child is reached, and what it tells: the same for one model and for several."""

    ui: bool = False
    slots: bool = False
    verbose: bool = False


def model_options(model: Served) -> Options:
    """The options of one model, as they also stand in a preset."""
    settings = model.settings
    found: list[tuple[str, str | None]] = [
        ("model", str(model.path)),
        ("ctx-size", str(model.n_ctx * model.parallel)),
        ("parallel", str(model.parallel)),
        ("no-kv-unified", None),
        ("gpu-layers", _layers(settings.number("n_gpu_layers"))),
    ]
    if split := settings.text("tensor_split"):
        found.append(("tensor-split", split))
    if on_host := settings.number("n_cpu_moe"):
        found.append(("n-cpu-moe", str(on_host)))
    found += [
        ("threads", str(settings.number("n_threads"))),
        ("threads-batch", str(settings.number("n_threads_batch"))),
        ("batch-size", str(settings.number("n_batch"))),
        ("ubatch-size", str(settings.number("n_ubatch"))),
        ("cache-type-k", settings.text("type_k")),
        ("cache-type-v", settings.text("type_v")),
        ("fit", "off"),  # the plan has done that
        ("cache-ram", "0" if model.lora else str(cache_mib(model.free_bytes))),
    ]
    if model.lora:  # what was computed with other scales is not gone on from: see adapters.py
        found += [("lora-scaled", _scaled(model.lora)), ("no-cache-prompt", None)]
    if model.mmproj:
        found.append(("mmproj", str(model.mmproj)))
    if model.purpose == "embeddings":
        found.append(("embeddings", None))
    if model.pooling:
        found.append(("pooling", model.pooling))
    found.append(("jinja", None))
    return tuple(found)


def server_argv(program: Path, model: Served, door: Door) -> tuple[str, ...]:
    """The command that serves one model."""
    return (str(program), *spelled((*model_options(model), ("alias", model.name))), *spelled(door_options(door)))


def router_argv(program: Path, presets: Path, models_max: int, door: Door) -> tuple[str, ...]:
    """The command that serves the models of a preset file, ``models_max`` at a time."""
    own: Options = (("models-preset", str(presets)), ("models-max", str(models_max)))
    return (str(program), *spelled((*own, *door_options(door))))


def door_options(door: Door) -> Options:
    """Loopback, a port that the kernel gives (nobody can take it first), and nothing that fetches or tells much."""
    return (
        ("host", "127.0.0.1"),
        ("port", "0"),
        ("offline", None),
        ("metrics", None),
        ("slots" if door.slots else "no-slots", None),
        ("ui" if door.ui else "no-ui", None),
        ("log-colors", "off"),
        ("log-verbosity", "3" if door.verbose else "2"),
    )


def spelled(options: Options) -> tuple[str, ...]:
    """Options as arguments: ``--name``, and the value after it."""
    return tuple(
        part for name, value in options for part in ((f"--{name}",) if value is None else (f"--{name}", value))
    )


def child_environment(cache: Path) -> Mapping[str, str | None]:
    """What changes of the environment for the child (None: taken away); the key to it comes with each start.

    ``cache`` is a folder without models: a router would offer whatever it finds in llama.cpp's own.
    """
    foreign = {name: None for name in os.environ if name.startswith(_OWN)}
    return {**foreign, "LLAMA_CACHE": str(cache)}


def cache_mib(free_bytes: int) -> int:
    """Half of what the plan leaves, at most what llama-server would take."""
    return max(0, min(MOST_CACHE_MIB, free_bytes // 2 >> 20))


def _layers(count: int) -> str:
    return "all" if count < 0 else str(count)


def _scaled(adapters: tuple[tuple[Path, float], ...]) -> str:
    """``FILE:SCALE,...`` with llama-server's quoting of commas; it knows none for a colon."""
    row = io.StringIO()
    if unfit := next((path for path, _ in adapters if ":" in str(path)), None):
        raise UsageError(f"--lora {unfit}: llama-server takes no colon in an adapter's path", hint="rename the file")
    csv.writer(row, lineterminator="").writerow(f"{path}:{scale:.9g}" for path, scale in adapters)
    return row.getvalue()
