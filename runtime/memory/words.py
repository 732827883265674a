"""The reasons of a plan in words: why each value, and what would fit where this does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from runtime.memory.footprint import Demand, supported
from runtime.memory.kernels import is_fast
from runtime.memory.layout import Layout
from toolchain.base.console import format_bytes

if TYPE_CHECKING:
    from runtime.memory.plan import DevicePlan
    from runtime.memory.search import Choice, Search

# Bits for each weight of whole models in llama-quantize's mixes (tools/quantize/README.md of llama.cpp, Llama 3.1 8B).
_BITS: Final = (
    *(("IQ2_XS", 2.6), ("Q2_K", 3.2), ("IQ3_XS", 3.5), ("Q3_K_M", 4.0), ("IQ4_XS", 4.5), ("Q4_K_M", 4.9)),
    *(("Q5_K_M", 5.7), ("Q6_K", 6.6), ("Q8_0", 8.5)),
)


def layers_reason(search: Search, choice: Choice, devices: Sequence[DevicePlan]) -> str:
    """Such as ``28 of 33 layers: 22.1 of 23.4 GiB free``."""
    layout = choice.layout
    on = [device for device in devices if device.kind != "cpu" and (device.used_bytes or not layout.n_gpu_layers)]
    filled = " + ".join(
        f"{_gib(device.used_bytes + device.margin_bytes)} of {_gib(device.free_bytes)}" for device in on
    )
    share = "all" if layout.n_gpu_layers == layout.n_all else f"{layout.n_gpu_layers} of"
    if search.fixed.n_gpu_layers is None and not layout.n_gpu_layers:
        return f"no layer fits: {filled} GiB free"
    return f"{share} {layout.n_all} layers: {filled} GiB free"


def experts_reason(layout: Layout) -> str:
    """Why experts stay on the host."""
    if not layout.host_experts:
        return "all experts lie with their layers"
    return (
        f"the experts of {layout.host_experts} of {layout.n_all - 1} layers stay on the host, the rest fits on the GPU"
    )


def ubatch_reason(demand: Demand) -> str:
    if demand.n_ubatch < 512:
        return "smaller compute buffers leave room for more layers"
    return "weights of the host are copied to the GPU once for each micro-batch"


def cache_reason(search: Search, choice: Choice) -> str:
    """What a q8_0 cache buys."""
    plain = search.settle(replace(choice.demand, type_k="f16", type_v="f16"))
    if not plain.fits:
        return f"a context of {choice.demand.n_ctx_each} fits with it and not with f16"
    more = choice.layout.n_gpu_layers - plain.layout.n_gpu_layers
    if more > 0:
        return f"{more} more layers on the GPU than with f16, and a fast kernel"
    return f"{choice.speed.generation_tps / plain.speed.generation_tps:.2f} of the speed with f16"


def notes(search: Search, choice: Choice) -> Iterator[str]:
    """Why it came out this way."""
    layout, demand = choice.layout, choice.demand
    for device in search.devices:
        if device.bandwidth_origin == "assumed":
            yield f"{device.name}: a bandwidth of {device.bandwidth_bytes_s / 1e9:.0f} GB/s is assumed"
    if layout.host_experts and layout.n_gpu_layers == layout.n_all:
        yield "experts leave the GPU before whole layers do: few of them are read for each token"
    if layout.n_gpu_layers < layout.n_all and search.gpus and search.fixed.n_gpu_layers is None and choice.fits:
        yield f"{layout.n_all - layout.n_gpu_layers} layers run on the host, which sets the speed"
    if len(layout.counts) > 1 and 0 in layout.counts and layout.n_gpu_layers:
        idle = ", ".join(device.name for device, count in zip(search.gpus, layout.counts, strict=True) if not count)
        yield f"{idle} is left out: one device less to wait for"
    at_host = layout.n_gpu_layers < layout.n_all - 1
    wanted = not choice.fits or (search.gpus and not layout.is_whole)
    if demand.type_k == "f16" and search.fixed.type_k is None and wanted:
        if at_host and not is_fast("CPU", search.build, search.shape, "q8_0", "q8_0"):
            yield "the cache stays f16: layers on the host have no fast kernel for q8_0"
        elif search.gpus and not search.is_fast("q8_0", "q8_0"):
            yield "the cache stays f16: this build has no fast kernel for q8_0 with these heads"


def estimates(search: Search, choice: Choice) -> Iterator[str]:
    """Which figures of a plan that is computed are no more than estimates."""
    if supported(search.sizes.headers) == "estimated":
        yield f"compute buffers of {search.shape.architecture} models are estimated, with a margin of a quarter"
    others = sorted({device.backend for device in search.gpus} - {"CPU", "CUDA"})
    if others and choice.layout.n_gpu_layers:
        yield f"compute buffers on {', '.join(others)} are estimated: they are computed as CUDA's would be"


def instead(search: Search, choice: Choice) -> str:
    """What would fit: a shorter context, fewer layers, a smaller quantization; empty when nothing would."""
    found = []
    if search.fixed.n_gpu_layers is not None or search.fixed.n_cpu_moe is not None:
        free = replace(search, fixed=replace(search.fixed, n_gpu_layers=None, n_cpu_moe=None, tensor_split=None))
        freed = free.best()
        if freed.fits:
            found.append(f"--n-gpu-layers {freed.layout.n_gpu_layers}")
    n_ctx = choice.demand.n_ctx_each // 2
    while n_ctx >= 256:
        if search.best_at(n_ctx).fits:
            found.append(f"--n-ctx {n_ctx}")
            break
        n_ctx //= 2
    if quant := _smaller_quant(search, choice):
        found.append(f"the {quant} of this model")
    return ", or ".join(found)


def _smaller_quant(search: Search, choice: Choice) -> str:
    """The largest mix whose weights would fit beside everything else."""
    room = sum(device.usable_bytes for device in search.devices)
    beside = sum(need.total - need.weights for need in choice.needs)
    weights = sum(header.tensor_bytes for header in search.sizes.headers)
    params = sum(header.n_params for header in search.sizes.headers)
    bits = 0.98 * (room - beside) * 8 / params  # layers are whole: a little stays empty
    fitting = [name for name, each in _BITS if each <= bits and each < weights * 8 / params]
    return fitting[-1] if fitting else ""


def _gib(size: int) -> str:
    return format_bytes(size).removesuffix(" GiB")
