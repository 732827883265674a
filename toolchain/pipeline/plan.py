"""Recipe to Plan: which steps, on what, with which fingerprints. Nothing runs and nothing is made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolchain.base import files
from toolchain.base.errors import UsageError
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain
from toolchain.hub import snapshot as hub
from toolchain.pipeline.recipe import BUILTIN_CORPUS, Recipe
from toolchain.stages import demo_model
from toolchain.stages.convert import Convert, check_model_dir, count_params, model_files
from toolchain.stages.evaluate import Evaluate
from toolchain.stages.fetch import CopyCorpus, FetchHub, MakeDemo, WriteCorpus
from toolchain.stages.quantize import Quantize
from toolchain.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage with its place in the graph. ``artifact`` marks a file that the recipe promises."""

    id: str
    stage: Stage
    needs: tuple[str, ...]
    fingerprint: str
    output: Path
    artifact: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """The recipe's model as far as it can be known before a step runs.

    ``digest`` identifies the content of a local one, which lies at ``path``.
    """

    kind: str
    name: str
    commit: str | None
    digest: str
    n_params: int
    path: Path | None = None
    snapshot: hub.HubSnapshot | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in an order in which they can run; the artifacts lie in ``folder``."""

    recipe: Recipe
    recipe_digest: str
    source: Source
    toolchain: Toolchain
    folder: Path
    steps: tuple[Step, ...]

    def step(self, step_id: str) -> Step:
        return next(step for step in self.steps if step.id == step_id)


def describe_source(recipe: Recipe, recipe_dir: Path, *, update: bool = False) -> Source:
    """Look at the model: hash a local one, ask the hub for a commit (once; it is recorded and reused)."""
    try:
        return _describe_source(recipe, recipe_dir, update)
    except OSError as error:
        raise UsageError(
            f"the model of {recipe.name} cannot be read", evidence=str(error), hint="check the path and its permissions"
        ) from error


def _describe_source(recipe: Recipe, recipe_dir: Path, update: bool) -> Source:
    model = recipe.model
    if model.demo is not None:
        preset = demo_model.PRESETS[model.demo]
        return Source(kind="demo", name=model.demo, commit=None, digest="", n_params=demo_model.n_params(preset))
    if model.hub is not None:
        snapshot = _pinned_snapshot(recipe, model.hub, model.revision or "main", update)
        n_params = snapshot.n_params or sum(f.bytes for f in snapshot.files if f.name.endswith(".safetensors")) // 2
        return Source(
            kind="hub", name=snapshot.repo, commit=snapshot.commit, digest="", n_params=n_params, snapshot=snapshot
        )
    if model.path is not None:
        path = _place(recipe_dir, model.path)
        check_model_dir(path)
        content = files.digest([[name, files.known_sha256(path / name)] for name in model_files(path)])
        return Source(
            kind="path",
            name=path.resolve().name,
            commit=None,
            digest=content,
            n_params=count_params(path),
            path=path,
        )
    assert model.gguf is not None
    path = _place(recipe_dir, model.gguf)
    header = read_header(path)
    if header.kind != "model":
        raise UsageError(f"{path.name} is no model but: {header.kind}", hint="model.gguf takes a whole model's file")
    packed = sorted({t.type for t in header.tensors} - {"F32", "F16", "BF16"})
    if packed:
        raise UsageError(
            f"{path.name} is quantized already",
            evidence=f"it has tensors of type {', '.join(packed)}",
            hint="quantizing twice loses twice: start from the F16 or BF16 file of the model",
        )
    return Source(
        kind="gguf",
        name=path.name,
        commit=None,
        digest=files.digest([files.known_sha256(shard) for shard in header.shard_paths]),
        n_params=header.n_params,
        path=path,
    )


def source_note(recipe: Recipe) -> Path:
    """Where the commit that a hub revision stood for is recorded."""
    return files.models_dir() / recipe.name / "source.json"


def make_plan(recipe: Recipe, *, recipe_path: Path, source: Source, toolchain: Toolchain) -> Plan:
    """The graph of ``recipe``: fetch, convert, then quantize and evaluate for each type.

    A step's fingerprint digests its identity and the fingerprints of the steps that it needs, so a change
    anywhere reaches exactly what depends on it.
    """
    folder = files.models_dir() / recipe.name
    graph = _Graph(folder)
    full, before = _plan_conversion(graph, recipe, source, toolchain)
    corpus, corpus_needs = _plan_corpus(graph, recipe, recipe_path.parent)
    for entry in recipe.quantize:
        quantize = Quantize(
            source=full,
            type=entry.type,
            tensors=tuple(sorted(entry.tensors.items())),
            notes=_notes(recipe, source, toolchain),
            tool=toolchain.tool("quantize"),
            source_digest=source.digest,
            toolchain_id=toolchain.id,
            n_params=source.n_params,
        )
        name = f"{recipe.name}-{entry.label}.gguf"
        model = graph.add(f"quantize {entry.label}", quantize, name=name, needs=before, artifact=True)
        if recipe.evaluate and corpus:
            evaluate = Evaluate(
                model=model,
                label=entry.label,
                corpus=corpus,
                n_ctx=recipe.evaluate.n_ctx,
                chunks=recipe.evaluate.chunks,
                model_bytes=quantize.bytes,
                tool=toolchain.tool("perplexity"),
                toolchain_id=toolchain.id,
            )
            needs = (f"quantize {entry.label}", *corpus_needs)
            graph.add(f"evaluate {entry.label}", evaluate, name="perplexity.json", needs=needs)
    return Plan(
        recipe=recipe,
        recipe_digest=files.sha256_text(recipe.model_dump_json()),
        source=source,
        toolchain=toolchain,
        folder=folder,
        steps=tuple(graph.steps.values()),
    )


class _Graph:
    """Collects steps; each new one is fingerprinted over those it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: dict[str, Step] = {}

    def add(self, step_id: str, stage: Stage, *, name: str, needs: tuple[str, ...], artifact: bool = False) -> Path:
        inputs = [self.steps[need].fingerprint for need in needs]
        fingerprint = files.digest({"identity": stage.identity, "inputs": inputs})
        place = self.folder if artifact else files.home_dir("work") / "steps" / fingerprint[:20]
        self.steps[step_id] = Step(
            id=step_id, stage=stage, needs=needs, fingerprint=fingerprint, output=place / name, artifact=artifact
        )
        return place / name


def _plan_conversion(
    graph: _Graph, recipe: Recipe, source: Source, toolchain: Toolchain
) -> tuple[Path, tuple[str, ...]]:
    """(the full-precision GGUF, the steps that make it)."""
    needs: tuple[str, ...] = ()
    match source.kind:
        case "gguf":
            assert source.path is not None
            return source.path, ()
        case "demo":
            model_dir, needs = graph.add("fetch", MakeDemo(preset=source.name), name=source.name, needs=()), ("fetch",)
        case "hub":
            assert source.snapshot is not None
            cache = files.home_dir("hub")
            graph.add("fetch", FetchHub(snapshot=source.snapshot, cache_dir=cache), name="fetched", needs=())
            model_dir, needs = hub.snapshot_path(source.snapshot, cache), ("fetch",)
        case _:
            assert source.path is not None
            model_dir = source.path
    convert = Convert(
        model_dir=model_dir,
        model_name=source.name.rpartition("/")[2] if source.kind != "demo" else f"demo {source.name}",
        trust_remote_code=recipe.model.trust_remote_code,
        outtype=recipe.convert.outtype,
        convert_dir=toolchain.convert_dir,
        source_digest=source.digest,
        toolchain_id=toolchain.id,
        n_params=source.n_params,
    )
    return graph.add("convert", convert, name="model.gguf", needs=needs), ("convert",)


def _plan_corpus(graph: _Graph, recipe: Recipe, recipe_dir: Path) -> tuple[Path | None, tuple[str, ...]]:
    """(the evaluation text, the step that writes it when it is built in or known by content)."""
    if recipe.evaluate is None:
        return None, ()
    if recipe.evaluate.corpus == BUILTIN_CORPUS:
        return graph.add("corpus", WriteCorpus(), name="corpus.txt", needs=()), ("corpus",)
    path = _place(recipe_dir, recipe.evaluate.corpus)
    if not path.is_file():
        raise UsageError(
            f"no such corpus: {path}", hint=f"evaluate.corpus is a text file beside the recipe, or {BUILTIN_CORPUS}"
        )
    return graph.add("corpus", CopyCorpus(path=path, sha256=files.known_sha256(path)), name="corpus.txt", needs=()), (
        "corpus",
    )


def _notes(recipe: Recipe, source: Source, toolchain: Toolchain) -> tuple[tuple[str, str], ...]:
    """What the header tells of its making, as ``foundry.*`` keys."""
    origin = f"{source.kind}:{source.name}" + (f"@{source.commit}" if source.commit else "")
    return (("recipe", recipe.name), ("source", origin), ("llama_cpp", toolchain.commit))


def _pinned_snapshot(recipe: Recipe, repo: str, revision: str, update: bool) -> hub.HubSnapshot:
    """The snapshot recorded beside the artifacts, else what the hub says now; running the plan records it."""
    known = None if update else hub.snapshot_from_json(files.read_json(source_note(recipe)))
    if known and (known.repo, known.revision) == (repo, revision):
        return known
    return hub.resolve_snapshot(repo, revision)


def _place(folder: Path, typed: str) -> Path:
    """A path from a recipe: relative to the recipe's folder; ``~`` is the user's home."""
    return (folder / files.expand(typed)).absolute()
