"""Described machines and described wheels: which fit, why the others do not, and which is the best."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms

from toolchain.build.wheel_fit import Target, judge, rejections
from toolchain.build.wheel_offer import Offer, parse_offer

AVX = frozenset({"avx"})
AVX2 = AVX | {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw"}


def tags_of(version: tuple[int, int], platforms: Sequence[str], abi: str = "") -> tuple[Tag, ...]:
    """The tags of a CPython, as ``packaging.tags.sys_tags()`` lists them on such a machine."""
    name = f"cp{version[0]}{version[1]}"
    return (
        *cpython_tags(version, abis=[abi or name], platforms=platforms),
        *compatible_tags(version, name, platforms),
    )


def glibc(newest: int, arch: str = "x86_64") -> list[str]:
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    names: list[str] = []
    for minor in range(newest, 4, -1):
        names += [f"manylinux_2_{minor}_{arch}", *([f"{legacy[minor]}_{arch}"] if minor in legacy else [])]
    return [*names, f"linux_{arch}"]


def linux(python: tuple[int, int] = (3, 11), newest: int = 36) -> tuple[Tag, ...]:
    return tags_of(python, glibc(newest))


PLAIN = Target(tags=linux(), cpu_flags=AVX2)
DRIVER_122 = Target(tags=linux(), cpu_flags=AVX2, driver_cuda=(12, 2), capabilities=((8, 6),))
DRIVER_130 = Target(tags=linux(), cpu_flags=AVX512, driver_cuda=(13, 0), capabilities=((9, 0),))
OLD_GPU = Target(tags=linux(), cpu_flags=AVX2, driver_cuda=(13, 0), capabilities=((6, 1),))
TWO_GPUS = Target(tags=linux(), cpu_flags=AVX2, driver_cuda=(13, 0), capabilities=((9, 0), (7, 5)))
HIDDEN_GPU = Target(tags=linux(), cpu_flags=AVX2, driver_cuda=(12, 2))
OLD_GLIBC = Target(tags=linux(newest=31), cpu_flags=AVX2)
MUSL = Target(tags=tags_of((3, 11), ["musllinux_1_2_x86_64", "musllinux_1_1_x86_64", "linux_x86_64"]), cpu_flags=AVX2)
ARM = Target(tags=tags_of((3, 11), glibc(36, "aarch64")))
MAC = Target(tags=tags_of((3, 11), [*mac_platforms((13, 0), "arm64")]))
WINDOWS = Target(tags=tags_of((3, 11), ["win_amd64"]), cpu_flags=AVX2)
FREE_THREADED = Target(tags=tags_of((3, 13), glibc(36), "cp313t"), cpu_flags=AVX2)
AVX_ONLY = Target(tags=linux(), cpu_flags=AVX)
OLDEST_CPU = Target(tags=linux())


def wheel(name: str, folder: str = "") -> Offer:
    url = f"https://example.org/releases/{name.replace('+', '%2B')}"
    offer = parse_offer(url, listed_in=folder.split("/"))
    assert offer is not None
    return offer


def file(tag: str, version: str = "0.3.4") -> str:
    return f"llama_cpp_python-{version}-{tag}.whl"


CP311 = file("cp311-cp311-linux_x86_64")
OURS = "llama_cpp_python-0.3.36+cu130.{}.g0c1e570.b9978cff6a396-py3-none-linux_x86_64.whl"


@pytest.mark.parametrize(
    ("target", "name", "folder"),
    [
        (PLAIN, CP311, "cpu"),
        (PLAIN, file("py3-none-any"), ""),
        (PLAIN, file("py3-none-linux_x86_64"), "cpu"),
        (PLAIN, file("cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"), "cpu"),
        (OLD_GLIBC, file("py3-none-manylinux_2_35_x86_64.manylinux_2_31_x86_64"), "cpu"),
        (MUSL, file("py3-none-musllinux_1_2_x86_64"), "cpu"),
        (MUSL, file("py3-none-linux_x86_64"), "cpu"),
        (ARM, file("py3-none-manylinux2014_aarch64"), "cpu"),
        (MAC, file("cp311-cp311-macosx_11_0_arm64"), "metal"),
        (MAC, file("py3-none-macosx_11_0_universal2"), "cpu"),
        (WINDOWS, file("py3-none-win_amd64"), "AVX2/cpu"),
        (DRIVER_122, CP311, "cu121"),
        (DRIVER_122, CP311, "cu124"),  # minor version compatibility
        (DRIVER_122, CP311, "cu118"),  # an older major release
        (DRIVER_130, CP311, "cu117"),
        (DRIVER_130, OURS.format("sm75.sm86.sm90"), ""),
        (DRIVER_130, OURS.format("sm90a"), ""),
        (DRIVER_130, OURS.format("sm75.ptx80.rpc"), ""),
        (TWO_GPUS, OURS.format("sm75.sm90"), ""),
        (OLD_GPU, CP311, "cu124"),
        (AVX_ONLY, CP311, "AVX/cpu"),
        (OLDEST_CPU, CP311, "basic/cpu"),
        (DRIVER_130, CP311, "AVX512/cu117"),
    ],
)  # fmt: skip
def test_a_wheel_that_can_run_here_is_taken(target: Target, name: str, folder: str) -> None:
    (verdict,) = judge([wheel(name, folder)], target)
    assert verdict.rejected is None
    assert verdict.rank == 1


@pytest.mark.parametrize(
    ("target", "name", "folder", "why"),
    [
        (PLAIN, file("cp39-cp39-linux_x86_64"), "cpu", "made for CPython 3.9; this is CPython 3.11"),
        (PLAIN, file("cp312-abi3-linux_x86_64"), "cpu", "made for CPython 3.12 or newer; this is CPython 3.11"),
        (PLAIN, file("pp39-pypy39_pp73-linux_x86_64"), "cpu", "made for PyPy 3.9; this is CPython 3.11"),
        (FREE_THREADED, file("cp313-cp313-linux_x86_64"), "cpu",
         "built for the ABI cp313; this Python has cp313t"),
        (OLD_GLIBC, file("py3-none-manylinux_2_35_x86_64"), "cpu", "needs glibc 2.35; here 2.31"),
        (OLD_GLIBC, file("py3-none-manylinux_2_38_x86_64.manylinux_2_35_x86_64"), "cpu",
         "needs glibc 2.35; here 2.31"),
        (PLAIN, file("py3-none-musllinux_1_2_x86_64"), "cpu",
         "made for systems with musl; this one has glibc"),
        (MUSL, file("py3-none-manylinux_2_17_x86_64"), "cpu",
         "made for systems with glibc; this one has musl"),
        (MUSL, file("py3-none-musllinux_1_3_x86_64"), "cpu", "needs musl 1.3; here 1.2"),
        (PLAIN, file("py3-none-win_amd64"), "cpu", "made for Windows; this is Linux"),
        (WINDOWS, CP311, "cpu", "made for Linux; this is Windows"),
        (PLAIN, file("py3-none-macosx_11_0_arm64"), "metal", "made for macOS; this is Linux"),
        (PLAIN, file("py3-none-manylinux2014_aarch64"), "cpu", "made for aarch64 processors; this is x86_64"),
        (ARM, CP311, "cpu", "made for x86_64 processors; this is aarch64"),
        (MAC, file("py3-none-macosx_10_9_x86_64"), "cpu", "made for x86_64 processors; this is arm64"),
        (MAC, file("py3-none-macosx_14_0_arm64"), "metal", "needs macOS 14.0; here 13.0"),
        (PLAIN, CP311, "cu124", "made for CUDA 12.4; no NVIDIA GPU is visible here"),
        (HIDDEN_GPU, CP311, "cu121", "made for CUDA 12.1; no NVIDIA GPU is visible here"),
        (PLAIN, file("py3-none-linux_x86_64", "0.3.4+cuda.g0c1e570"), "",
         "made for CUDA; no NVIDIA GPU is visible here"),
        (DRIVER_122, CP311, "cu130", "CUDA 13.0 is more than the driver can run (12.2)"),
        (DRIVER_122, OURS.format("sm86"), "", "CUDA 13.0 is more than the driver can run (12.2)"),
        (Target(tags=linux(), driver_cuda=(10, 1), capabilities=((7, 5),)), CP311, "cu102",
         "CUDA 10.2 is more than the driver can run (10.1)"),
        (Target(tags=linux(), driver_cuda=(13, 0), capabilities=((8, 6),)), OURS.format("sm90"), "",
         "holds code for sm90 only; a GPU here has compute capability 8.6"),
        (DRIVER_130, OURS.format("sm75.sm86"), "",
         "holds code for sm75, sm86 only; a GPU here has compute capability 9.0"),
        (Target(tags=linux(), driver_cuda=(13, 0), capabilities=((12, 1),)), OURS.format("sm120a"), "",
         "holds code for sm120a only; a GPU here has compute capability 12.1"),
        (TWO_GPUS, OURS.format("sm90"), "", "holds code for sm90 only; a GPU here has compute capability 7.5"),
        (DRIVER_130, OURS.format("sm75.ptx100"), "",
         "holds code for sm75, ptx100 only; a GPU here has compute capability 9.0"),
        (DRIVER_130, OURS.replace("cu130", "cu132").format("ptx75"), "",
         "holds code for ptx75 only; a GPU here has compute capability 9.0"),
        (OLD_GPU, CP311, "cu130", "CUDA 13.0 makes no code for compute capabilities below 7.5; a GPU here has 6.1"),
        (AVX_ONLY, CP311, "AVX2/cpu", "built with AVX2; this CPU does not have AVX2, F16C, FMA"),
        (PLAIN, CP311, "AVX512/cpu", "built with AVX512; this CPU does not have AVX512BW, AVX512F"),
        (OLDEST_CPU, CP311.replace("0.3.4", "0.1.77+cpuavx"), "", "built with AVX; this CPU does not have AVX"),
        (DRIVER_130, CP311, "rocm72", "made for AMD GPUs (ROCm), which was not asked for"),
        (PLAIN, CP311, "vulkan", "made for vulkan, which was not asked for"),
    ],
)  # fmt: skip
def test_a_wheel_that_cannot_run_here_is_refused_with_the_part_that_does_not_fit(
    target: Target, name: str, folder: str, why: str
) -> None:
    (verdict,) = judge([wheel(name, folder)], target)
    assert verdict.rejected == why
    assert verdict.rank is None


def order(target: Target, *offers: Offer) -> list[tuple[str, Offer]]:
    return [(str(verdict.offer.version), verdict.offer) for verdict in judge(offers, target) if not verdict.rejected]


def test_the_order_is_accelerator_version_cuda_and_cpu_features() -> None:
    newer_cpu = wheel(file("cp311-cp311-linux_x86_64", "0.3.5"), "cpu")
    best = [
        wheel(CP311, "AVX2/cu122"),
        wheel(CP311, "cu121"),
        wheel(CP311, "cu124"),  # beyond the driver, by minor version compatibility
        wheel(file("cp311-cp311-linux_x86_64", "0.3.3"), "AVX2/cu122"),
        wheel(file("cp311-cp311-linux_x86_64", "0.3.3"), "basic/cu122"),
        newer_cpu,
        wheel(CP311, "AVX2/cpu"),
        wheel(CP311, "basic/cpu"),
    ]
    assert [offer for _, offer in order(DRIVER_122, *reversed(best))] == best
    assert order(PLAIN, *best)[0][1] == newer_cpu


def test_versions_are_compared_without_their_local_part_and_as_numbers() -> None:
    names = [file("py3-none-linux_x86_64", version) for version in ("0.3.10+cpu", "0.3.9+cpubasic", "0.3.9")]
    assert [version for version, _ in order(PLAIN, *map(wheel, reversed(names)))] == ["0.3.10+cpu", "0.3.9+cpubasic",
                                                                                      "0.3.9"]  # fmt: skip


def test_a_version_that_was_asked_for_excludes_the_others_whatever_their_local_part() -> None:
    target = Target(tags=linux(), cpu_flags=AVX2, version=SpecifierSet("==0.1.62"))
    kept, other = judge([wheel(CP311, "cpu"), wheel(file("cp311-cp311-linux_x86_64", "0.1.62+cpu"))], target)
    assert str(kept.offer.version) == "0.1.62+cpu"
    assert other.rejected == "version 0.3.4; asked for ==0.1.62"


def test_what_was_asked_for_is_the_only_flavour_taken() -> None:
    offers = [wheel(CP311, folder) for folder in ("cpu", "cu121", "vulkan", "elsewhere")]
    taken = {}
    for want in ("cpu", "cuda", "vulkan"):
        target = Target(tags=linux(), driver_cuda=(12, 2), capabilities=((8, 6),), want=want)  # type: ignore[arg-type]
        taken[want] = [verdict.offer.flavour for verdict in judge(offers, target) if not verdict.rejected]
    assert taken == {"cpu": ["cpu", "unstated"], "cuda": ["cuda"], "vulkan": ["vulkan"]}


def test_cuda_that_was_asked_for_is_taken_without_a_gpu_and_says_so() -> None:
    (verdict,) = judge([wheel(CP311, "cu130")], Target(tags=linux(), want="cuda"))
    assert verdict.rejected is None
    assert "no NVIDIA GPU is visible" in verdict.note


@pytest.mark.parametrize(
    ("target", "name", "folder", "note"),
    [
        (PLAIN, CP311, "cpu", "its platform tag does not say which C library it needs"),
        (PLAIN, file("py3-none-manylinux2014_x86_64"), "cpu", ""),
        (PLAIN, file("py3-none-manylinux2014_x86_64", "0.3.36+cpu.g0c1e570.b9978cff6a396"), "",
         "a build of this project for, perhaps, only the CPU that it was made on"),
        (PLAIN, file("py3-none-manylinux2014_x86_64", "0.3.36+cpu.portable.g0c1e570.b9978cff6a396"), "", ""),
        (PLAIN, file("py3-none-any"), "", "neither its name nor its folder says what it is built for"),
        (DRIVER_122, file("py3-none-manylinux2014_x86_64"), "cu124",
         "CUDA 12.4 runs on a driver of 12.2 by minor version compatibility, without PTX"),
        (DRIVER_122, file("py3-none-manylinux2014_x86_64"), "cuda", "it does not say for which CUDA it is made"),
    ],
)  # fmt: skip
def test_what_is_uncertain_about_a_wheel_that_fits_is_noted(target: Target, name: str, folder: str, note: str) -> None:
    assert judge([wheel(name, folder)], target)[0].note == note


def test_the_reasons_are_counted_and_the_nearest_misses_come_first() -> None:
    offers = [wheel(file(f"cp{minor}-cp{minor}-linux_x86_64", f"0.3.{number}"), "cpu")
              for minor in (39, 310) for number in range(3)]  # fmt: skip
    verdicts = judge([*offers, wheel(CP311, "cu124"), wheel(file("py3-none-win_amd64"))], PLAIN)
    assert rejections(verdicts) == (
        ("made for CUDA 12.4; no NVIDIA GPU is visible here", 1),
        ("made for CPython 3.9; this is CPython 3.11", 3),
        ("made for CPython 3.10; this is CPython 3.11", 3),
        ("made for Windows; this is Linux", 1),
    )


@pytest.mark.parametrize(
    ("location", "folders", "flavour", "cuda", "cpu"),
    [
        ("https://h/releases/download/v0.3.4-cu124/" + CP311, "whl/cu125/llama-cpp-python", "cuda", (12, 4), None),
        ("https://h/releases/download/v0.3.4/" + CP311, "whl/cpu/llama-cpp-python", "cpu", None, None),
        ("https://h/releases/download/v0.3.4-hip-radeon/" + CP311, "", "rocm", None, None),
        ("https://h/releases/download/wheels/" + file("py3-none-any", "0.1.62%2Bcu117"), "AVX2/cu117",
         "cuda", (11, 7), "avx2"),
        ("https://h/releases/download/cpu/" + file("py3-none-any", "0.1.70+cpuavx512"), "AVX2/cpu",
         "cpu", None, "avx512"),
        ("/w/cu121/" + file("py3-none-any", "0.3.4+cpu"), "cu121", "cpu", None, None),
        ("/w/cu121/" + file("py3-none-any", "0.3.4+cuda.g1"), "cu121", "cuda", (12, 1), None),
        ("/w/" + file("py3-none-any", "0.3.16+cuda13.0.sm86.ampere"), "", "cuda", (13, 0), None),
        ("/w/" + CP311, "cu130", "cuda", (13, 0), None),
        ("/w/" + CP311, "cu12", "cuda", (12, 0), None),
        ("/w/" + CP311, "AVX/rocm5.4.2", "rocm", None, "avx"),
        ("/w/" + file("py3-none-any", "0.3.36+hip.g0c1e570.b1"), "", "rocm", None, None),
        ("/w/" + CP311, "", "unstated", None, None),
    ],
)  # fmt: skip
def test_name_release_and_folders_tell_what_a_wheel_is_for_in_this_order(
    location: str, folders: str, flavour: str, cuda: tuple[int, int] | None, cpu: str | None
) -> None:
    offer = parse_offer(location, listed_in=folders.split("/"))
    assert offer is not None
    assert (offer.flavour, offer.cuda, offer.cpu) == (flavour, cuda, cpu)


@pytest.mark.parametrize(
    "name",
    ["llama_cpp_python_cuda-0.1.62+cu117-cp39-cp39-linux_x86_64.whl", "torch-2.0-py3-none-any.whl",
     "llama_cpp_python-0.3.4.tar.gz", "llama_cpp_python-x-py3-none-any.whl", "llama_cpp_python-0.3.4.whl", ""],
)  # fmt: skip
def test_what_is_no_wheel_of_llama_cpp_python_is_no_offer(name: str) -> None:
    assert parse_offer(f"https://example.org/cu121/{name}") is None
