"""Repositories of GGUF files on a real loopback hub: what they offer, headers by ranged reads, the file itself.

The client reads its environment when it is imported, so it lives in a child process that takes a command a line.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import GOOD_TOKEN, Faults, LoopbackHub, serve_hub
from toolchain.base.errors import UsageError
from toolchain.base.gguf import read_header
from toolchain.hub import ggufs
from toolchain.hub.ggufs import Quant, RepoListing, choose_quant
from toolchain.hub.repository import RemoteFile, Repository

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000
DEADLINE_S = 60

CHILD = """
import contextlib, dataclasses, io, json, os, sys
from pathlib import Path
from runtime import hub_model, resolve
from toolchain.base.errors import FoundryError
from toolchain.hub import errors, ggufs, headers

errors._FIRST_WAIT_S = 0.01

def told(value):
    return {key: told(item) for key, item in value.items()} if isinstance(value, dict) else (
        [told(item) for item in value] if isinstance(value, list | tuple) else
        str(value) if isinstance(value, Path) else value)

def run(verb, typed, root):
    cache = Path(root, "home", "hub")
    if verb == "list":
        return dataclasses.asdict(ggufs.list_quants(typed))
    if verb == "headers":
        found = hub_model.remote_model_headers(typed, cache, all_quants=True)
        return {"chosen": found.chosen.name, "headers": told(dict(found.headers)), "commit": found.listing.commit}
    if verb == "header":
        listing = ggufs.list_quants(typed)
        return str(headers.remote_header(listing, listing.quants[0].files[0], cache))
    found = resolve.resolve(typed, root=Path(root), models=Path(root, "models"))
    return {"path": str(found.path), "type": found.type, "repo": found.repo}

for line in sys.stdin:
    order = json.loads(line)
    os.environ["FOUNDRY_HOME"] = order["root"] + "/home"
    os.environ.pop("HF_TOKEN", None)
    if order["token"]:
        os.environ["HF_TOKEN"] = order["token"]
    with contextlib.redirect_stderr(io.StringIO()) as story:
        try:
            answer = {"value": run(order["verb"], order["typed"], order["root"])}
        except FoundryError as error:
            words = {"message": error.message, "evidence": error.evidence, "hint": error.hint}
            answer = {"error": type(error).__name__, "exit_code": error.exit_code, **words}
    print(json.dumps({**answer, "story": story.getvalue()}), flush=True)
"""


class Client:
    """The child with the real client."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if key in os.environ}
        own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "HF_HOME": str(home / "hf"), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | own
        )

    def ask(self, verb: str, typed: str, root: Path, *, token: str = "") -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"verb": verb, "typed": typed, "root": str(root), "token": token}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def value(self, verb: str, typed: str, root: Path, *, token: str = "") -> Any:
        answer = self.ask(verb, typed, root, token=token)
        assert "error" not in answer, answer
        return answer["value"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)


def asked(hub: LoopbackHub, before: int) -> list[str]:
    """Paths asked for since; the client's own question about coding agents, once a process, is none of ours."""
    return [seen.path for seen in hub.log[before:] if seen.path != "/api/agent-harnesses"]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*, data_bytes: int, words: int = 100, shard: tuple[int, int] | None = None) -> bytes:
    """A GGUF with a vocabulary of ``words`` and one tensor of ``data_bytes`` (a multiple of 128)."""
    vocabulary = b"".join(text(f"word-{number:08d}") for number in range(words))
    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words) + vocabulary,
    ]
    if shard:
        keys += [
            text("split.no") + struct.pack("<IH", 2, shard[0]),
            text("split.count") + struct.pack("<IH", 2, shard[1]),
        ]
    tensor = text("a.weight") + struct.pack("<IQiQ", 1, data_bytes // 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys) + tensor
    return head + bytes(-len(head) % 32) + bytes(range(1, 129)) * (data_bytes // 128)


SMALL = gguf(data_bytes=12_800)
LARGE = gguf(data_bytes=49_920_000)
WORDY = gguf(data_bytes=12_800_000, words=300_000)  # a header of 6.3 MB
REPOS: Mapping[str, Mapping[str, bytes]] = {
    "many": {
        "Model-Q4_K_M.gguf": SMALL,
        "Model-Q8_0.gguf": gguf(data_bytes=25_600),
        "UD/Model-00001-of-00002.gguf": gguf(data_bytes=1280, shard=(0, 2)),
        "UD/Model-00002-of-00002.gguf": gguf(data_bytes=1280, shard=(1, 2)),
        "mmproj-F16.gguf": SMALL,
        "README.md": b"# words\n",
    },
    "large": {"Model-Q4_K_M.gguf": LARGE},
    "wordy": {"Model-Q4_K_M.gguf": WORDY},
    "several": {
        "Model-Q4_K_M.gguf": gguf(data_bytes=12_800_000, words=100_000),
        "Model-Q8_0.gguf": gguf(data_bytes=25_600_000, words=100_000),
    },
    "strange": {"Model-Q4_K_M.gguf": b"<html>" + bytes(5000)},
    "empty": {"Model-Q4_K_M.gguf": b""},
    "weights": {"model.safetensors": b"weights", "config.json": b"{}"},
}


def write_repo(folder: Path, held: Mapping[str, bytes]) -> Path:
    for name, body in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    root = tmp_path_factory.mktemp("ggufs")
    with serve_hub({f"acme/{name}": write_repo(root / name, held) for name, held in REPOS.items()}) as running:
        yield running


@pytest.fixture(scope="module")
def module_client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    running = Client(tmp_path_factory.mktemp("home"), **online(hub))
    yield running
    running.end()


@pytest.fixture
def client(hub: LoopbackHub, module_client: Client) -> Iterator[Client]:
    yield module_client
    for model in hub.models.values():
        model.faults = Faults()


def online(hub: LoopbackHub) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1",
    }


# What a repository offers.


def listing(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> RepoListing:
    """The listing of a repository that holds these files, each larger than the one before it."""

    def look_up(repo: str, revision: str, choose: Any) -> Any:
        chosen = tuple(RemoteFile(name=name, bytes=100 + names.index(name), sha256=None) for name in choose(names))
        return Repository(commit="0" * 40, names=(), chosen=chosen, n_params=None)

    monkeypatch.setattr(ggufs, "look_up", look_up)
    return ggufs.list_quants("acme/model")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("Llama-3.2-1B-Instruct-IQ3_XXS.gguf", "IQ3_XXS"),
        ("Llama-3.2-1B-Instruct-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Kimi-UD-TQ1_0.gguf", "UD-TQ1_0"),
        ("Qwen3-0.6B-BF16.gguf", "BF16"),
        ("BF16/DeepSeek-V3-BF16-00001-of-00001.gguf", "BF16"),
        ("llama-2-7b.Q5_K_S.gguf", "Q5_K_S"),
        ("Model.i1-IQ2_M.gguf", "IQ2_M"),
        ("qwen2.5-7b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-fp16.gguf", "FP16"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("GLM-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Model-F16-Q6_K.gguf", "Q6_K"),
        ("Model-Q4_K_M-imat.gguf", "Q4_K_M"),
        ("Model-IQ4_NL_v2.gguf", "IQ4_NL"),
        ("story-lora-Q4_K_M.gguf", "Q4_K_M"),
        ("stories15M.gguf", "stories15M"),
        ("Floral-7B.GGUF", "Floral-7B"),
    ],
)
def test_a_quant_is_named_as_its_publisher_names_it(monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
    assert [quant.name for quant in listing(monkeypatch, [file]).quants] == [name]


@pytest.mark.parametrize(
    "file",
    [
        *("imatrix.gguf", "Model-imatrix.gguf", "Model.imatrix", "imatrix_unsloth.gguf_file", "ggml-vocab-llama.gguf"),
        *("adapter.gguf", "Model-lora.gguf", "Model-LoRA-F16.gguf", "mtp-Model-Q8_0.gguf", "Model.Q8_0.gguf.part1of2"),
        *("Model-Q8_0-00001-of-00002.gguf", "../Model-Q8_0.gguf", "/Model-Q8_0.gguf", "a\\Model-Q8_0.gguf"),
    ],
)
def test_what_is_no_whole_model_is_left_out(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    found = listing(monkeypatch, [file, "Model-Q4_0.gguf"])
    assert [quant.name for quant in found.quants] == ["Q4_0"]
    assert not found.mmproj


def test_shards_are_one_quant_in_order_and_projectors_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [f"Q8_0/Model-Q8_0-0000{number}-of-00003.gguf" for number in (3, 1, 2)]
    found = listing(monkeypatch, ["mmproj-Model-BF16.gguf", *shards, "Model-Q4_K_M.gguf", "Model.mmproj-Q8_0.gguf"])
    assert [quant.name for quant in found.quants] == ["Q4_K_M", "Q8_0"]
    assert [file.name[-19:-14] for file in found.quants[1].files] == ["00001", "00002", "00003"]
    assert found.quants[1].bytes == 101 + 102 + 103
    assert [file.name for file in found.mmproj] == ["Model.mmproj-Q8_0.gguf", "mmproj-Model-BF16.gguf"]


def test_two_models_of_one_quant_go_by_their_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    found = listing(monkeypatch, ["tiny-Q4_0.gguf", "more/small-Q4_0.gguf", "small-Q8_0.gguf"])
    assert [quant.name for quant in found.quants] == ["tiny-Q4_0", "more/small-Q4_0", "Q8_0"]
    assert choose_quant(found, "small-q4_0").name == "more/small-Q4_0"
    assert choose_quant(found, None).name == "tiny-Q4_0"


def offer(*names: str) -> RepoListing:
    quants = tuple(
        Quant(name=name, files=(RemoteFile(name=f"Model-{name}.gguf", bytes=nth, sha256=None),))
        for nth, name in enumerate(names)
    )
    return RepoListing(repo="acme/model", revision="main", commit="0" * 40, quants=quants, mmproj=())


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("Q2_K", "Q4_K_S", "Q4_K_M", "Q8_0"), "Q4_K_M"),
        (("Q2_K", "Q4_K_S", "Q5_K_M"), "Q4_K_S"),
        (("UD-Q4_K_XL", "IQ4_XS"), "UD-Q4_K_XL"),
        (("IQ1_S", "Q8_0", "BF16"), "Q8_0"),
        (("Q2_K", "Q3_K_M"), "Q3_K_M"),
        (("MXFP4",), "MXFP4"),
        (("BF16", "F32"), "BF16"),
    ],
)
def test_without_a_name_the_usual_quant_is_taken(names: tuple[str, ...], chosen: str) -> None:
    assert choose_quant(offer(*names), None).name == chosen


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [("q8_0", "Q8_0"), ("Q4_K_XL", "UD-Q4_K_XL"), ("F16", "FP16"), ("model-q8_0.gguf", "Q8_0"), ("Model-Q8_0", "Q8_0")],
)
def test_a_quant_is_found_in_any_case_and_by_its_file(wanted: str, chosen: str) -> None:
    assert choose_quant(offer("UD-Q4_K_XL", "Q8_0", "FP16"), wanted).name == chosen


def test_an_unknown_quant_lists_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        choose_quant(offer("Q4_K_M", "Q8_0"), "q4_k_n")
    assert caught.value.evidence == "there are: Q4_K_M, Q8_0"
    assert caught.value.hint == "did you mean acme/model:Q4_K_M?"


def test_a_listing_costs_one_request(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    before = len(hub.log)
    found = client.value("list", "acme/many", tmp_path)
    assert asked(hub, before) == ["/api/models/acme/many/revision/main"]
    assert {quant["name"] for quant in found["quants"]} == {"Q4_K_M", "Q8_0", "Model"}
    assert found["commit"] == hub.models["acme/many"].commit
    assert found["mmproj"][0]["sha256"] == hub.models["acme/many"].hashes["mmproj-F16.gguf"]


# Headers.


def test_planning_a_50_mb_file_reads_less_than_2_mb(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    before = hub.body_bytes
    path = Path(client.value("header", "acme/large", tmp_path))
    assert hub.body_bytes - before < 2 * MB
    header = read_header(path)
    assert header.file_bytes == len(LARGE) > 49 * MB
    assert [tensor.nbytes for tensor in header.tensors] == [49_920_000]
    assert path.stat().st_blocks * 512 < 2 * MB, "the file is sparse"
    assert path.read_bytes()[: header.data_offset] == LARGE[: header.data_offset]


def test_a_long_vocabulary_is_read_to_its_end_and_little_further(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    before = hub.body_bytes
    header = read_header(Path(client.value("header", "acme/wordy", tmp_path)))
    assert header.n_vocab == 300_000
    assert header.data_offset < hub.body_bytes - before < 2 * header.data_offset


def test_headers_of_all_quants_are_fetched_once_with_every_shard(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    found = client.value("headers", "acme/many", tmp_path)
    assert found["chosen"] == "Q4_K_M"
    assert {name: len(paths) for name, paths in found["headers"].items()} == {"Q4_K_M": 1, "Q8_0": 1, "Model": 2}
    first = read_header(Path(found["headers"]["Model"][0]))
    assert [str(path) for path in first.shard_paths] == found["headers"]["Model"]
    assert [read_header(path).split for path in first.shard_paths] == [(0, 2), (1, 2)]
    before = len(hub.log)
    assert client.value("headers", "acme/many", tmp_path) == found
    assert asked(hub, before) == ["/api/models/acme/many/revision/main"]


def test_the_first_header_tells_how_much_to_ask_of_the_others(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    before, so_far = len(hub.log), hub.body_bytes
    found = client.value("headers", "acme/several", tmp_path)
    header_bytes = read_header(Path(found["headers"]["Q8_0"][0])).data_offset
    asked_for = [seen.range for seen in hub.log[before:] if seen.cdn]
    assert asked_for[-1] == f"bytes=0-{header_bytes + 65_535}"
    assert len(asked_for) == 3 + 1
    assert hub.body_bytes - so_far < 3.5 * header_bytes


def test_headers_on_disk_serve_when_the_hub_is_away(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    found = client.value("headers", "acme/many", tmp_path)
    hub.faults("acme/many").status, hub.faults("acme/many").status_times = 503, 99
    answer = client.ask("headers", "acme/many", tmp_path)
    assert answer["value"] == found
    assert "out of order (HTTP 503)" in answer["story"]


def test_a_server_without_ranges_is_cut_off(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.faults("acme/large").ignore_range = True
    before = hub.body_bytes
    assert read_header(Path(client.value("header", "acme/large", tmp_path))).file_bytes == len(LARGE)
    assert hub.body_bytes - before < len(LARGE) // 2, "what socket buffers hold is all that may be lost"


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_cut_header_is_taken_up_where_it_was_cut(
    hub: LoopbackHub, client: Client, tmp_path: Path, ignore_range: bool
) -> None:
    faults = hub.faults("acme/wordy")
    faults.cut_after, faults.ignore_range = 600_000, ignore_range
    before = len(hub.log)
    assert read_header(Path(client.value("header", "acme/wordy", tmp_path))).n_vocab == 300_000
    ranges = [seen.range for seen in hub.log[before:] if seen.cdn]
    assert ranges[0] == "bytes=0-1048575"
    assert ranges[1].startswith("bytes=")
    assert ranges[1].endswith("-1048575")
    assert 0 < int(ranges[1][6:-8]) <= 600_000


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    hub.faults("acme/many").gated = True
    answer = client.ask("headers", "acme/many", tmp_path)
    assert answer["exit_code"] == 4
    assert "acme/many is gated" in answer["message"]
    before = len(hub.log)
    client.value("headers", "acme/many", tmp_path, token=GOOD_TOKEN)
    requests = [seen for seen in hub.log[before:] if "acme/many" in seen.path]
    assert any(seen.cdn for seen in requests)
    assert all(seen.authorized != seen.cdn for seen in requests)


@pytest.mark.parametrize(
    ("repo", "faults", "message", "exit_code"),
    [
        ("nothing", Faults(), "acme/nothing was not found on the hub", 4),
        ("large", Faults(drop=True), "the connection broke while fetching Model-Q4_K_M.gguf of acme/large", 4),
        ("large", Faults(status=404, status_times=9, status_on="/resolve/"), "was not found on the hub", 4),
        ("large", Faults(status=503, status_times=9, status_on="/resolve/"), "out of order (HTTP 503)", 4),
        ("large", Faults(claim_bytes=60_000_000), "is not of the size that the hub states", 4),
        ("large", Faults(claim_bytes=100_000, ignore_range=True), "is not of the size that the hub states", 4),
        ("large", Faults(hang_after=0), "did not answer in time", 4),
        ("large", Faults(garbage=True), "is not the hub", 4),
        ("strange", Faults(), "Model-Q4_K_M.gguf: not a GGUF", 6),
        ("empty", Faults(), "Model-Q4_K_M.gguf: not a GGUF", 6),
        ("weights", Faults(), "acme/weights holds no GGUF", 2),
    ],
)
def test_a_header_that_cannot_be_had_says_why_and_leaves_nothing(
    hub: LoopbackHub, client: Client, tmp_path: Path, repo: str, faults: Faults, message: str, exit_code: int
) -> None:
    if f"acme/{repo}" in hub.models:
        hub.models[f"acme/{repo}"].faults = faults
    answer = client.ask("headers", f"acme/{repo}", tmp_path)
    assert message in answer.get("message", ""), answer
    assert answer["exit_code"] == exit_code
    assert answer["hint"]
    assert "Signature" not in str(answer)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".header", ".gguf")]


def test_a_file_that_ends_before_its_stated_size_is_told(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.models["acme/strange"].faults = Faults(claim_bytes=9_000_000)
    answer = client.ask("headers", "acme/strange", tmp_path)
    assert "is not of the size that the hub states" in answer["message"]
    assert answer["evidence"] == "stated 9000000 bytes\nserved 5006 bytes"


# The model itself, as `python -m runtime chat owner/repo` finds it.


def test_a_model_is_downloaded_once_and_then_found_without_asking(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    found = client.value("resolve", "acme/many", tmp_path)
    assert (found["type"], found["repo"]) == ("Q4_K_M", "acme/many")
    assert Path(found["path"]).name == "Model-Q4_K_M.gguf"
    assert Path(found["path"]).read_bytes() == SMALL
    before = len(hub.log)
    assert client.value("resolve", "acme/many", tmp_path) == found
    assert client.value("resolve", "acme/many:q4_k_m", tmp_path) == found
    assert not asked(hub, before)


def test_a_split_model_is_answered_with_its_first_shard(client: Client, tmp_path: Path) -> None:
    found = client.value("resolve", "acme/many:model", tmp_path)
    header = read_header(Path(found["path"]))
    assert header.split == (0, 2)
    assert [read_header(path).split for path in header.shard_paths] == [(0, 2), (1, 2)]


def test_a_second_quant_is_looked_up_anew(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    client.value("resolve", "acme/many", tmp_path)
    before = len(hub.log)
    client.value("resolve", "acme/many:Q8_0", tmp_path)
    assert len([seen for seen in hub.log[before:] if seen.path.startswith("/api/models/")]) == 1


def test_a_downloaded_model_is_planned_with_its_own_files(client: Client, tmp_path: Path) -> None:
    path = client.value("resolve", "acme/many", tmp_path)["path"]
    found = client.value("headers", "acme/many", tmp_path)
    assert found["headers"]["Q4_K_M"] == [path]
    assert Path(found["headers"]["Q8_0"][0]).stat().st_blocks * 512 < 65_536


def test_a_commit_that_the_hub_dropped_is_looked_up_anew(tmp_path: Path) -> None:
    before = write_repo(tmp_path / "before", {"Model-Q8_0.gguf": SMALL, "Model-Q4_K_M.gguf": SMALL})
    after = write_repo(tmp_path / "after", {"Model-Q8_0.gguf": SMALL, "Model-Q4_K_M.gguf": gguf(data_bytes=1280)})
    with serve_hub({"acme/moved": before}) as hub:
        client = Client(tmp_path, **online(hub))
        try:
            old = client.value("resolve", "acme/moved:Q8_0", tmp_path)
            hub.models["acme/moved"] = type(hub.models["acme/moved"])(after, Faults())
            new = client.value("resolve", "acme/moved", tmp_path)
            assert Path(new["path"]).read_bytes() == gguf(data_bytes=1280)
            so_far = len(hub.log)
            assert client.value("resolve", "acme/moved", tmp_path) == new
            assert not asked(hub, so_far)
            assert Path(old["path"]).read_bytes() == SMALL
        finally:
            client.end()


def test_offline_a_cached_model_works_and_another_says_so(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    found = client.value("resolve", "acme/many", tmp_path)
    offline = Client(tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://hub.invalid")
    try:
        assert offline.value("resolve", "acme/many", tmp_path) == found
        answer = offline.ask("resolve", "acme/many:Q8_0", tmp_path)
        assert "offline mode is on" in answer["message"]
        missing = offline.ask("resolve", "modles/demo", tmp_path)
        assert missing["exit_code"] == 4
        assert "no file and no recipe of that name is here" in missing["evidence"]
    finally:
        offline.end()


def test_a_cut_download_goes_on(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.faults("acme/large").cut_after = 20 * MB
    assert Path(client.value("resolve", "acme/large", tmp_path)["path"]).read_bytes() == LARGE


def test_wrong_bytes_are_deleted_and_a_rerun_succeeds(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.faults("acme/many").wrong_bytes = "Model-Q4_K_M.gguf"
    answer = client.ask("resolve", "acme/many", tmp_path)
    assert "did not arrive as the hub states it" in answer["message"]
    assert not list(tmp_path.rglob("*.gguf"))
    hub.faults("acme/many").wrong_bytes = ""
    assert Path(client.value("resolve", "acme/many", tmp_path)["path"]).read_bytes() == SMALL


def test_a_quant_that_is_not_there_lists_those_that_are(client: Client, tmp_path: Path) -> None:
    answer = client.ask("resolve", "acme/many:Q4_K_L", tmp_path)
    assert answer["exit_code"] == 2
    assert "Q4_K_M" in answer["evidence"]
    assert answer["hint"].startswith("did you mean acme/many:Q4_K_")


@pytest.mark.parametrize(("typed", "type_"), [("acme/weights", "Q4_K_M"), ("acme/weights:Q5_K_M", "Q5_K_M")])
def test_a_repository_without_gguf_gets_a_recipe_to_write(
    client: Client, tmp_path: Path, typed: str, type_: str
) -> None:
    answer = client.ask("resolve", typed, tmp_path)
    assert answer["exit_code"] == 2
    assert "model: {hub: acme/weights}" in answer["evidence"]
    assert f"quantize: [{type_}]" in answer["evidence"]
    assert "`./inv quantize recipes/weights.yaml`" in answer["hint"]
