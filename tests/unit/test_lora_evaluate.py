"""Judging an adapter around tools that are scripts on disk, and what a model's words may do to a document: nothing."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests import described
from tests.generated_models import write_header
from toolchain.base import files
from toolchain.base.errors import ArtifactError, CommandError, FoundryError, UsageError
from toolchain.lora.judging import drift as drift_module
from toolchain.lora.judging.drift import Drift, drift
from toolchain.lora.judging.evaluate import SMALLEST_WINDOW, perplexity
from toolchain.lora.judging.replies import Replies, as_markdown

TOOL = """#!{python}
# llama-perplexity as far as its command line, its file and its words go; a token is a byte of the text.
import pathlib, struct, sys
options = [each for each in sys.argv[1:] if each != "--kl-divergence"]
given = dict(zip(options[::2], options[1::2]))
here = pathlib.Path(__file__).parent
with (here / "asked").open("a") as asked:
    asked.write(chr(9).join(sys.argv[1:]) + chr(10))
window, tokens = int(given["--ctx-size"]), pathlib.Path(given["--file"]).stat().st_size
base = pathlib.Path(given["--kl-divergence-base"]) if "--kl-divergence-base" in given else None
if "--kl-divergence" in sys.argv:
    assert base.is_file()
    print({statistics!r})
    sys.exit({status})
if tokens < 2 * window:
    print(f"E perplexity: you need at least {{2 * window}} tokens to evaluate perplexity with a context of {{window}}")
    print(f"E perplexity: the data file you provided tokenizes to only {{tokens}} tokens")
    sys.exit()
chunks = min(tokens // window, int(given.get("--chunks", tokens)))
if base:
    judged = window - 1 - window // 2
    body = chunks * (4 * window + judged * 2 * ({n_vocab} + 4))
    base.write_bytes(struct.pack("<8s3i", b"_logits_", window, {n_vocab}, chunks) + bytes(body - {lost}))
print("Final estimate: PPL = 50.0000 +/- 1.5")
"""
STATISTICS = """\
   3    1233.8512 ±  225.3294      -0.03836 ±    0.01442       0.02780 ±    0.00135

====== Perplexity statistics ======
Mean PPL(Q)                   :  60.000000 ±   2.937513
Mean PPL(base)                :  49.551672 ±   1.741518
Mean PPL(Q)/PPL(base)         :   1.008148 ±   0.007367

====== KL divergence statistics ======
Mean    KLD:   0.026597 ±   0.000487
Maximum KLD:   0.230136
99.9%   KLD:   0.167098
99.0%   KLD:   0.108191
95.0%   KLD:   0.071626
Median  KLD:   0.020456
Minimum KLD:  -0.000589

====== Token probability statistics ======
RMS Δp    :  1.531 ± 0.153 %
Same top p: 88.976 ± 0.695 %
"""
N_VOCAB = 300


class Bench:
    """A Toolchain whose llama-perplexity is TOOL, with models that are headers and a text of any length."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.toolchain = described.toolchain(folder)
        self.base = write_header(folder / "base.gguf", "llama", n_vocab=N_VOCAB, n_layer=1)
        self.other = write_header(folder / "other.gguf", "llama", n_vocab=N_VOCAB, n_layer=2)
        (folder / "bin").mkdir()
        self.tool()

    def tool(self, *, statistics: str = STATISTICS, status: int = 0, lost: int = 0) -> None:
        script = TOOL.format(python=sys.executable, statistics=statistics, status=status, n_vocab=N_VOCAB, lost=lost)
        path = self.toolchain.tool("perplexity")
        path.write_text(script)
        path.chmod(0o755)

    def text(self, tokens: int) -> Path:
        path = self.folder / "text.txt"
        path.write_text("x" * tokens)
        return path

    def asked(self) -> list[list[str]]:
        """The arguments of each run."""
        return [line.split("\t") for line in (self.folder / "bin" / "asked").read_text().splitlines()]

    def drift(self, tokens: int, *, n_ctx: int = 128, chunks: int | None = None) -> Drift:
        text, log = self.text(tokens), self.folder / "log"
        models = ((self.base, None), (self.other, None))
        return drift(*models, text, n_ctx=n_ctx, chunks=chunks, toolchain=self.toolchain, log=log)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "n_ctx", "window"), [(5000, 512, 512), (1023, 512, 256), (64, 512, 32), (100, 512, 32), (40, 20, 20)]
)
def test_a_short_text_is_judged_in_the_largest_window_that_it_has_twice(
    bench: Bench, tokens: int, n_ctx: int, window: int
) -> None:
    found = perplexity(bench.base, bench.text(tokens), n_ctx=n_ctx, toolchain=bench.toolchain, log=bench.folder / "log")
    assert (found.value, found.error, found.n_ctx) == (50.0, 1.5, window)
    assert len(bench.asked()) == (1 if window == n_ctx else 2)


def test_a_text_too_short_for_any_window_is_refused_with_what_is_needed_and_given(bench: Bench) -> None:
    with pytest.raises(UsageError) as caught:
        perplexity(bench.base, bench.text(63), n_ctx=512, toolchain=bench.toolchain, log=bench.folder / "log")
    assert f"{2 * SMALLEST_WINDOW} tokens are needed" in caught.value.evidence
    assert "63 tokens are given" in caught.value.evidence
    assert len(bench.asked()) == 1


@pytest.mark.parametrize(
    ("name", "scale", "option"),
    [
        ("a.gguf", 1.0, ("--lora", "{}")),
        ("a.gguf", 0.5, ("--lora-scaled", "{}:0.5")),
        ("a,b.gguf", 1.0, ("--lora", '"{}"')),
        ('a",b.gguf', 1.0, ("--lora", '"{}"')),
    ],
)
def test_an_adapter_reaches_llama_cpp_whatever_its_name(
    bench: Bench, name: str, scale: float, option: tuple[str, str]
) -> None:
    adapter = bench.folder / name
    text, log = bench.text(2000), bench.folder / "log"
    perplexity(bench.base, text, n_ctx=128, adapter=adapter, scale=scale, toolchain=bench.toolchain, log=log)
    shown = str(adapter).replace('"', '""')
    assert bench.asked()[0][-2:] == [option[0], option[1].format(shown)]


def test_drift_is_what_the_statistics_say_and_its_ratio_that_of_two_unclipped_runs(bench: Bench) -> None:
    found = bench.drift(1000)
    assert (found.mean_kld, found.error, found.median_kld) == (0.026597, 0.000487, 0.020456)
    assert (found.kld_99, found.max_kld) == (0.108191, 0.230136)
    assert found.same_top == pytest.approx(0.88976)
    assert found.perplexity_ratio == 60 / 50
    assert (found.n_ctx, found.tokens) == (128, 7 * 63)


@pytest.mark.parametrize(
    ("status", "lost", "error"),
    [(0, 0, None), (1, 0, CommandError), (0, 5, ArtifactError)],
    ids=["done", "failed", "cut short"],
)
def test_no_distributions_stay_behind(bench: Bench, status: int, lost: int, error: type[FoundryError] | None) -> None:
    bench.tool(status=status, lost=lost)
    with pytest.raises(error) if error else nullcontext():
        bench.drift(1000)
    left = [path for path in (files.home_dir("work") / "drift").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in left)


def test_what_a_killed_judgement_left_goes_with_the_next_one_of_the_same_log(bench: Bench) -> None:
    """The model may be another by then: a merged one is judged under a name of that moment."""
    bench.drift(1000)
    left = Path(bench.asked()[0][-1])
    left.parent.mkdir()
    left.write_bytes(b"_logits_")
    bench.other = bench.other.rename(bench.folder / "again.gguf")
    bench.drift(1000)
    assert not left.parent.exists()


def test_distributions_stay_within_their_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    a_window = 4 * 128 + 63 * 2 * (N_VOCAB + 4)
    monkeypatch.setattr(drift_module, "MOST_BYTES", 3 * a_window + 100)
    assert bench.drift(100_000).tokens == 3 * 63
    monkeypatch.setattr(drift_module, "MOST_BYTES", a_window - 1)
    assert bench.drift(100_000).n_ctx == 64


@pytest.mark.parametrize(("tokens", "window"), [(4000, 128), (256, 128), (255, 32), (224, 32)])
def test_as_many_tokens_are_judged_as_statistics_want(bench: Bench, tokens: int, window: int) -> None:
    found = bench.drift(tokens, chunks=1)
    assert found.tokens >= drift_module.LEAST_TOKENS
    assert found.n_ctx == window


def test_a_text_without_statistics_is_refused_with_what_is_needed(bench: Bench) -> None:
    with pytest.raises(UsageError) as caught:
        bench.drift(223)
    assert "at least 224 tokens are needed" in caught.value.evidence


def test_models_of_different_vocabularies_are_not_compared(bench: Bench) -> None:
    write_header(bench.other, "llama", n_vocab=N_VOCAB + 1, n_layer=2)
    with pytest.raises(UsageError, match="different vocabularies"):
        bench.drift(1000)


@pytest.mark.parametrize("figure", ["Mean    KLD:   0.026597", "Median  KLD", "99.0%   KLD", "Mean PPL(Q)  "])
def test_statistics_that_are_not_there_are_no_drift(bench: Bench, figure: str) -> None:
    bench.tool(statistics=STATISTICS.replace(figure, "lost"))
    with pytest.raises(ArtifactError):
        bench.drift(1000)


def test_a_divergence_that_is_no_number_is_refused(bench: Bench) -> None:
    bench.tool(statistics=STATISTICS.replace("Mean    KLD:   0.026597 ±   0.000487", "Mean    KLD:   nan ±   -nan"))
    with pytest.raises(ArtifactError, match="does not compute"):
        bench.drift(1000)


@pytest.mark.parametrize(
    "said",
    [
        "plain",
        "```\n# Not a heading\n```",
        "`" * 40,
        "~~~~\n| a | b |",
        "\n\n",
        "",
        "<script>alert(1)</script>",
        "    x\n",
    ],
)
def test_what_a_model_says_stays_inside_its_block(said: str) -> None:
    found = Replies(prompt=said, before=said, after=f"{said} ")
    document = as_markdown([found, replace(found, after="fine")], title="Replies")
    tokens = MarkdownIt().parse(document)
    assert [token.content.rstrip("\n") for token in tokens if token.type == "fence"] == [
        text.rstrip("\n") for text in (said, said, f"{said} ", said, said, "fine")
    ]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2"]


def test_what_a_model_says_moves_no_cursor() -> None:
    document = as_markdown([Replies(prompt="p", before="\x1b[2Ja\rb", after="\x07")], title="Replies")
    assert not [character for character in document if ord(character) < 0x20 and character != "\n"]
