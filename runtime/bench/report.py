"""What a bench answers: one JSON object, and the tables that say it to a reader."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from runtime.bench.contenders import Contender, OwnSample
from runtime.bench.measure import Field, Measured
from runtime.bench.roof import Roof, case_bytes_per_token
from runtime.bench.summary import Summary, ratio, rounded, summarize
from toolchain.base.console import format_bytes

_NOISY: Final = 0.05  # of a median; a ratio of two such medians says little about less than a tenth


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of a bench. ``depths`` has an entry for each depth; ``others`` are the other model's there, or none."""

    depths: tuple[Measured, ...]
    others: tuple[Measured, ...]
    field: Field
    roof: Roof
    runs: int
    warnings: tuple[str, ...]


def as_json(result: Result) -> dict[str, Any]:
    """The object of the command line contract. The figures on top are those of the first depth; ratios are ours over
    theirs, of medians.
    """
    first = result.depths[0]
    answer = {
        **_at_depth(first, result),
        "memory": memory(first.own),
        "read_bandwidth_bytes_per_s": result.roof.bytes_per_s and round(result.roof.bytes_per_s),
        "bandwidth_reason": result.roof.reason,
        "left_out": [{"name": name, "reason": why} for name, why in result.field.left_out.items()],
        "same_libraries": result.field.tool.same_libraries if result.field.tool else 0,
        "model": model(first),
        "runs": result.runs,
        "replies_per_run": first.case.repeat,
        "prompt_tokens": first.case.lengths.prompt,
        "gen_tokens": first.case.lengths.gen,
        "flash_attn": first.own[0].flash_attn,
        "settings": first.case.settings.as_json(),
        "warnings": list(all_warnings(result)),
    }
    if len(result.depths) > 1:
        answer["depths"] = [_at_depth(each, result) for each in result.depths]
    if result.others:
        pairs = zip(result.depths, result.others, strict=True)
        answer["compare"] = {**model(result.others[0]), "depths": [_compared(ours, other) for ours, other in pairs]}
    return answer


def all_warnings(result: Result) -> tuple[str, ...]:
    """What the machine did, and which of our figures the runs do not agree on."""
    found = list(result.warnings)
    for each in (*result.depths, *result.others):
        for what, summary in (("prompt", prompts(each, "ours")), ("generation", generations(each, "ours"))):
            if summary.noise is not None and summary.noise > _NOISY:
                found.append(
                    f"{each.case.model.name}, {what} at depth {each.case.lengths.depth}: "
                    f"half of the runs lie {summary.noise:.0%} apart"
                )
    return tuple(found)


def prompts(measured: Measured, name: str) -> Summary:
    """Prompt tokens per second of a contender."""
    return summarize([sample.prompt_tps for sample in measured.samples[name]])


def generations(measured: Measured, name: str) -> Summary:
    """Generated tokens per second of a contender."""
    return summarize([sample.generation_tps for sample in measured.samples[name]])


def memory(own: Sequence[OwnSample]) -> dict[str, object]:
    """The largest peak of our process, and the library's buffers; bytes."""
    return {"peak_rss_bytes": max(sample.peak_rss_bytes for sample in own), "buffers": dict(own[0].buffers)}


def model(measured: Measured) -> dict[str, object]:
    """The file (or files) and its size."""
    headers = measured.subject.headers
    tensor_bytes = sum(header.tensor_bytes for header in headers)
    n_params = sum(header.n_params for header in headers)
    return {
        "model": str(headers[0].path),
        "type": headers[0].file_type,
        "bytes": sum(header.file_bytes for header in headers),
        "n_params": n_params,
        "bits_per_weight": round(8 * tensor_bytes / n_params, 3) if n_params else 0.0,
    }


def tables(result: Result) -> Iterable[Table]:
    """For a reader: speed of everyone at each depth, then the figures of ours alone, then the other model."""
    for each in result.depths:
        yield _speed_table(each, result)
    yield _own_table(result)
    if result.others:
        yield _compare_table(result)


def _at_depth(measured: Measured, result: Result) -> dict[str, object]:
    prompt, generation = prompts(measured, "ours"), generations(measured, "ours")
    ttft = summarize([sample.ttft_ms for sample in measured.own])
    overhead = summarize([sample.overhead_us for sample in measured.own])
    per_token = case_bytes_per_token(measured.subject.headers, measured.case)
    share = result.roof.share(per_token, generation.median)
    return {
        "prompt_tps": rounded(prompt.median),
        "generation_tps": rounded(generation.median),
        "ttft_ms": rounded(ttft.median),
        "overhead_us_per_token": rounded(overhead.median),
        "bandwidth_share": None if share is None else rounded(share),
        "bytes_per_token": round(per_token),
        "depth": measured.case.lengths.depth,
        "peers": [_peer(peer, measured) for peer in result.field.peers],
        "spread": {
            "prompt_tps": prompt.as_json(),
            "generation_tps": generation.as_json(),
            "ttft_ms": ttft.as_json(),
            "overhead_us_per_token": overhead.as_json(),
        },
    }


def _peer(peer: Contender, measured: Measured) -> dict[str, object]:
    prompt, generation = prompts(measured, peer.name), generations(measured, peer.name)
    return {
        "name": peer.name,
        "prompt_tps": rounded(prompt.median),
        "generation_tps": rounded(generation.median),
        "ratio_prompt": _ratio(prompts(measured, "ours"), prompt),
        "ratio_generation": _ratio(generations(measured, "ours"), generation),
        "contains": peer.contains,
        "spread": {"prompt_tps": prompt.as_json(), "generation_tps": generation.as_json()},
    }


def _compared(ours: Measured, other: Measured) -> dict[str, object]:
    prompt, generation = prompts(other, "ours"), generations(other, "ours")
    return {
        "depth": other.case.lengths.depth,
        "prompt_tps": rounded(prompt.median),
        "generation_tps": rounded(generation.median),
        "ttft_ms": rounded(statistics.median(sample.ttft_ms for sample in other.own)),
        "ratio_prompt": _ratio(prompts(ours, "ours"), prompt),
        "ratio_generation": _ratio(generations(ours, "ours"), generation),
    }


def _ratio(ours: Summary, other: Summary) -> float | None:
    found = ratio(ours, other)
    return None if found is None else rounded(found)


def _speed_table(measured: Measured, result: Result) -> Table:
    lengths = measured.case.lengths
    title = f"{measured.case.model.name}: {lengths.prompt} prompt and {lengths.gen} generated tokens"
    title += f" at depth {lengths.depth}" if lengths.depth else ""
    table = _table(
        f"{title}, medians of {result.runs}", ("", "prompt t/s", "min-max", "generation t/s", "min-max", "ours: ×", "×")
    )
    contains: Mapping[str, str] = {peer.name: peer.contains for peer in result.field.peers}
    for name in measured.samples:
        prompt, generation = prompts(measured, name), generations(measured, name)
        ratios = [ratio(prompts(measured, "ours"), prompt), ratio(generations(measured, "ours"), generation)]
        shown = ["" if name not in contains or each is None else f"{each:.3f}" for each in ratios]
        table.add_row(
            name, _figure(prompt.median), _range(prompt), _figure(generation.median), _range(generation), *shown
        )
    table.caption = "; ".join(f"{name}: {text}" for name, text in contains.items())
    return table


def _own_table(result: Result) -> Table:
    table = _table(
        "", ("depth", "first token ms", "overhead µs/token", "read MB/token", "of read bandwidth", "peak memory")
    )
    for each in result.depths:
        per_token = case_bytes_per_token(each.subject.headers, each.case)
        share = result.roof.share(per_token, generations(each, "ours").median)
        peak = max(sample.peak_rss_bytes for sample in each.own)
        table.add_row(
            str(each.case.lengths.depth),
            f"{statistics.median(sample.ttft_ms for sample in each.own):.1f}",
            f"{statistics.median(sample.overhead_us for sample in each.own):.1f}",
            f"{per_token / 1e6:.2f}",
            "-" if share is None else f"{share:.0%} of {(result.roof.bytes_per_s or 0) / 1e9:.1f} GB/s",
            format_bytes(peak),
        )
    return table


def _compare_table(result: Result) -> Table:
    table = _table(
        "models", ("file", "depth", "size", "bits/weight", "prompt t/s", "generation t/s", "prompt ×", "generation ×")
    )
    for ours, other in zip(result.depths, result.others, strict=True):
        for each in (ours, other):
            facts = model(each)
            table.add_row(
                each.case.model.name,
                str(each.case.lengths.depth),
                format_bytes(float(str(facts["bytes"]))),
                f"{facts['bits_per_weight']:.2f}",
                _figure(prompts(each, "ours").median),
                _figure(generations(each, "ours").median),
                f"{ratio(prompts(each, 'ours'), prompts(ours, 'ours')) or 0:.3f}",
                f"{ratio(generations(each, 'ours'), generations(ours, 'ours')) or 0:.3f}",
            )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left", caption_justify="left", box=None, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(summary: Summary) -> str:
    return f"{_figure(min(summary.runs))}-{_figure(max(summary.runs))}"
