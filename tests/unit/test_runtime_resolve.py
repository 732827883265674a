from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime import hub_model
from runtime.hub_model import HubName
from runtime.resolve import Resolved, locate, resolve
from tests.legacy_ggml_files import write_legacy
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.hub.ggufs import Quant, RepoListing, record_listing
from toolchain.hub.place import Place
from toolchain.hub.repository import RemoteFile


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one quantized recipe (demo) and one that is not (later)."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.yaml").write_text("name: demo\nmodel: {demo: tiny}\n")
    (tmp_path / "recipes/later.yaml").write_text("name: later\nmodel: {demo: tiny}\n")
    results = tmp_path / "models/demo"
    results.mkdir(parents=True)
    artifacts = []
    for type_ in ("Q4_K_M", "Q8_0"):
        (results / f"demo-{type_}.gguf").write_bytes(b"GGUF")
        artifacts.append({"type": type_, "file": f"demo-{type_}.gguf", "bytes": 4, "sha256": "0" * 64})
    manifest = {"recipe": "demo", "artifacts": artifacts, "runtime": {"n_ctx": 128}}
    (results / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_path_is_taken_as_it_is(project: Path) -> None:
    path = project / "models/demo/demo-Q8_0.gguf"
    assert resolve(str(path), root=project, models=project / "models").path == path


@pytest.mark.parametrize("typed", ["recipes/demo.yaml", "demo"])
def test_recipe_means_its_first_artifact_and_its_runtime_block(project: Path, typed: str) -> None:
    found = resolve(typed, root=project, models=project / "models")
    assert found.path == project / "models/demo/demo-Q4_K_M.gguf"
    assert (found.recipe, found.type, found.runtime) == ("demo", "Q4_K_M", {"n_ctx": 128})


@pytest.mark.parametrize("typed", ["recipes/demo.yaml:Q8_0", "demo:Q8_0", "demo:q8_0"])
def test_type_is_chosen_behind_a_colon(project: Path, typed: str) -> None:
    assert resolve(typed, root=project, models=project / "models").path.name == "demo-Q8_0.gguf"


def test_unknown_type_lists_those_there_are(project: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("demo:Q4_K_S", root=project, models=project / "models")
    assert "Q4_K_M, Q8_0" in caught.value.evidence
    assert "did you mean Q4_K_M?" in caught.value.hint


@pytest.mark.parametrize("typed", ["recipes/later.yaml", "later", "later:Q8_0"])
def test_recipe_without_a_result_names_the_command(project: Path, typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(typed, root=project, models=project / "models")
    assert "`./inv quantize recipes/later.yaml`" in caught.value.hint


def test_unknown_recipe_suggests_the_near_one(project: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("recipes/dem.yaml", root=project, models=project / "models")
    assert "did you mean recipes/demo.yaml?" in caught.value.hint


def test_recipe_that_is_no_yaml_is_a_usage_error(project: Path) -> None:
    (project / "recipes/broken.yaml").write_text("name: [")
    with pytest.raises(UsageError, match="cannot be read as a recipe"):
        resolve(str(project / "recipes/broken.yaml"), root=project, models=project / "models")


def test_recipe_whose_name_leaves_the_folder_is_refused(project: Path) -> None:
    (project / "recipes/evil.yaml").write_text("name: ../../etc\n")
    with pytest.raises(UsageError, match="no usable name"):
        resolve(str(project / "recipes/evil.yaml"), root=project, models=project / "models")


def test_missing_file_suggests_its_neighbour(project: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(str(project / "models/demo/demo-Q8_O.gguf"), root=project, models=project / "models")
    assert "did you mean demo-Q8_0.gguf?" in caught.value.hint


def test_directory_lists_what_it_holds(project: Path) -> None:
    with pytest.raises(UsageError, match="is a directory") as caught:
        resolve(str(project / "models/demo"), root=project, models=project / "models")
    assert "demo-Q4_K_M.gguf" in caught.value.hint


def test_directory_of_a_model_that_sees_names_the_model_and_not_its_vision_part(tmp_path: Path) -> None:
    for name in ("mmproj-model.gguf", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is a directory") as caught:
        locate(str(tmp_path), root=tmp_path, models=tmp_path / "models")
    assert caught.value.hint.endswith(f"{tmp_path / 'model.gguf'}")


@pytest.mark.parametrize("typed", ["", " "])
def test_empty_name_is_told_as_such(project: Path, typed: str) -> None:
    with pytest.raises(UsageError, match="no model named"):
        locate(typed, root=project, models=project / "models")


def test_link_to_nothing_says_where_it_points(project: Path) -> None:
    link = project / "link.gguf"
    link.symlink_to(project / "gone.gguf")
    with pytest.raises(UsageError, match=r"link\.gguf points to .*gone\.gguf, which is not there"):
        locate(str(link), root=project, models=project / "models")


def test_missing_file_where_nothing_lies_beside_it_lists_the_recipes_alone(project: Path) -> None:
    with pytest.raises(UsageError, match="no file") as caught:
        locate(str(project / "x.gguf"), root=project, models=project / "models")
    assert caught.value.evidence.splitlines() == [f"no .gguf file in {project}", "recipes with a result: demo"]


def test_address_of_a_repository_is_answered_with_its_name(project: Path) -> None:
    with pytest.raises(UsageError) as caught:
        locate("https://huggingface.co/acme/many-GGUF/tree/main", root=project, models=project / "models")
    assert caught.value.hint == "a repository is named without its host: acme/many-GGUF"


def test_directory_lists_what_lies_a_folder_deeper_and_files_of_2023(project: Path) -> None:
    write_legacy(project / "models/old.bin")
    with pytest.raises(UsageError, match="is a directory") as caught:
        resolve(str(project / "models"), root=project, models=project / "models")
    assert caught.value.evidence.splitlines() == ["demo/demo-Q4_K_M.gguf", "demo/demo-Q8_0.gguf", "old.bin"]


def test_folder_of_original_weights_is_answered_with_a_recipe(project: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (project / name).write_text("{}")
    with pytest.raises(UsageError, match="original weights") as caught:
        resolve(str(project), root=project, models=project / "models")
    assert f"model: {{path: {project}}}" in caught.value.evidence
    assert "./inv quantize" in caught.value.hint


def test_files_are_alike_by_their_names_and_not_by_their_ending(project: Path) -> None:
    (project / "bert.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError) as caught:
        resolve(str(project / "nowhere.gguf"), root=project, models=project / "models")
    assert "did you mean" not in caught.value.hint


@pytest.mark.parametrize(
    ("typed", "repo", "quant"),
    [
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b", None),
        ("bartowski/Llama-3.2-1B-Instruct-GGUF:Q5_K_M", "bartowski/Llama-3.2-1B-Instruct-GGUF", "Q5_K_M"),
        ("acme/many:Model-Q8_0.gguf", "acme/many", "Model-Q8_0.gguf"),
    ],
)
def test_owner_and_name_mean_a_hub_repository(project: Path, typed: str, repo: str, quant: str | None) -> None:
    assert locate(typed, root=project, models=project / "models") == HubName(repo=repo, quant=quant)


def test_a_path_wins_over_a_hub_repository(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/model").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert locate("acme/model", root=project, models=project / "models") == Resolved(path=Path("acme/model"))
    with pytest.raises(UsageError, match="no file acme/modle"):
        locate("acme/modle", root=project, models=project / "models")


@pytest.mark.parametrize("typed", ["folder/model.gguf", "../owner/repo", "a/b/c", "/owner/repo"])
def test_what_can_only_be_a_path_is_no_repository(project: Path, typed: str) -> None:
    with pytest.raises(UsageError, match="no file"):
        locate(typed, root=project, models=project / "models")


def test_result_of_another_size_than_promised_is_refused(project: Path) -> None:
    (project / "models/demo/demo-Q4_K_M.gguf").write_bytes(b"GG")
    with pytest.raises(ArtifactError) as caught:
        resolve("demo", root=project, models=project / "models")
    assert "2 bytes, the manifest says 4" in caught.value.evidence


def test_result_that_was_deleted_is_named(project: Path) -> None:
    (project / "models/demo/demo-Q4_K_M.gguf").unlink()
    with pytest.raises(UsageError, match="is gone"):
        resolve("demo", root=project, models=project / "models")


def test_manifest_cannot_point_outside_its_folder(project: Path) -> None:
    manifest = {"recipe": "demo", "artifacts": [{"type": "Q4_K_M", "file": "../../recipes/demo.yaml"}]}
    (project / "models/demo/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="is gone"):
        resolve("demo", root=project, models=project / "models")


def listing(commit: str) -> RepoListing:
    file = RemoteFile(name="m-Q8_0.gguf", bytes=4, sha256="ab" * 32)
    quants = (Quant(name="Q8_0", files=(file,)),)
    return RepoListing(repo="acme/m", revision="main", commit=commit * 40, quants=quants, mmproj=())


@pytest.mark.parametrize(("begun", "commit"), [(False, "b"), (True, "a")])
def test_new_download_is_of_what_the_hub_has_now_and_a_cut_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: bool, commit: str
) -> None:
    """Recorded is commit a, and the hub is at b."""
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path))
    record_listing(listing("a"), tmp_path)
    if begun:
        partial = Place.of("acme/m", "a" * 40, tmp_path).partial(listing("a").quants[0].files[0])
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"GG")
    monkeypatch.setattr(hub_model, "list_quants", lambda _repo: listing("b"))
    monkeypatch.setattr(hub_model, "fetch_gguf", lambda found, *_: Path(found.commit))
    assert hub_model.fetch_model(HubName(repo="acme/m", quant=None), tmp_path).listing.commit == commit * 40
    assert f"at {commit * 12}" in capsys.readouterr().err
