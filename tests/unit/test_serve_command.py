"""The llama-server command of a prepared model, and the address that we listen on."""

from __future__ import annotations

import csv
import errno
import os
import socket
from pathlib import Path

import pytest

from runtime.serve import address
from runtime.serve.command import Door, Served, cache_mib, child_environment, model_options, router_argv, server_argv
from runtime.settings import settle
from toolchain.base.errors import UsageError
from toolchain.base.machine import probe

PROGRAM = Path("/bin/llama-server")
PATIENCE_S = 30


def served(**changes: object) -> Served:
    flags = {"n_ctx": 1000, "n_threads": 3, "n_threads_batch": 4, "n_gpu_layers": 0, "n_ubatch": 256, "n_batch": 1024}
    settings = settle(machine=probe(), n_ctx_train=None, flags={**flags, **changes.pop("flags", {})})  # type: ignore[dict-item]
    plain = {"name": "m", "path": Path("/m.gguf"), "purpose": "text", "settings": settings, "parallel": 4}
    return Served(**{**plain, **changes})  # type: ignore[arg-type]


def value(argv: tuple[str, ...], option: str) -> str:
    assert argv.count(option) == 1
    return argv[argv.index(option) + 1]


def test_each_client_has_the_context_that_was_planned() -> None:
    argv = server_argv(PROGRAM, served(), Door())
    assert value(argv, "--ctx-size") == "4000"
    assert value(argv, "--parallel") == "4"
    assert "--no-kv-unified" in argv


def test_settings_reach_the_server_under_its_names() -> None:
    argv = server_argv(PROGRAM, served(flags={"type_k": "q8_0", "tensor_split": "3,1", "n_cpu_moe": 2}), Door())
    found = {option: value(argv, option) for option in argv if option in {"--model", "--alias", "--threads"}}
    assert found == {"--model": "/m.gguf", "--alias": "m", "--threads": "3"}
    assert value(argv, "--threads-batch") == "4"
    assert value(argv, "--batch-size") == "1024"
    assert value(argv, "--ubatch-size") == "256"
    assert (value(argv, "--cache-type-k"), value(argv, "--cache-type-v")) == ("q8_0", "f16")
    assert (value(argv, "--tensor-split"), value(argv, "--n-cpu-moe")) == ("3,1", "2")
    assert value(argv, "--fit") == "off"


@pytest.mark.parametrize(("layers", "spelled"), [(-1, "all"), (0, "0"), (17, "17")])
def test_all_layers_are_said_in_words(layers: int, spelled: str) -> None:
    assert value(server_argv(PROGRAM, served(flags={"n_gpu_layers": layers}), Door()), "--gpu-layers") == spelled


def test_server_listens_on_loopback_and_fetches_nothing() -> None:
    for argv in (server_argv(PROGRAM, served(), Door()), router_argv(PROGRAM, Path("/p.ini"), 2, Door())):
        assert (value(argv, "--host"), value(argv, "--port")) == ("127.0.0.1", "0")
        assert {"--offline", "--no-ui", "--no-slots", "--metrics"} <= set(argv)


def test_embedding_model_is_restricted_to_vectors() -> None:
    names = [name for name, _ in model_options(served(purpose="embeddings", pooling="cls"))]
    assert {"embeddings", "pooling"} <= set(names)
    assert not {"embeddings", "pooling"} & {name for name, _ in model_options(served())}


def test_adapters_keep_commas_in_their_paths_and_refuse_colons() -> None:
    options = dict(model_options(served(lora=((Path("/a,b.gguf"), 0.5), (Path("/c.gguf"), 1.0)))))
    assert next(csv.reader([str(options["lora-scaled"])])) == ["/a,b.gguf:0.5", "/c.gguf:1"]
    with pytest.raises(UsageError, match="colon"):
        model_options(served(lora=((Path("/a:b.gguf"), 1.0),)))


def test_prompts_are_kept_but_for_a_model_with_adapters() -> None:
    """llama-server's store of prompts knows no scales."""
    plain = dict(model_options(served(free_bytes=1 << 30)))
    assert (plain["cache-ram"], "no-cache-prompt" in plain) == ("512", False)
    adapted = dict(model_options(served(free_bytes=1 << 30, lora=((Path("/a.gguf"), 1 / 3),))))
    assert (adapted["cache-ram"], "no-cache-prompt" in adapted) == ("0", True)
    assert adapted["lora-scaled"] == "/a.gguf:0.333333333"


def test_prompt_cache_takes_half_of_what_the_plan_leaves() -> None:
    assert [cache_mib(size) for size in (0, 1 << 20, 1 << 30, 1 << 40)] == [0, 0, 512, 8192]


def test_variables_that_change_the_server_and_secrets_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_HOST", "LLAMA_API_KEY", "AIP_MODE", "HF_TOKEN", "FOUNDRY_API_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    changes = child_environment(Path("/none"))
    assert changes == {
        **dict.fromkeys(("LLAMA_ARG_HOST", "LLAMA_API_KEY", "AIP_MODE", "HF_TOKEN", "FOUNDRY_API_KEY")),
        **{name: None for name in os.environ if name.startswith("LLAMA_")},
        "LLAMA_CACHE": "/none",
    }


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)
    assert address.read_keys(None) == frozenset()
    monkeypatch.setenv("FOUNDRY_API_KEY", "from-the-environment")
    assert address.read_keys(None) == {"from-the-environment"}
    path = tmp_path / "keys"
    path.write_text("# ours\n one \n\ntwo\n")
    assert address.read_keys(path) == {"one", "two"}
    for content, said in (("# nothing\n", "holds no API key"), ("a key\n", "key 1"), ("clé\n", "key 1")):
        path.write_text(content)
        with pytest.raises(UsageError, match=said):
            address.read_keys(path)


def test_key_file_that_others_may_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n")
    path.chmod(0o644)
    address.read_keys(path)
    assert "chmod 600" in capsys.readouterr().err
    path.chmod(0o600)
    address.read_keys(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="API key") as refusal:
        address.require_key(host, frozenset())
    assert "--api-key-file" in refusal.value.hint
    address.require_key(host, frozenset({"k"}))
    address.require_key("127.0.0.1", frozenset())


def test_a_door_open_to_every_page_needs_a_key() -> None:
    with pytest.raises(UsageError, match="API key"):
        address.require_key("127.0.0.1", frozenset(), frozenset({"*"}))
    address.require_key("127.0.0.1", frozenset({"k"}), frozenset({"*"}))


def test_taken_port_is_told_with_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is taken") as refusal:
            address.bind("127.0.0.1", port)
        assert str(os.getpid()) in refusal.value.evidence
        free = address.free_port("127.0.0.1", port)
        assert free is not None
        assert f"--port {free}" in refusal.value.hint
    for each in address.bind("127.0.0.1", free):
        assert each.getsockname()[1] == free
        each.close()


def test_a_client_that_comes_before_the_server_listens_is_refused_and_not_kept_waiting() -> None:
    (kept,) = address.bind("127.0.0.1", 0)
    with kept, socket.socket() as client:
        assert client.connect_ex(kept.getsockname()) == errno.ECONNREFUSED


def test_localhost_is_heard_on_one_port_by_all_its_addresses() -> None:
    sockets = address.bind("localhost", 0)
    assert len({each.getsockname()[1] for each in sockets}) == 1
    for each in sockets:
        each.close()


def test_unknown_host_is_told() -> None:
    with pytest.raises(UsageError, match="no address of this machine"):
        address.bind("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="no address of this machine"):
        address.bind("192.0.2.1", 0)  # of documentation (RFC 5737): nobody has it


def test_url_is_one_that_a_client_here_can_use() -> None:
    assert address.url_of("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert address.url_of("::", 1) == address.url_of("::1", 1) == "http://[::1]:1"
    assert address.url_of("localhost", 1) == "http://localhost:1"
