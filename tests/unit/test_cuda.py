"""The CUDA solver on described machines: driver, toolkit, compiler, GPU, memory in; decision and explanation out.

What Python, C library and CPU flags decide, for published wheels, is described in test_wheel_fit.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.described import GIB, machine
from toolchain.base.errors import ArtifactError, FoundryError, MissingError, UsageError
from toolchain.base.gpu import Driver, Gpu
from toolchain.base.machine import Compiler
from toolchain.build import cuda_facts
from toolchain.build.cuda import choose_cuda, from_index
from toolchain.build.solve import choose_jobs
from toolchain.build.toolkit import Toolkit

RTX_2080 = Gpu(name="NVIDIA GeForce RTX 2080", capability=(7, 5))
RTX_3060 = Gpu(name="NVIDIA GeForce RTX 3060", capability=(8, 6))
RTX_4090 = Gpu(name="NVIDIA GeForce RTX 4090", capability=(8, 9))
RTX_5090 = Gpu(name="NVIDIA GeForce RTX 5090", capability=(12, 0))
GTX_1080 = Gpu(name="NVIDIA GeForce GTX 1080", capability=(6, 1))
V100 = Gpu(name="Tesla V100", capability=(7, 0))
GT_1030 = Gpu(name="NVIDIA GeForce GT 1030", capability=(6, 1))
GB10 = Gpu(name="NVIDIA GB10", capability=(12, 1))
H200 = Gpu(name="NVIDIA H200", capability=(9, 0))


def driver(branch: str, cuda: str) -> Driver:
    major, minor = cuda.split(".")
    return Driver(version=branch, cuda=(int(major), int(minor)))


def toolkit(release: str, found_by: str = "") -> Toolkit:
    """A toolkit as NVIDIA's tables describe it."""
    major, minor = map(int, release.split("."))
    return Toolkit(
        root=Path(f"/usr/local/cuda-{release}"),
        version=f"{release}.0",
        found_by=found_by or f"/usr/local/cuda-{release}",
        archs=cuda_facts.known_architectures((major, minor)),
        gcc_max=cuda_facts.newest_compiler((major, minor), "gcc"),
        clang_max=cuda_facts.newest_compiler((major, minor), "clang"),
    )


def compilers(*names: str) -> tuple[Compiler, ...]:
    """``gcc-12`` and ``clang-18``, the first being the usual one."""
    made = []
    for name in names:
        family, _, major = name.partition("-")
        word = f"g++ (Debian {major}.2.0-1) {major}.2.0" if family == "gcc" else f"Debian clang version {major}.1.3"
        made.append(Compiler(path=Path(f"/usr/bin/{'g++' if family == 'gcc' else 'clang++'}-{major}"), version=word))
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A described machine, what is asked on it, and what must come of it.

    ``decision`` is "RELEASE HOST ARCHS" or the error's class; ``words`` must all stand in the explanation.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: Driver | None = None
    toolkits: tuple[Toolkit, ...]
    compilers: tuple[Compiler, ...] = compilers("gcc-12")
    asked: tuple[str, ...] = ()
    decision: str | type[FoundryError]
    words: tuple[str, ...]
    not_words: tuple[str, ...] = ()
    free_gib: int = 64
    quota: float | None = None
    jobs: int = 8


CASES = {
    "one GPU, one toolkit": Case(
        gpus=(RTX_3060,), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.4"),),
        decision="12.4 g++-12 86-real", words=("RTX 3060 (sm_86)",),
    ),
    "two unlike GPUs": Case(
        gpus=(RTX_4090, RTX_3060), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.4"),),
        decision="12.4 g++-12 86-real,89-real", words=("RTX 3060", "RTX 4090"),
    ),
    "no GPU builds the portable set": Case(
        toolkits=(toolkit("12.4"),),
        decision="12.4 g++-12 61-virtual,70-virtual,75-real,80-real,86-real,89-real,90", words=("no GPU visible",),
    ),
    "the portable set follows the toolkit": Case(
        toolkits=(toolkit("13.0"),), asked=("portable",),
        decision="13.0 g++-12 75-real,80-real,86-real,89-real,90,120-real", words=("portable set",),
    ),
    "gcc 14 with CUDA 12.4 takes an installed gcc 13": Case(
        gpus=(RTX_4090,), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.4"),),
        compilers=compilers("gcc-14", "gcc-11", "gcc-13"),
        decision="12.4 g++-13 89-real", words=("gcc 14 is newer than CUDA 12.4 takes", "up to 13"),
    ),
    "gcc 14 with CUDA 12.4 and no other says which to install": Case(
        gpus=(RTX_4090,), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.4"),), compilers=compilers("gcc-14"),
        decision=MissingError, words=("gcc up to 13", "apt-get install g++-13", "CUDA 12.8 or newer"),
    ),
    "clang stands in for a gcc that is too new": Case(
        toolkits=(toolkit("12.4"),), compilers=compilers("gcc-14", "clang-17"), asked=("89",),
        decision="12.4 clang++-17 89", words=("gcc 14 is newer",),
    ),
    "sm_120 with CUDA 12.4 says which toolkit it needs": Case(
        gpus=(RTX_5090,), driver=driver("570.86", "12.8"), toolkits=(toolkit("12.4"),),
        decision=MissingError, words=("does not compile for sm_120", "CUDA 12.8 or newer"),
    ),
    "sm_120 takes the toolkit that knows it": Case(
        gpus=(RTX_5090,), driver=driver("570.86", "12.8"), toolkits=(toolkit("12.4"), toolkit("12.8")),
        decision="12.8 g++-12 120-real", words=("CUDA 12.8", "RTX 5090 (sm_120)"),
    ),
    "a driver of CUDA 12 cannot run CUDA 13": Case(
        gpus=(RTX_4090,), driver=driver("550.54", "12.4"), toolkits=(toolkit("13.0"),),
        decision=MissingError, words=("driver 580", "550.54 runs CUDA up to 12.4", "CUDA 12 toolkit"),
    ),
    "an older toolkit is taken where the driver is old": Case(
        gpus=(RTX_4090,), driver=driver("535.54", "12.2"), toolkits=(toolkit("13.0"), toolkit("12.1")),
        decision="12.1 g++-12 89-real", words=("13.0", "driver 580"),
    ),
    "a newer minor release runs by minor version compatibility": Case(
        gpus=(RTX_4090,), driver=driver("525.60", "12.0"), toolkits=(toolkit("12.6"),),
        decision="12.6 g++-12 89-real", words=("RTX 4090",),
    ),
    "but its PTX does not": Case(
        gpus=(RTX_4090,), driver=driver("525.60", "12.0"), toolkits=(toolkit("12.6"),), asked=("80-virtual",),
        decision=ArtifactError, words=("does not take PTX of CUDA 12.6", "add 89 to --cuda-arch"),
    ),
    "a newer driver runs an older toolkit": Case(
        gpus=(RTX_2080,), driver=driver("580.65", "13.0"), toolkits=(toolkit("11.8"),), compilers=compilers("gcc-11"),
        decision="11.8 g++-11 75-real", words=("RTX 2080",),
    ),
    "Pascal was dropped in CUDA 13": Case(
        gpus=(GTX_1080,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),),
        decision=MissingError, words=("sm_61", "CUDA 8.0 to 12.9"),
    ),
    "Pascal takes CUDA 12 beside CUDA 13": Case(
        gpus=(GTX_1080,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"), toolkit("12.9")),
        decision="12.9 g++-12 61-real", words=("does not compile for sm_61",),
    ),
    "a toolkit that the user named is the only one": Case(
        gpus=(RTX_5090,), driver=driver("580.65", "13.0"),
        toolkits=(toolkit("12.4", "CUDA_HOME"), toolkit("13.0")),
        decision=MissingError, words=("CUDA_HOME", "sm_120"),
    ),
    "an architecture that the visible GPU cannot run is refused before the build": Case(
        gpus=(RTX_3060,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),), asked=("90",),
        decision=ArtifactError, words=("RTX 3060", "add 86 to --cuda-arch"),
    ),
    "PTX serves a newer GPU": Case(
        gpus=(H200,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),), asked=("80-virtual",),
        decision="13.0 g++-12 80-virtual", words=("asked for",),
    ),
    "native without a GPU": Case(
        toolkits=(toolkit("13.0"),), asked=("native",), decision=MissingError, words=("no GPU is visible",),
    ),
    "no toolkit: the package index's": Case(
        gpus=(H200,), driver=driver("580.65", "13.0"), toolkits=(),
        decision="index g++-12 90-real", words=("CUDA 13.0.0 (the package index)", "H200"),
    ),
    "no toolkit, and the index's is too new for the driver": Case(
        gpus=(H200,), driver=driver("550.54", "12.4"), toolkits=(), decision=MissingError, words=("driver 580",),
    ),
    "an old GPU beside a new one is left out where no toolkit knows both": Case(
        gpus=(RTX_4090, GT_1030), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),),
        decision="13.0 g++-12 89-real", words=("GT 1030 (sm_61) is left out",),
    ),
    "a toolkit that knows both comes before a newer one": Case(
        gpus=(RTX_4090, GT_1030), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"), toolkit("12.9")),
        decision="12.9 g++-12 61-real,89-real", words=("does not compile for sm_61",),
    ),
    "the architecture of one of two GPUs was asked for": Case(
        gpus=(RTX_4090, GT_1030), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),), asked=("89",),
        decision="13.0 g++-12 89", words=("GT 1030 (sm_61) is left out",),
    ),
    "code for sm_120 runs on no sm_121": Case(
        gpus=(GB10,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),), asked=("120",),
        decision=ArtifactError, words=("GB10 (sm_121)", "add 121"),
    ),
    "a GPU that only PTX serves, and a driver that is older than that PTX": Case(
        gpus=(V100,), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.8"),), asked=("portable",),
        decision=ArtifactError, words=("does not take PTX of CUDA 12.8",),
    ),
    "and an older toolkit whose PTX that driver takes": Case(
        gpus=(V100,), driver=driver("550.54", "12.4"), toolkits=(toolkit("12.8"), toolkit("12.4")), asked=("portable",),
        decision="12.4 g++-12 61-virtual,70-virtual,75-real,80-real,86-real,89-real,90", words=("could not run",),
    ),
    "native among others": Case(
        gpus=(RTX_4090,), driver=driver("580.65", "13.0"), toolkits=(toolkit("13.0"),), asked=("native,90",),
        decision="13.0 g++-12 89-real,90", words=("asked for",),
    ),
    "CUDA 10 is too old for llama.cpp": Case(
        toolkits=(toolkit("10.2"),), asked=("75",), decision=MissingError, words=("need CUDA 11.0 or newer",),
    ),
    "the index is not offered where its toolkit would not do": Case(
        gpus=(GTX_1080,), driver=driver("550.54", "12.4"), toolkits=(toolkit("13.0"),),
        decision=MissingError, words=("sm_61",), not_words=("--cuda-toolkit index",),
    ),
    "memory for three of eight compilers": Case(
        toolkits=(toolkit("13.0"),), asked=("90",), free_gib=7, jobs=3,
        decision="13.0 g++-12 90", words=("7.0 GiB of memory is free",),
    ),
    "a quota of two and a half CPUs": Case(
        toolkits=(toolkit("13.0"),), asked=("90",), quota=2.5, jobs=2,
        decision="13.0 g++-12 90", words=("cgroup quota 2.5",),
    ),
    "too little memory for one still starts one": Case(
        toolkits=(toolkit("13.0"),), asked=("90",), free_gib=1, quota=1.5, jobs=1,
        decision="13.0 g++-12 90", words=(),
    ),
    "a GPU that only the kernel shows decides nothing": Case(
        gpus=(Gpu(name="NVIDIA T4"),), toolkits=(toolkit("13.0"),), asked=("75",),
        decision="13.0 g++-12 75", words=("asked for",),
    ),
}  # fmt: skip


def decided(case: Case) -> tuple[str | type[FoundryError], str]:
    """(the decision as a case writes it, all that is said about it)."""
    here = machine(gpus=case.gpus, driver=case.driver, available_bytes=case.free_gib * GIB, quota=case.quota)
    jobs = choose_jobs(here, None, cuda=True)
    assert jobs.count == case.jobs
    try:
        choice = choose_cuda(toolkits=case.toolkits, compilers=case.compilers, machine=here, asked=case.asked)
    except FoundryError as error:
        return type(error), f"{error} {error.evidence} {error.hint}"
    release = "{}.{}".format(*choice.toolkit.release) if choice.toolkit else "index"
    return f"{release} {choice.host.path.name} {','.join(choice.archs)}", "\n".join((*choice.reasons, jobs.reason))


@pytest.mark.parametrize("name", CASES)
def test_the_decision_on_a_described_machine(name: str) -> None:
    decision, explained = decided(CASES[name])
    assert decision == CASES[name].decision, explained
    for word in CASES[name].words:
        assert word in explained
    for word in CASES[name].not_words:
        assert word not in explained


@pytest.mark.parametrize(
    ("typed", "archs"),
    [
        (("86,89",), ("86", "89")),
        (("8.6 sm_89",), ("86", "89-real")),
        (("compute_90", "90a-real"), ("90-virtual", "90a-real")),
        (("75;75",), ("75",)),
    ],
)
def test_architectures_are_read_as_people_write_them(typed: tuple[str, ...], archs: tuple[str, ...]) -> None:
    choice = choose_cuda(toolkits=[toolkit("13.0")], compilers=compilers("gcc-12"), machine=machine(), asked=typed)
    assert choice.archs == archs


@pytest.mark.parametrize("typed", ["banana", "85", "999", "sm_", "90-fake", "-1"])
def test_what_is_no_architecture_is_a_usage_error(typed: str) -> None:
    with pytest.raises(UsageError, match="not a CUDA architecture"):
        choose_cuda(toolkits=[toolkit("13.0")], compilers=compilers("gcc-12"), machine=machine(), asked=(typed,))


def test_what_must_be_embedded_follows_from_the_architectures() -> None:
    choice = choose_cuda(
        toolkits=[toolkit("13.0")], compilers=compilers("gcc-12"), machine=machine(), asked=("86,89-real,90-virtual",)
    )
    wanted = {(code.kind, code.arch) for code in choice.wanted}
    assert wanted == {("sass", "86"), ("ptx", "86"), ("sass", "89"), ("ptx", "90")}


@pytest.mark.parametrize(
    ("here", "stub", "vmm"),
    [(driver("580.65", "13.0"), True, True), (driver("580.65", "13.0"), False, False), (None, True, False)],
)
def test_the_driver_is_linked_only_where_there_is_one(here: Driver | None, stub: bool, vmm: bool) -> None:
    """A whole toolkit on a machine without a driver: what it links with libcuda could not start there."""
    kit = replace(toolkit("13.0"), driver_stub=stub)
    choice = choose_cuda(toolkits=[kit], compilers=compilers("gcc-12"), machine=machine(driver=here), asked=("90",))
    assert choice.vmm is vmm


def test_there_is_no_cuda_on_a_mac() -> None:
    with pytest.raises(MissingError, match="no CUDA for Darwin") as caught:
        choose_cuda(toolkits=[], compilers=compilers("clang-17"), machine=machine(system="Darwin"))
    assert "Metal" in caught.value.hint


def test_the_index_toolkit_refuses_compilers_that_it_does_not_take() -> None:
    with pytest.raises(MissingError) as caught:
        from_index(compilers=compilers("gcc-16"), machine=machine(), asked=("90",))
    assert "apt-get install g++-15" in caught.value.hint
