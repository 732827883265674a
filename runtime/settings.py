"""What the engine is told, and where each value came from: defaults < tuned < recipe < env < flag.

Names are llama.cpp's. Every value comes with its origin and, where one was computed, its reason, so that a
plan can show all three.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from toolchain.base.errors import UsageError
from toolchain.base.machine import Machine

Origin: TypeAlias = Literal["default", "tuned", "recipe", "env", "flag"]
Value: TypeAlias = int | str

DEFAULT_N_CTX: Final = 4096
"""Tokens of context unless asked otherwise: a long conversation, and 0.5 GiB of f16 cache at 8B parameters."""

ALL_LAYERS: Final = -1
"""llama.h: a negative ``n_gpu_layers`` means all layers."""

KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Cache types that llama.cpp's own tools accept (``kv_cache_types`` in common/arg.cpp)."""

OUTPUT_ROWS: Final = 16
"""Rows of logits that a context is made for: the drawn token and a draft of 15, or one for each of 16 sequences."""

MOST_SEQUENCES: Final = OUTPUT_ROWS
"""Replies that are decoded together at most: each wants a row of logits."""

ENV_PREFIX: Final = "FOUNDRY_"

# The smallest value that makes sense; the largest keeps a number inside the C field that takes it.
_LEAST: Final[Mapping[str, int]] = MappingProxyType(
    {
        "n_ctx": 8,
        "n_gpu_layers": ALL_LAYERS,
        "n_threads": 1,
        "n_threads_batch": 1,
        "n_ubatch": 1,
        "n_batch": 1,
        "n_cpu_moe": 0,
    }
)
_MOST: Final = 2**31 - 1
_MOST_THREADS: Final = 512  # GGML_MAX_N_THREADS in ggml.h
NAMES: Final = (*_LEAST, "type_k", "type_v", "tensor_split")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value with its origin and the reason for it (may be empty)."""

    name: str
    value: Value
    origin: Origin
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The value of every name in ``NAMES``, in that order."""

    entries: tuple[Setting, ...]

    def __getitem__(self, name: str) -> Setting:
        return next(entry for entry in self.entries if entry.name == name)

    def number(self, name: str) -> int:
        value = self[name].value
        assert isinstance(value, int)
        return value

    def text(self, name: str) -> str:
        value = self[name].value
        assert isinstance(value, str)
        return value

    def as_json(self) -> list[dict[str, Value]]:
        """``{name, value, origin, reason}`` of each."""
        return [
            {"name": entry.name, "value": entry.value, "origin": entry.origin, "reason": entry.reason}
            for entry in self.entries
        ]


def settle(
    *,
    machine: Machine,
    n_ctx_train: int | None,
    tuned: Iterable[Setting] = (),
    recipe: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Value | None] | None = None,
) -> Settings:
    """Every setting, the strongest layer that names it winning.

    ``n_ctx_train`` is the context the model was trained with (None: its header does not say). Raises UsageError
    for a value that no layer may hold, naming the layer.
    """
    chosen = {setting.name: setting for setting in _defaults(machine, n_ctx_train)}
    chosen.update((setting.name, setting) for setting in tuned)
    chosen.update(asked(recipe=recipe, env=env, flags=flags))
    _match_batches(chosen)
    settings = Settings(entries=tuple(chosen[name] for name in NAMES))
    _check_together(settings, n_ctx_train)
    return settings


def asked(
    *,
    recipe: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Value | None] | None = None,
) -> dict[str, Setting]:
    """What somebody asked for, by name, the strongest layer winning: nothing else may change it."""
    layers = (_from_recipe(recipe or {}), _from_env(env or {}), _from_flags(flags or {}))
    return {setting.name: setting for layer in layers for setting in layer}


def parse_split(text: str) -> tuple[float, ...]:
    """The shares of a ``tensor_split``, one for each GPU; none for an empty text."""
    return tuple(float(part) for part in text.split(",")) if text else ()


def parse_value(name: str, raw: object, source: str) -> Value:
    """The value of setting ``name`` as ``source`` spells it, checked on its own."""
    if name == "tensor_split":
        return _parse_split(raw, source)
    if name in ("type_k", "type_v"):
        spelled = str(raw).lower()
        if spelled not in KV_TYPES:
            raise UsageError(
                f"{source}: {raw!r} is not a cache type",
                evidence=f"known types: {', '.join(KV_TYPES)}",
                hint=near_miss(spelled, KV_TYPES) or "f16 is the default, q8_0 halves the cache",
            )
        return spelled
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise UsageError(f"{source}: {name} is a whole number, not {raw!r}")
    if name == "n_gpu_layers" and isinstance(raw, str) and raw.strip().lower() == "all":
        return ALL_LAYERS
    try:
        value = int(raw)
    except ValueError:
        raise UsageError(
            f"{source}: {name} is a whole number, not {raw!r}",
            hint="`all` or a number of layers" if name == "n_gpu_layers" else f"for example {name}=4096",
        ) from None
    most = _MOST_THREADS if name.startswith("n_threads") else _MOST
    if not _LEAST[name] <= value <= most:
        raise UsageError(f"{source}: {name} is {value}; it must lie between {_LEAST[name]} and {most}")
    return value


def _parse_split(raw: object, source: str) -> str:
    """Shares such as ``3,1``, one for each GPU, as llama.cpp's --tensor-split takes them."""
    spelled = str(raw).replace("/", ",").replace(" ", "")
    try:
        shares = parse_split(spelled)
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share < _MOST for share in shares) or not any(shares):
        raise UsageError(f"{source}: {raw!r} are no shares", hint="one number for each GPU, such as 3,1")
    return spelled


def sequences_made(asked: int) -> int:
    """``n_seq_max`` of a context for ``asked`` replies at once: of several, one more holds their common beginning."""
    return 1 + min(asked, MOST_SEQUENCES) if asked > 1 else 1


def near_miss(word: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for the closest known word, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _defaults(machine: Machine, n_ctx_train: int | None) -> tuple[Setting, ...]:
    n_ctx = min(n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
    trained = f"the model was trained with {n_ctx_train}" if n_ctx_train else "the model names no limit"
    gpus = ", ".join(gpu.name for gpu in machine.gpus)
    return (
        Setting(name="n_ctx", value=n_ctx, origin="default", reason=trained),
        Setting(
            name="n_gpu_layers",
            value=ALL_LAYERS if gpus else 0,
            origin="default",
            reason=f"all layers on {gpus}" if gpus else "no GPU on this machine",
        ),
        Setting(name="n_threads", value=machine.compute_threads, origin="default"),
        Setting(name="n_threads_batch", value=machine.usable_cpus, origin="default"),
        Setting(name="n_ubatch", value=512, origin="default", reason="llama.cpp's default"),
        Setting(name="n_batch", value=2048, origin="default", reason="llama.cpp's default"),
        Setting(name="type_k", value="f16", origin="default", reason="llama.cpp's default"),
        Setting(name="type_v", value="f16", origin="default", reason="llama.cpp's default"),
        Setting(name="n_cpu_moe", value=0, origin="default", reason="experts lie with their layers"),
        Setting(name="tensor_split", value="", origin="default", reason="all layers on one device"),
    )


def _from_recipe(recipe: Mapping[str, object]) -> list[Setting]:
    """The recipe's ``runtime`` block; its ``kv_type`` names both cache types."""
    wanted = {name: value for name, value in recipe.items() if name != "kv_type" and value is not None}
    if (kv_type := recipe.get("kv_type")) is not None:
        wanted = {"type_k": kv_type, "type_v": kv_type, **wanted}
    found = []
    for name, value in wanted.items():
        if name not in NAMES:
            raise UsageError(
                f"the recipe's runtime block sets {name!r}, which is no setting",
                hint=near_miss(name, (*NAMES, "kv_type")) or f"settings: {', '.join((*NAMES, 'kv_type'))}",
            )
        found.append(Setting(name=name, value=parse_value(name, value, "recipe"), origin="recipe"))
    return found


def _from_env(env: Mapping[str, str]) -> list[Setting]:
    found = []
    for name in NAMES:
        variable = f"{ENV_PREFIX}{name.upper()}"
        if raw := env.get(variable, "").strip():
            value = parse_value(name, raw, variable)
            found.append(Setting(name=name, value=value, origin="env", reason=variable))
    return found


def _from_flags(flags: Mapping[str, Value | None]) -> list[Setting]:
    found = []
    for name, raw in flags.items():
        if raw is not None:
            option = f"--{name.replace('_', '-')}"
            found.append(Setting(name=name, value=parse_value(name, raw, option), origin="flag", reason=option))
    return found


def _match_batches(chosen: dict[str, Setting]) -> None:
    """A default batch size follows the other one when that was asked for."""
    batch, ubatch = chosen["n_batch"], chosen["n_ubatch"]
    if int(ubatch.value) <= int(batch.value):
        return
    if batch.origin == "default":
        chosen["n_batch"] = Setting(name="n_batch", value=ubatch.value, origin="default", reason="as n_ubatch")
    elif ubatch.origin == "default":
        chosen["n_ubatch"] = Setting(name="n_ubatch", value=batch.value, origin="default", reason="as n_batch")


def _check_together(settings: Settings, n_ctx_train: int | None) -> None:
    n_ctx = settings["n_ctx"]
    if n_ctx_train is not None and int(n_ctx.value) > n_ctx_train:
        raise UsageError(
            f"n_ctx {n_ctx.value} is more than the model has: it was trained with {n_ctx_train}",
            evidence=f"n_ctx={n_ctx.value} comes from {n_ctx.reason or n_ctx.origin}",
            hint=f"--n-ctx {n_ctx_train} is the most",
        )
    if settings.number("n_ubatch") > settings.number("n_batch"):
        raise UsageError(
            f"n_ubatch {settings.number('n_ubatch')} is more than n_batch {settings.number('n_batch')}",
            hint="a batch is cut into micro-batches: raise n_batch or lower n_ubatch",
        )
