"""Prebuilt wheels: three layouts of indexes on loopback, read and judged; one wheel fetched by its hash, or refused."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.tags import Tag

from tests.loopback_wheels import PAGE, Reply, WheelIndex, make_wheel, older_layout, own_layout, page, serve
from toolchain.base.errors import ArtifactError, FetchError, FoundryError, UsageError
from toolchain.build import wheel_index
from toolchain.build.prebuilt import fetch_wheel
from toolchain.build.wheel_archive import check_wheel
from toolchain.build.wheel_fit import Target, judge
from toolchain.build.wheel_index import find_offers
from toolchain.build.wheel_offer import Offer

CP311 = "cp311-cp311-linux_x86_64"
TAGS = tuple(Tag(*tag.split("-")) for tag in (CP311, "py3-none-linux_x86_64"))
OWN = {
    "cpu": [make_wheel("0.3.4", CP311)],
    "cu121": [make_wheel("0.3.4", CP311, content="# 12.1"), make_wheel("0.3.3", CP311)],
    "cu130": [make_wheel("0.3.4", CP311, content="# 13.0")],
    "metal": [make_wheel("0.3.4", "cp311-cp311-macosx_11_0_arm64")],
}
OLDER = {
    "AVX2/cu117": [make_wheel("0.1.62+cu117", "cp39-cp39-linux_x86_64"), make_wheel("0.1.62+cu117", CP311)],
    "basic/cu117": [make_wheel("0.1.77+cu117", CP311)],
    "AVX/cpu": [make_wheel("0.1.77+cpuavx", CP311)],
}
CPU = {"cpu": OWN["cpu"]}
NAME, BODY = OWN["cpu"][0]


def told(offers: tuple[Offer, ...]) -> set[tuple[object, ...]]:
    return {(str(offer.version), offer.flavour, offer.cuda, offer.cpu) for offer in offers}


@pytest.mark.parametrize("under", ["/whl", "/whl/"])
def test_the_own_layout_is_read_from_its_base_without_a_listing(under: str) -> None:
    with serve(own_layout(OWN)) as index:
        assert told(find_offers(index.url + under)) == {
            ("0.3.4", "cpu", None, None),
            ("0.3.4", "cuda", (12, 1), None),
            ("0.3.3", "cuda", (12, 1), None),
            ("0.3.4", "cuda", (13, 0), None),
            ("0.3.4", "metal", None, None),
        }


@pytest.mark.parametrize("under", ["/whl/cu121", "/whl/cu121/llama-cpp-python", "/whl/cu121/llama-cpp-python/"])
def test_a_folder_or_a_project_page_can_be_named_too(under: str) -> None:
    with serve(own_layout(OWN)) as index:
        found = find_offers(index.url + under)
    assert told(found) == {("0.3.4", "cuda", (12, 1), None), ("0.3.3", "cuda", (12, 1), None)}


def test_a_folder_whose_own_page_is_missing_is_read_from_its_project_page() -> None:
    replies = own_layout(OWN)
    del replies["/whl/cu121/"]
    with serve(replies) as index:
        assert len(find_offers(f"{index.url}/whl/cu121")) == 2


def test_the_older_layout_is_read_from_its_top() -> None:
    with serve(older_layout(OLDER)) as index:
        found = find_offers(index.url)
        assert told(found) == {
            ("0.1.62+cu117", "cuda", (11, 7), "avx2"),
            ("0.1.77+cu117", "cuda", (11, 7), "basic"),
            ("0.1.77+cpuavx", "cpu", None, "avx"),
        }
        assert not [path for path in index.log if "textgen" in path or "ggml" in path]


def test_the_older_layout_without_listings_is_found_by_its_known_names() -> None:
    pages = {path: reply for path, reply in older_layout(OLDER).items() if path.count("/") > 3 or "." in path}
    with serve(pages) as index:
        assert len(find_offers(index.url)) == 4


def test_the_json_form_of_an_index_states_hashes_and_withdrawals() -> None:
    listed = (
        '{"files": [{"filename": "a", "url": "llama_cpp_python-0.3.4-py3-none-any.whl", "hashes": {"sha256": "%s"}},'
        '{"filename": "b", "url": "llama_cpp_python-0.3.5-py3-none-any.whl", "hashes": {}, "yanked": true}]}'
    ) % ("ab" * 32)
    with serve({"/llama-cpp-python/": Reply(listed.encode(), "application/vnd.pypi.simple.v1+json")}) as index:
        kept, withdrawn = find_offers(index.url)
    assert (kept.sha256, kept.yanked, withdrawn.sha256, withdrawn.yanked) == ("ab" * 32, None, None, "")


def test_a_folder_on_this_machine_is_read_flat_and_by_its_subfolders(tmp_path: Path) -> None:
    for folder, (name, body) in {
        "": make_wheel("0.3.36+cu130.sm90.g0c1e570.b1"),
        "cu121": OWN["cu121"][0],
        "AVX2/cu117": OLDER["AVX2/cu117"][0],
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(body)
    (tmp_path / "other-1.0-py3-none-any.whl").touch()
    (deep := tmp_path / "1/2/3/4/5" / NAME).parent.mkdir(parents=True)
    deep.touch()  # too far down to be looked for
    found = find_offers(str(tmp_path))
    assert told(found) == {
        ("0.3.36+cu130.sm90.g0c1e570.b1", "cuda", (13, 0), None),
        ("0.3.4", "cuda", (12, 1), None),
        ("0.1.62+cu117", "cuda", (11, 7), "avx2"),
    }
    assert told(find_offers(f"file://{tmp_path}/cu121")) == {("0.3.4", "cuda", (12, 1), None)}
    assert find_offers(found[0].location)[0].filename == found[0].filename


def test_an_index_without_wheels_tells_the_addresses_it_tried() -> None:
    with serve({"/whl/": page("somewhere/")}) as index, pytest.raises(FetchError) as caught:
        find_offers(f"{index.url}/whl")
    assert f"{index.url}/whl/cu121/llama-cpp-python/: 404 Not Found" in caught.value.evidence
    assert "more addresses" in caught.value.evidence


@pytest.mark.parametrize("index", ["http://wheels.example.org/whl", "ftp://example.org/whl", "no/such/folder"])
def test_what_cannot_be_an_index_is_refused_before_anything_is_sent(index: str) -> None:
    with pytest.raises((FetchError, UsageError)) as caught:
        find_offers(index)
    assert caught.value.hint


def test_a_server_that_fails_or_is_not_there_is_a_fetch_error() -> None:
    with serve({"/whl/": Reply(b"", PAGE, 500)}) as index:
        with pytest.raises(FetchError, match="cannot read the index"):
            find_offers(f"{index.url}/whl")
        assert len(index.log) == 1
    with pytest.raises(FetchError, match="cannot read the index"):
        find_offers(f"{index.url}/whl")


def test_links_upwards_round_in_circles_or_to_other_hosts_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = page("../", "./", "/cpu/", "cpu/cpu/", "http://192.0.2.1/cpu/", "cpu/?page=2")
    replies = {"/cpu/" * 1 + "cpu/" * deep: rounds for deep in range(9)}
    with serve(replies) as index:
        with pytest.raises(FetchError):
            find_offers(f"{index.url}/cpu")
        assert max(path.count("/cpu") for path in index.log) <= 2 * wheel_index.MAX_DEPTH + 1
        monkeypatch.setattr(wheel_index, "MAX_PAGES", 2)
        index.log.clear()
        with pytest.raises(FetchError):
            find_offers(f"{index.url}/cpu")
        assert len(index.log) == 2


def test_a_wheel_for_another_cuda_is_refused_with_its_reason_and_the_right_one_is_fetched() -> None:
    with serve(own_layout(OWN)) as index:
        target = Target(tags=TAGS, driver_cuda=(12, 2), capabilities=((8, 6),))
        best, *others = judge(find_offers(f"{index.url}/whl"), target)
        assert (best.offer.cuda, str(best.offer.version)) == ((12, 1), "0.3.4")
        refused = next(verdict for verdict in others if verdict.offer.cuda == (13, 0))
        assert refused.rejected == "CUDA 13.0 is more than the driver can run (12.2)"
        assert fetch_wheel(best.offer).read_bytes() == OWN["cu121"][0][1]


@pytest.fixture
def one() -> Callable[[WheelIndex], Offer]:
    """The only wheel of an index that holds one."""

    def only(index: WheelIndex) -> Offer:
        (offer,) = find_offers(f"{index.url}/whl/cpu")
        return offer

    return only


def wheels_at_home() -> list[str]:
    return sorted(path.name for path in Path(os.environ["FOUNDRY_HOME"]).rglob("*.whl"))


def sha256_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_fetched_wheel_lies_under_its_hash_and_is_used_again_offline(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU, hashes=True)) as index:
        offer = one(index)
        done: list[tuple[int, int]] = []
        path = fetch_wheel(offer, on_progress=lambda now, total: done.append((now, total)))
    assert path.parts[-4:] == ("sources", "wheels", sha256_of(BODY), NAME)
    assert done[-1] == (len(BODY), len(BODY))
    assert fetch_wheel(offer) == path  # the server is gone


def test_what_is_trusted_on_first_use_is_said_and_also_used_again_offline(
    one: Callable[[WheelIndex], Offer], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        path = fetch_wheel(offer)
        assert sha256_of(BODY) in capsys.readouterr().err
    assert fetch_wheel(offer) == path
    assert not capsys.readouterr().err


def test_a_wheel_that_changed_after_its_first_use_is_refused(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        first = fetch_wheel(offer)
        first.unlink()
        index.blob(NAME).body = changed = make_wheel("0.3.4", CP311, content="import os\n")[1]
        with pytest.raises(FetchError, match="has the wrong hash") as caught:
            fetch_wheel(offer)
        assert sha256_of(BODY) in caught.value.evidence
        assert sha256_of(changed) in caught.value.evidence
        assert wheels_at_home() == []
        assert fetch_wheel(offer, sha256=sha256_of(changed)).read_bytes() == changed
    assert fetch_wheel(offer).read_bytes() == changed  # named once, it is the recorded one


def test_a_wrong_hash_is_refused_whoever_stated_it(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU, hashes=True)) as index:
        offer = one(index)
        asked = len(index.log)
        with pytest.raises(FetchError, match="has the wrong hash"):
            fetch_wheel(offer, sha256="00" * 32)
        assert len(index.log) == asked  # two who know it disagree: nothing is fetched
        index.blob(NAME).body = BODY + b"more"
        with pytest.raises(FetchError, match="has the wrong hash"):
            fetch_wheel(offer)
        assert wheels_at_home() == []


@pytest.mark.parametrize("hashes", [True, False])
def test_a_truncated_download_is_refused_and_the_next_run_succeeds(
    one: Callable[[WheelIndex], Offer], *, hashes: bool
) -> None:
    with serve(own_layout(CPU, hashes=hashes)) as index:
        offer = one(index)
        index.blob(NAME).cut_at = 700
        with pytest.raises(FetchError, match="cannot fetch"):
            fetch_wheel(offer)
        assert wheels_at_home() == []
        index.blob(NAME).cut_at = None
        assert fetch_wheel(offer).read_bytes() == BODY


def test_a_wheel_that_was_truncated_before_it_was_published_is_refused(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        index.blob(NAME).body = BODY[:-300]
        with pytest.raises(ArtifactError, match="not a sound wheel") as caught:
            fetch_wheel(offer)
        assert "damaged or cut" in caught.value.evidence
        assert wheels_at_home() == []
        index.blob(NAME).body = BODY
        assert fetch_wheel(offer).is_file()  # what was refused was not recorded


@pytest.mark.parametrize(
    "reply", [Reply(b"<html>log in first</html>", PAGE), Reply(b"{}", "application/json"), Reply(b"", PAGE, 503)]
)
def test_a_page_in_place_of_a_wheel_is_a_fetch_error(one: Callable[[WheelIndex], Offer], reply: Reply) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        vars(index.blob(NAME)).update(vars(reply))
        with pytest.raises(FetchError, match="cannot fetch") as caught:
            fetch_wheel(offer)
        assert "the server answers" in caught.value.evidence
        assert "signature" not in caught.value.evidence
        assert wheels_at_home() == []


def test_a_redirect_to_an_unencrypted_host_is_refused(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        vars(index.blob(NAME)).update(status=302, location="http://192.0.2.1/wheel.whl")
        with pytest.raises(FetchError, match=r"192\.0\.2\.1 is not encrypted"):
            fetch_wheel(offer)


def test_a_damaged_copy_at_home_is_fetched_again(one: Callable[[WheelIndex], Offer]) -> None:
    with serve(own_layout(CPU)) as index:
        offer = one(index)
        fetch_wheel(offer).write_bytes(BODY[:-1])
        assert fetch_wheel(offer).read_bytes() == BODY


def test_a_local_wheel_is_copied_and_may_change(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    (offer,) = find_offers(str(tmp_path))
    assert fetch_wheel(offer).read_bytes() == BODY
    with pytest.raises(FetchError, match="has the wrong hash"):
        fetch_wheel(offer, sha256="00" * 32)
    (tmp_path / NAME).write_bytes(changed := make_wheel("0.3.4", CP311, content="# rebuilt")[1])
    assert fetch_wheel(offer).read_bytes() == changed
    (tmp_path / NAME).unlink()
    with pytest.raises(FetchError, match="cannot read"):
        fetch_wheel(offer)


INFORMATION = "llama_cpp_python-0.3.4.dist-info"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ({"llama_cpp/__init__.py": b"import os"}, "llama_cpp/__init__.py is not what its RECORD says"),
        ({"llama_cpp/more.py": b""}, "llama_cpp/more.py is not in its RECORD"),
        ({"llama_cpp/lib/libllama.so": None}, "libllama.so is recorded and not in it"),
        ({"/etc/cron.d/x": b""}, "leads outside"),
        ({"llama_cpp/../../x": b""}, "leads outside"),
        ({"llama_cpp\\..\\x": b""}, "leads outside"),
        ({f"{INFORMATION}/RECORD": None}, "RECORD is missing"),
        ({f"{INFORMATION}/RECORD": b"llama_cpp/__init__.py,md5=abc,1"}, "proves nothing"),
        ({f"{INFORMATION}/RECORD": b"\xff"}, "damaged or cut"),
        ({"other-1.0.dist-info/METADATA": b""}, "2 .dist-info folders"),
    ],
)  # fmt: skip
def test_a_wheel_whose_inside_does_not_hold_is_refused(
    tmp_path: Path, spoil: dict[str, bytes | None], why: str
) -> None:
    name, body = make_wheel("0.3.4", CP311, spoil=spoil)
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ArtifactError) as caught:
        check_wheel(tmp_path / name)
    assert why in caught.value.evidence


def test_a_wheel_under_another_version_s_name_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "llama_cpp_python-0.3.5-py3-none-any.whl").write_bytes(BODY)
    with pytest.raises(ArtifactError) as caught:
        check_wheel(path)
    assert "inside it is llama_cpp_python 0.3.4" in caught.value.evidence


def test_a_wheel_with_a_damaged_byte_anywhere_fails_as_ours_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / NAME
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        body = bytearray(BODY)
        body[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
        path.write_bytes(body)
        try:
            check_wheel(path)
        except FoundryError:
            refused += 1
    assert refused > 150  # the rest are dates and attributes of the archive
