"""What the front counts, and the Prometheus text in which it stands beside llama-server's own figures.

The text follows Prometheus' exposition format 0.0.4: each family once, with its HELP and TYPE before its samples.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# From a small model on a GPU to a long prompt on a CPU.
FIRST_BYTE_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TAIL_BYTES = 8192  # the end of a reply, where its figures are

# Unescaped, so never inside a text: there each quote has a backslash before it, and the one that ends the name, too.
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens|predicted_n|tokens_predicted)":\s*(\d{1,12})')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens|tokens_evaluated)":\s*(\d{1,12})')
_NAME = r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
_SAMPLE = re.compile(_NAME + r"(?:\{(?P<labels>.*)\})?[ \t]+(?P<value>[-+.\deE]+|[-+]?Inf|NaN)(?:[ \t]+-?\d+)?\s*")
_COMMENT = re.compile(r"#\s+(?P<what>HELP|TYPE)\s+" + _NAME + r"\s*(?P<text>.*)")


@dataclass
class Histogram:
    """Counts of observations up to each bound, and beyond the last."""

    bounds: tuple[float, ...] = FIRST_BYTE_BOUNDS_S
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class Metrics:
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by endpoint and status
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    cancelled: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_byte_s: Histogram = field(default_factory=Histogram)

    def count_tokens(self, tail: bytes) -> None:
        """Add what the end of a reply says of its tokens; the last figure is the final one."""
        if found := _COMPLETION.findall(tail):
            self.completion_tokens += int(found[-1])
        if found := _PROMPT.findall(tail):
            self.prompt_tokens += int(found[-1])

    def text(self, *, waiting: int, in_flight: int, ready: bool, restarts: int) -> str:
        """Our own families."""
        requests = [
            (f'{{endpoint="{endpoint}",status="{status}"}}', count)
            for (endpoint, status), count in sorted(self.requests.items())
        ]
        rejected = [(f'{{reason="{reason}"}}', count) for reason, count in sorted(self.rejected.items())]
        families = [
            _family("requests_total", "counter", "Requests answered.", requests),
            _family("rejected_total", "counter", "Requests turned away, by reason.", rejected),
            _family("cancelled_total", "counter", "Clients that left before their reply was whole.", self.cancelled),
            _family("cut_replies_total", "counter", "Replies that llama-server or a shutdown cut short.", self.cut),
            _family("prompt_tokens_total", "counter", "Prompt tokens, where a reply tells them.", self.prompt_tokens),
            _family("completion_tokens_total", "counter", "Tokens generated, as above.", self.completion_tokens),
            _family("queue_depth", "gauge", "Requests that wait for their turn.", waiting),
            _family("in_flight", "gauge", "Requests that generate.", in_flight),
            _family("upstream_ready", "gauge", "1 while llama-server takes requests.", int(ready)),
            _family("upstream_restarts_total", "counter", "Times llama-server was started again.", restarts),
            _histogram("first_byte_seconds", "From a request to the first byte of its reply.", self.first_byte_s),
        ]
        return "".join(families)


def joined(ours: str, children: Mapping[str, str]) -> str:
    """``ours`` and the texts of llama-servers in one, families not repeated.

    ``children`` maps a model's name to its text; the samples of one get ``model="NAME"``, unless the name is "".
    What is no sample of a family with a type is left out, so the result is valid whatever a child sends.
    """
    described: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for model, text in children.items():
        for line in text.splitlines():
            if comment := _COMMENT.fullmatch(line.strip()):
                described.setdefault(comment["name"], {}).setdefault(comment["what"], comment["text"])
            elif sample := _SAMPLE.fullmatch(line):
                labels = ",".join(
                    part for part in (sample["labels"], f'model="{escaped(model)}"' if model else "") if part
                )
                name = sample["name"] + (f"{{{labels}}}" if labels else "")
                samples.setdefault(sample["name"], []).append(f"{name} {sample['value']}\n")
    typed = {name: comments for name, comments in described.items() if "TYPE" in comments and name in samples}
    return ours + "".join(_described(name, comments, samples[name]) for name, comments in typed.items())


def escaped(value: str) -> str:
    """A label's value."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


_PREFIX = "foundry_serve_"


def _described(name: str, comments: Mapping[str, str], lines: Iterable[str]) -> str:
    return "".join(f"# {what} {name} {text}\n" for what, text in sorted(comments.items())) + "".join(lines)


def _family(name: str, kind: str, says: str, samples: int | list[tuple[str, int]]) -> str:
    name = _PREFIX + name
    rows = [("", samples)] if isinstance(samples, int) else samples
    return _described(name, {"HELP": says, "TYPE": kind}, (f"{name}{labels} {value}\n" for labels, value in rows))


def _histogram(name: str, says: str, seen: Histogram) -> str:
    name = _PREFIX + name
    lines, running = [], 0
    for bound, count in zip((*map(repr, seen.bounds), "+Inf"), seen.counts, strict=True):
        running += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {running}\n')
    lines += [f"{name}_sum {seen.total:.6f}\n", f"{name}_count {running}\n"]
    return _described(name, {"HELP": says, "TYPE": "histogram"}, lines)
