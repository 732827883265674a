"""Downloads from a real loopback hub through the real client, each failure with its words and its rerun.

The client reads its environment when it is imported, so it lives in one child process that takes a
command a line; the few tests that need another environment start a child of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import GOOD_TOKEN, OTHER_TOKEN, Faults, LoopbackHub, serve_hub
from toolchain.hub.conversion_files import choose_files
from toolchain.hub.repository import RemoteFile
from toolchain.hub.snapshot import HubSnapshot, snapshot_dir

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 10 * 1024 * 1024  # the client hands bytes to the file in chunks of this size
LARGE = CHUNK + 300_000
DEADLINE_S = 60

CHILD = """
import dataclasses, json, os, socket, sys
from pathlib import Path
from toolchain.base.errors import FoundryError
from toolchain.hub import errors, snapshot as hub

errors._FIRST_WAIT_S = 0.01
resolver = socket.getaddrinfo

def no_names(*args, **kwargs):
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

def run(order):
    os.environ.pop("HF_TOKEN", None)
    if order["token"]:
        os.environ["HF_TOKEN"] = order["token"]
    socket.getaddrinfo = no_names if order["no_names"] else resolver
    snapshot = hub.resolve_snapshot(order["repo"], order["revision"])
    told, folder = [], None
    if order["cache"]:
        folder = hub.download_snapshot(snapshot, Path(order["cache"]), lambda *pair: told.append(pair))
    return {"snapshot": dataclasses.asdict(snapshot), "folder": str(folder), "progress": told}

for line in sys.stdin:
    try:
        answer = run(json.loads(line))
    except FoundryError as error:
        told = {"message": error.message, "evidence": error.evidence, "hint": error.hint}
        answer = {"error": type(error).__name__, "exit_code": error.exit_code, **told}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """The child with the real client; ``ask`` resolves and, given a cache, downloads."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if key in os.environ}
        own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "HF_HOME": str(home / "hf"), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kept | own,
        )

    def send(
        self,
        repo: str,
        cache: Path | None = None,
        *,
        revision: str = "main",
        token: str = "",
        no_names: bool = False,
    ) -> None:
        order = {"repo": repo, "revision": revision, "token": token, "no_names": no_names}
        assert self.process.stdin
        self.process.stdin.write(json.dumps({**order, "cache": str(cache) if cache else ""}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.end()
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, repo: str, cache: Path | None = None, **how: Any) -> dict[str, Any]:
        self.send(repo, cache, **how)
        return self.answer()

    def end(self) -> str:
        """End the child; what it said on stderr."""
        self.process.kill()
        return self.process.communicate(timeout=DEADLINE_S)[1]


@dataclass
class Stage:
    """One repository of its own on the running hub, and a cache of its own."""

    hub: LoopbackHub
    client: Client
    repo: str
    cache: Path

    @property
    def faults(self) -> Faults:
        return self.hub.faults(self.repo)

    def resolve(self, **how: Any) -> dict[str, Any]:
        return self.client.ask(self.repo, **how)

    def fetch(self, **how: Any) -> dict[str, Any]:
        return self.client.ask(self.repo, self.cache, **how)

    def assert_fails(self, answer: Mapping[str, Any], message: str, hint: str, *, exit_code: int = 4) -> None:
        """The failure's words, and that what is in the cache does not look complete."""
        assert answer.get("exit_code") == exit_code, answer
        assert message in answer["message"], answer
        assert hint in answer["hint"], answer
        assert GOOD_TOKEN not in str(answer)
        assert OTHER_TOKEN not in str(answer)
        assert "Signature" not in str(answer)
        model = self.hub.models[self.repo]
        whole = {name: body for name, body in model.files.items() if name == "model.safetensors"}
        for found in self.cache.glob(f"models--*/snapshots/{model.commit}/model.safetensors"):
            assert found.read_bytes() == whole["model.safetensors"]
        assert snapshot_dir(self.snapshot(), self.cache) is None

    def assert_whole(self, answer: Mapping[str, Any]) -> None:
        assert "error" not in answer, answer
        folder, model = Path(answer["folder"]), self.hub.models[self.repo]
        expected = choose_files(model.files)
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == list(expected)
        for name in expected:
            assert (folder / name).read_bytes() == model.files[name]
        total = answer["snapshot"]["files"] and sum(file["bytes"] for file in answer["snapshot"]["files"])
        assert answer["progress"][-1] == [total, total]
        assert all(done <= total for done, _ in answer["progress"])
        assert not list(self.cache.rglob("*.incomplete"))
        assert snapshot_dir(self.snapshot(), self.cache) == folder

    def snapshot(self) -> HubSnapshot:
        model = self.hub.models[self.repo]
        names = choose_files(model.files)
        found = [
            RemoteFile(
                name=name,
                bytes=len(model.files[name]),
                sha256=model.hashes[name] if name.endswith((".safetensors", ".model")) else None,
            )
            for name in names
        ]
        return HubSnapshot(repo=self.repo, revision="main", commit=model.commit, files=tuple(found), n_params=1234)

    def bodies(self) -> list[str]:
        """The Range header of each request for the weights' bytes."""
        return [seen.range for seen in self.hub.requests(f"/cdn/{self.repo}/model.safetensors", "GET")]


def write_model(folder: Path, weights_bytes: int = 5000) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.model").write_bytes(b"pieces" * 50)
    (folder / "README.md").write_text("# A model\n")
    (folder / "modeling_odd.py").write_text("raise SystemExit('remote code')\n")
    weights = (str(folder).encode() + bytes(range(256)) * (weights_bytes // 256 + 1))[:weights_bytes]
    (folder / "model.safetensors").write_bytes(weights)
    return folder


SMALL = ["plain", "gated", "private", "limited", "busy", "wrong", "short", "huge", "full"]
SMALL += ["drop", "xet", "mirror", "garbage", "hang", "concurrent", "corrupt"]
BIG = ["cut", "killed", "reset", "ignorant", "slow", "interrupted"]
REPOS = dict.fromkeys(SMALL, 5000) | dict.fromkeys(BIG, LARGE)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    root = tmp_path_factory.mktemp("models")
    models = {f"acme/{name}": write_model(root / name, size) for name, size in REPOS.items()}
    models["acme/twins"] = write_model(root / "twins")
    for nth in (1, 2):
        (root / "twins" / f"model-0000{nth}-of-00002.safetensors").write_bytes(bytes(3_000_000))
    (root / "twins" / "model.safetensors").unlink()
    for name, held in {
        "ggufs": ["README.md", "m-Q4_K_M.gguf"],
        "adapter": ["adapter_model.safetensors", "adapter_config.json"],
        "empty": ["notes.txt"],
    }.items():
        models[f"acme/{name}"] = root / name
        (root / name).mkdir()
        for file in held:
            (root / name / file).write_bytes(b"GGUF")
    with serve_hub(models) as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    running = Client(tmp_path_factory.mktemp("home"), **online(hub))
    yield running
    said = running.end()
    assert "Traceback" not in said
    assert said.strip() == "", "the client must be quiet: our own failure says it all"


def online(hub: LoopbackHub) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def stage(request: pytest.FixtureRequest, hub: LoopbackHub, client: Client, tmp_path: Path) -> Iterator[Stage]:
    """The repository the test names with ``@on(...)``; its faults are cleared afterwards."""
    repo = f"acme/{request.param}"
    yield Stage(hub, client, repo, tmp_path / "hub")
    if repo in hub.models:
        hub.models[repo].faults = Faults()


def on(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", [name], indirect=True, ids=[name])


# What is chosen.


def test_conversion_files_are_chosen_and_code_and_duplicates_are_not() -> None:
    wanted = {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "qwen.tiktoken",
        "chat_template.jinja",
        "preprocessor_config.json",
        "modules.json",
        "1_Pooling/config.json",
        "README.md",
        "LICENSE",
    }
    unwanted = {
        "modeling_x.py",
        "tokenization_x.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/params.json",
        "original/model.safetensors",
        "onnx/model.onnx",
        "onnx/config.json",
        "model.gguf",
        "flax_model.msgpack",
        "tf_model.h5",
        "rust_model.ot",
        "../config.json",
        ".gitattributes",
        "adapter_model.safetensors",
        "training_args.bin",
    }
    assert set(choose_files(wanted | unwanted)) == wanted


def test_bin_weights_are_chosen_only_without_safetensors() -> None:
    bins = [
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "config.json",
        "optimizer.bin",
    ]
    assert choose_files(bins) == (
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    )
    assert choose_files([*bins, "model.safetensors"]) == ("config.json", "model.safetensors")


def test_oddly_named_safetensors_are_better_than_none() -> None:
    assert choose_files(["model.fp32.safetensors", "config.json"]) == (
        "config.json",
        "model.fp32.safetensors",
    )


def test_nothing_is_chosen_without_weights() -> None:
    assert choose_files(["config.json", "README.md", "original/model.safetensors"]) == ()


def test_no_module_imports_the_hub_client() -> None:
    code = "import sys, runtime.resolve, toolchain.hub.headers, toolchain.hub.snapshot"
    code += "; print({'huggingface_hub', 'httpx2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert done.stdout.strip() == "set()"


# What works.


@on("plain")
def test_a_snapshot_is_resolved_pinned_downloaded_and_then_found_without_network(stage: Stage) -> None:
    model = stage.hub.models[stage.repo]
    answer = stage.fetch()
    stage.assert_whole(answer)
    assert answer["snapshot"]["commit"] == model.commit
    assert answer["snapshot"]["n_params"] == 1234
    assert answer["snapshot"]["revision"] == "main"
    assert {file["name"]: file["sha256"] for file in answer["snapshot"]["files"]} == {
        file.name: file.sha256 for file in stage.snapshot().files
    }
    before = len(stage.hub.log)
    again = stage.fetch()
    stage.assert_whole(again)
    assert [seen.path for seen in stage.hub.log[before:]] == [f"/api/models/{stage.repo}/revision/main"]


@on("plain")
def test_a_commit_can_be_named_as_revision(stage: Stage) -> None:
    commit = stage.hub.models[stage.repo].commit
    assert stage.resolve(revision=commit)["snapshot"]["commit"] == commit


@on("plain")
def test_a_file_that_shrank_in_the_cache_is_fetched_again(stage: Stage) -> None:
    folder = Path(stage.fetch()["folder"])
    for name in ("model.safetensors", "config.json"):
        os.truncate(folder / name, 7)
    assert snapshot_dir(stage.snapshot(), stage.cache) is None
    stage.assert_whole(stage.fetch())


@on("plain")
def test_a_verified_snapshot_is_not_hashed_again_and_an_unverified_one_is(stage: Stage) -> None:
    weights = Path(stage.fetch()["folder"]) / "model.safetensors"
    weights.resolve().write_bytes(bytes(weights.stat().st_size))
    assert snapshot_dir(stage.snapshot(), stage.cache) is not None
    for note in stage.cache.rglob("verified/*.json"):
        note.unlink()
    stage.assert_fails(stage.fetch(), "did not arrive as the hub states it", "run again")
    stage.assert_whole(stage.fetch())


@on("gated")
def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(stage: Stage) -> None:
    stage.faults.gated = True
    stage.assert_whole(stage.fetch(token=GOOD_TOKEN))
    requests = stage.hub.requests(stage.repo)
    assert all(seen.authorized != seen.cdn for seen in requests)
    assert any(seen.cdn for seen in requests)


@on("xet")
def test_a_repository_in_xet_storage_is_read_over_plain_http(stage: Stage) -> None:
    stage.faults.xet = True
    stage.assert_whole(stage.fetch())
    assert not stage.hub.requests("xet-read-token")


@on("mirror")
def test_a_mirror_with_etags_of_its_own_still_works(stage: Stage) -> None:
    stage.faults.odd_etag = True
    stage.assert_whole(stage.fetch())


@on("twins")
def test_two_equal_files_share_one_download(stage: Stage) -> None:
    stage.assert_whole(stage.fetch())
    assert len(stage.hub.requests("/cdn/acme/twins/model-", "GET")) == 1


@on("concurrent")
def test_two_processes_download_one_repository_once(stage: Stage, tmp_path: Path) -> None:
    other = Client(tmp_path, **online(stage.hub))
    try:
        other.send(stage.repo, stage.cache)
        stage.client.send(stage.repo, stage.cache)
        answers = [stage.client.answer(), other.answer()]
    finally:
        other.end()
    for answer in answers:
        stage.assert_whole(answer)
    assert len(stage.bodies()) == 1


# Interruptions.


@on("cut")
def test_a_cut_body_is_continued_within_the_same_call(stage: Stage) -> None:
    stage.faults.cut_after = CHUNK + 100_000
    stage.assert_whole(stage.fetch())
    assert stage.bodies() == ["", f"bytes={CHUNK}-"]


@on("reset")
def test_a_reset_connection_is_continued_within_the_same_call(stage: Stage) -> None:
    stage.faults.cut_after, stage.faults.reset = CHUNK + 100_000, True
    stage.assert_whole(stage.fetch())
    assert stage.bodies()[0] == ""
    assert len(stage.bodies()) == 2


@on("killed")
def test_a_killed_download_is_continued_by_the_next_process(stage: Stage, tmp_path: Path) -> None:
    stage.faults.hang_after, stage.faults.hang_s = CHUNK + 100_000, DEADLINE_S
    doomed = Client(tmp_path, **online(stage.hub) | {"HF_HUB_DOWNLOAD_TIMEOUT": str(DEADLINE_S)})
    try:
        doomed.send(stage.repo, stage.cache)
        wait_for_bytes(stage.cache, CHUNK)
    finally:
        doomed.process.send_signal(signal.SIGKILL)
        doomed.end()
    assert snapshot_dir(stage.snapshot(), stage.cache) is None
    blobs = next(stage.cache.glob("models--*/blobs"))
    (blobs / "0123456789abcdef.0a1b2c3d.incomplete").write_bytes(b"what the library leaves")
    stage.assert_whole(stage.fetch())
    assert stage.bodies() == ["", f"bytes={CHUNK}-"]


@on("interrupted")
def test_an_interrupt_asks_for_nothing_more_and_keeps_what_came(stage: Stage, tmp_path: Path) -> None:
    stage.faults.hang_after, stage.faults.hang_s = CHUNK + 100_000, DEADLINE_S
    doomed = Client(tmp_path, **online(stage.hub))
    try:
        doomed.send(stage.repo, stage.cache)
        wait_for_bytes(stage.cache, CHUNK)
        doomed.process.send_signal(signal.SIGINT)
        doomed.process.wait(DEADLINE_S)
    finally:
        doomed.end()
    assert stage.bodies() == [""]
    assert snapshot_dir(stage.snapshot(), stage.cache) is None
    stage.assert_whole(stage.fetch())
    assert stage.bodies() == ["", f"bytes={CHUNK}-"]


@on("ignorant")
def test_a_server_that_ignores_ranges_is_read_from_the_start(stage: Stage) -> None:
    stage.faults.cut_after, stage.faults.ignore_range = CHUNK + 100_000, True
    stage.assert_whole(stage.fetch())
    assert stage.bodies() == ["", f"bytes={CHUNK}-"]


@on("slow")
def test_a_stalled_body_is_continued_after_the_timeout(stage: Stage) -> None:
    stage.faults.hang_after, stage.faults.hang_s = CHUNK + 100_000, DEADLINE_S
    stage.assert_whole(stage.fetch())
    assert stage.bodies() == ["", f"bytes={CHUNK}-"]


@on("drop")
def test_dropped_connections_fail_and_a_rerun_succeeds(stage: Stage) -> None:
    stage.faults.drop = True
    stage.assert_fails(stage.fetch(), "the connection broke while fetching", "run again: the download continues")
    stage.faults.drop = False
    stage.assert_whole(stage.fetch())


@on("hang")
def test_a_hub_that_does_not_answer_is_given_up(stage: Stage) -> None:
    stage.faults.hang_api = True
    stage.assert_fails(stage.fetch(), "did not answer in time", "HF_HUB_ETAG_TIMEOUT=60")
    stage.faults.hang_api = False
    stage.assert_whole(stage.fetch())


# Refusals.


@on("gated")
def test_a_gated_repository_without_a_token_says_how_to_get_one(stage: Stage) -> None:
    stage.faults.gated = True
    answer = stage.fetch()
    stage.assert_fails(answer, "acme/gated is gated", "accept the licence at https://huggingface.co/acme/gated, ")
    assert "https://huggingface.co/settings/tokens" in answer["hint"]
    assert "export HF_TOKEN=..." in answer["hint"]
    stage.assert_whole(stage.fetch(token=GOOD_TOKEN))


@on("gated")
def test_a_gated_repository_with_a_strangers_token_says_which_licence(stage: Stage) -> None:
    stage.faults.gated = True
    answer = stage.fetch(token=OTHER_TOKEN)
    stage.assert_fails(answer, "your token has no access", "https://huggingface.co/acme/gated with the account")


@on("plain")
def test_a_wrong_token_is_named_and_not_shown(stage: Stage) -> None:
    answer = stage.fetch(token="hf_wrongToken")
    stage.assert_fails(answer, "the hub refused the token", "unset HF_TOKEN")
    assert "Invalid credentials in Authorization header (<token>)" in answer["evidence"]
    assert "hf_wrongToken" not in str(answer)


@on("private")
def test_a_private_repository_looks_missing_without_a_token(stage: Stage) -> None:
    stage.faults.private = True
    stage.assert_fails(stage.fetch(), "was not found on the hub, or it is private", "export HF_TOKEN=...")
    stage.assert_fails(stage.fetch(token=OTHER_TOKEN), "your token cannot see it", "check the spelling")
    stage.assert_whole(stage.fetch(token=GOOD_TOKEN))


@on("plain")
def test_a_missing_repository_is_named(stage: Stage) -> None:
    answer = stage.client.ask("acme/no-such-thing")
    stage.assert_fails(answer, "acme/no-such-thing was not found", "https://huggingface.co/acme/no-such-thing")


@on("plain")
def test_a_missing_revision_is_named(stage: Stage) -> None:
    stage.assert_fails(stage.resolve(revision="v9"), "has no revision 'v9'", "/acme/plain/tree/main")


@on("plain")
@pytest.mark.parametrize(
    ("repo", "hint"),
    [
        ("a/b/c", "owner/name"),
        ("acme/sp ace", "owner/name"),
        ("https://huggingface.co/acme/plain/tree/main", "write acme/plain"),
        ("", "owner/name"),
    ],
)
def test_a_malformed_name_is_a_usage_error(stage: Stage, repo: str, hint: str) -> None:
    stage.assert_fails(stage.client.ask(repo), "is not the name of a hub repository", hint, exit_code=2)


@on("plain")
def test_an_empty_revision_is_a_usage_error(stage: Stage) -> None:
    stage.assert_fails(stage.resolve(revision=" "), "empty revision", "main", exit_code=2)


@on("limited")
def test_a_long_rate_limit_is_told_and_not_slept_through(stage: Stage) -> None:
    stage.faults.status, stage.faults.status_times, stage.faults.retry_after = 429, 1, "900"
    stage.assert_fails(stage.fetch(), "limits how often", "run again in 900 s; with a token")
    assert stage.faults.status_times == 0, "asked once"
    stage.assert_whole(stage.fetch())


@on("limited")
def test_a_short_rate_limit_is_waited_for(stage: Stage) -> None:
    stage.faults.status, stage.faults.status_times, stage.faults.retry_after = 429, 2, "0"
    stage.assert_whole(stage.fetch())


@on("busy")
@pytest.mark.parametrize("on_path", ["/api/models/", "model.safetensors", "config.json"])
def test_a_busy_hub_is_tried_three_times(stage: Stage, on_path: str) -> None:
    stage.faults.status, stage.faults.status_times, stage.faults.status_on = 503, 99, on_path
    before = len(stage.hub.requests(on_path))
    stage.assert_fails(stage.fetch(), "out of order (HTTP 503)", "run again later")
    assert len([seen for seen in stage.hub.requests(on_path)[before:] if stage.repo in seen.path]) == 3
    stage.faults.status_times = 0
    stage.assert_whole(stage.fetch())


@on("busy")
def test_a_hub_that_is_busy_for_a_moment_is_no_failure(stage: Stage) -> None:
    stage.faults.status, stage.faults.status_times = 502, 2
    stage.assert_whole(stage.fetch())


@pytest.mark.parametrize(
    ("stage", "why", "hint"),
    [
        ("ggufs", "it holds GGUF files already", "python -m runtime chat acme/ggufs"),
        ("adapter", "it is an adapter", "base model"),
        ("empty", "no model*.safetensors", "transformers weights"),
    ],
    indirect=["stage"],
)
def test_a_repository_without_weights_lists_what_it_holds(stage: Stage, why: str, hint: str) -> None:
    answer = stage.client.ask(stage.repo, stage.cache)
    assert answer["exit_code"] == 4
    assert f"{stage.repo} has nothing to convert: {why}" in answer["message"]
    assert hint in answer["hint"]
    assert set(answer["evidence"].splitlines()) == set(stage.hub.models[stage.repo].files)
    assert not stage.cache.exists()


@on("garbage")
def test_a_guest_network_page_is_not_taken_for_the_hub(stage: Stage) -> None:
    stage.faults.garbage = True
    stage.assert_fails(stage.fetch(), "is not the hub", "check HF_ENDPOINT and the proxy settings")


# What arrives wrong, and where it cannot be put.


@on("wrong")
@pytest.mark.parametrize("odd_etag", [False, True])
def test_wrong_bytes_are_deleted(stage: Stage, odd_etag: bool) -> None:
    stage.faults.wrong_bytes, stage.faults.odd_etag = "model.safetensors", odd_etag
    answer = stage.fetch()
    stage.assert_fails(answer, "model.safetensors of acme/wrong did not arrive", "run again to download it anew")
    assert f"expected sha256 {stage.hub.models[stage.repo].hashes['model.safetensors']}" in answer["evidence"]
    wrong = stage.hub.models[stage.repo].served("model.safetensors")
    assert wrong not in [path.read_bytes() for path in stage.cache.rglob("*") if path.is_file()]
    stage.faults.wrong_bytes = ""
    stage.assert_whole(stage.fetch())


@on("short")
def test_a_short_body_is_deleted(stage: Stage) -> None:
    stage.faults.short_by = 100
    stage.assert_fails(stage.fetch(), "did not arrive as the hub states it", "run again to download it anew")
    weights = stage.hub.models[stage.repo].hashes["model.safetensors"]  # others may have been stopped, and are kept
    assert not list(stage.cache.rglob(f"{weights}*"))
    stage.faults.short_by = 0
    stage.assert_whole(stage.fetch())


@on("corrupt")
def test_a_part_that_cannot_be_continued_is_deleted(stage: Stage) -> None:
    weights = stage.hub.models[stage.repo].files["model.safetensors"]
    blobs = stage.cache / "models--acme--corrupt" / "blobs"
    part = blobs / f"{stage.hub.models[stage.repo].hashes['model.safetensors']}.incomplete"
    blobs.mkdir(parents=True)
    part.write_bytes(bytes(100))
    stage.assert_fails(stage.fetch(), "did not arrive as the hub states it", "run again")
    part.write_bytes(weights[:4950])
    stage.faults.short_by = 100
    stage.assert_fails(stage.fetch(), "the hub cannot continue", "run again to download it anew")
    stage.faults.short_by = 0
    part.write_bytes(weights * 2)
    stage.assert_whole(stage.fetch())


@on("huge")
def test_a_snapshot_larger_than_the_disk_is_refused_at_once(stage: Stage) -> None:
    stage.faults.claim_bytes = 10**17
    stage.assert_fails(stage.fetch(), "not enough disk space for downloading acme/huge", "free some space", exit_code=3)
    assert not stage.bodies()
    stage.faults.claim_bytes = 0
    stage.assert_whole(stage.fetch())


@on("full")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(stage: Stage) -> None:
    blobs = stage.cache / "models--acme--full" / "blobs"
    part = blobs / f"{stage.hub.models[stage.repo].hashes['model.safetensors']}.incomplete"
    blobs.mkdir(parents=True)
    part.symlink_to("/dev/full")
    stage.assert_fails(stage.fetch(), "the disk is full while writing", "free some space", exit_code=3)
    part.unlink()
    stage.assert_whole(stage.fetch())


# No hub at all.


@on("plain")
def test_a_name_that_does_not_resolve_is_told(stage: Stage, tmp_path: Path) -> None:
    child = Client(tmp_path, HF_ENDPOINT="http://hub.invalid")
    try:
        answer = child.ask(stage.repo, no_names=True)
    finally:
        child.end()
    stage.assert_fails(answer, "cannot reach http://hub.invalid", "check the network")
    assert "name resolution" in answer["evidence"]


@on("plain")
def test_offline_refused_proxied_and_misspelt_hubs_are_told_apart(stage: Stage, tmp_path: Path) -> None:
    """All children at once: each is one import of the client long."""
    with serve_hub({}) as gone:
        closed = gone.url
    proxy = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": stage.hub.url, "NO_PROXY": ""}
    cases = [
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is on", "unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": closed}, f"cannot reach {closed}", "HTTPS_PROXY"),
        ({"HF_ENDPOINT": "hub.example"}, "'hub.example' is not an address of a hub", "set HF_ENDPOINT"),
        (proxy, "was not found on the hub", "huggingface.co/acme/through-the-proxy"),
    ]
    children = [Client(tmp_path / str(nth), **environment) for nth, (environment, _, _) in enumerate(cases)]
    try:
        for child in children:
            child.send("acme/through-the-proxy")
        for child, (_, message, hint) in zip(children, cases, strict=True):
            stage.assert_fails(child.answer(), message, hint)
    finally:
        for child in children:
            child.end()
    assert stage.hub.requests("through-the-proxy"), "HTTP_PROXY is respected"


def size_of(path: Path) -> int:
    """0 for a file that went away while it was looked at."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wait_for_bytes(cache: Path, n_bytes: int) -> None:
    """Until an unfinished file of at least ``n_bytes`` lies in the cache."""
    give_up = time.monotonic() + DEADLINE_S
    while not any(size_of(path) >= n_bytes for path in cache.rglob("*.incomplete")):
        assert time.monotonic() < give_up
        time.sleep(0.02)
