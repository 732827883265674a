"""What `inv build`, `inv use` and `inv clean` do and report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from toolchain.base import console, files
from toolchain.base.errors import MissingError, UsageError
from toolchain.base.machine import probe
from toolchain.build import bindings, doctor, toolchain
from toolchain.build.compile import Built, build
from toolchain.build.configure import BuildRequest, configure
from toolchain.build.install_prebuilt import Installed, PrebuiltRequest, choose_wheels, install_prebuilt
from toolchain.build.options import is_true, parse_define
from toolchain.build.solve import disk_bytes
from toolchain.build.toolchain import KINDS, Toolchain
from toolchain.build.variants import BLAS, OLD_NAMES


def request(
    *,
    source: str | None = None,
    defines: Iterable[str] = (),
    variants: Iterable[str] = (),
    cuda_arch: str | None = None,
    cuda_toolkit: str | None = None,
    legacy: bool = False,
    jobs: str | int | None = None,
    update: bool = False,
) -> BuildRequest:
    """The request from what was typed; UsageError for what makes no sense.

    Asking for an architecture or a toolkit asks for CUDA, and so does the option of any year that switches it on.
    """
    try:
        count = None if jobs is None else int(jobs)
    except ValueError as error:
        raise UsageError(f"--jobs {jobs} is not a number") from error
    names, kept, archs = dict.fromkeys(variants), [], [cuda_arch] if cuda_arch else []
    for define in defines:
        name, value = parse_define(define)
        if OLD_NAMES.get(name.upper(), name) == "GGML_CUDA" and is_true(value):
            names["cuda"] = None
        elif name == "CMAKE_CUDA_ARCHITECTURES":
            archs.append(value)
        else:
            kept.append(define)
    if archs or cuda_toolkit:
        names["cuda"] = None
    return BuildRequest(
        source=source,
        defines=tuple(kept),
        variants=tuple(names),
        cuda_arch=tuple(archs),
        cuda_toolkit=cuda_toolkit,
        legacy=legacy,
        jobs=count,
        update=update,
    )


def chosen_variants(*, blas: str | None, **flags: bool) -> tuple[str, ...]:
    """Names of the variants whose flags were typed; UsageError for a BLAS that is none of those there are."""
    if blas and blas.lower() not in (*BLAS, "cublas"):
        near = difflib.get_close_matches(blas.lower(), (*BLAS, "cublas"), n=1)
        raise UsageError(
            f"--blas {blas}: there are {' and '.join(BLAS)}", hint=f"did you mean {near[0]}?" if near else ""
        )
    return (*(name for name, on in flags.items() if on), *((blas,) if blas else ()))


def build_and_use(asked: BuildRequest, *, use: bool, as_json: bool = False, quiet: bool = False) -> Toolchain:
    """Build (or find), make current, install the bindings where they are not, report."""
    with files.home_in_use():
        built = build(asked)
        if use and built.toolchain.needs_driver and probe().driver is None:
            console.warn("it is not put in use: nothing of it starts without an NVIDIA driver, and none is here")
        elif use:
            activate(built.toolchain)
    if as_json:
        console.answer_json(_built_json(built))
    elif built.reused and not quiet:
        console.answer(f"{built.toolchain.id} is there already ({built.seconds:.2f} s)")
    elif not quiet:
        console.answer(f"{built.toolchain.id} is built: {built.toolchain.root}")
    return built.toolchain


def prebuilt(asked: PrebuiltRequest, *, otherwise: BuildRequest | None, as_json: bool) -> None:
    """``inv build --prebuilt``: install a wheel that fits; with ``otherwise``, build that when none does."""
    with files.home_in_use():
        try:
            installed = install_prebuilt(asked)
        except MissingError as error:
            if otherwise is None:
                raise
            console.warn(f"{error.message}; building instead")
            installed = None
    if installed is None and otherwise is not None:
        build_and_use(otherwise, use=True, as_json=as_json)
    elif installed and as_json:
        console.answer_json(_prebuilt_json(installed))
    elif installed:
        console.answer(f"llama_cpp {installed.proof.version} is installed from {installed.wheel.name}")


def show_prebuilt(asked: PrebuiltRequest, *, as_json: bool) -> None:
    """``inv build --prebuilt --dry-run``: which wheels fit and why the others do not; nothing is fetched."""
    fitting, reasons = choose_wheels(asked, probe())
    if as_json:
        wheels = [{"wheel": one.offer.shown, "note": one.note} for one in fitting]
        console.answer_json({"fitting": wheels, "rejected": reasons})
        return
    for one in fitting:
        console.answer(f"fits      {one.offer.shown}{f' ({one.note})' if one.note else ''}")
    for line in reasons:
        console.answer(f"rejected  {line}")


def activate(chosen: Toolchain) -> None:
    """Make ``chosen`` current and its wheel the one that ``import llama_cpp`` finds in this environment.

    MissingError for one that needs NVIDIA's driver where there is none.
    """
    if chosen.needs_driver and probe().driver is None:
        raise MissingError(
            f"{chosen.id} cannot be used here",
            evidence="its programs are linked with NVIDIA's driver (libcuda.so.1), and there is none",
            hint="use it on a machine with the driver, or another toolchain (`./inv doctor` names the current one)",
        )
    if chosen.kind == "llama":
        bindings.ensure_installed(chosen.wheel, version=chosen.wheel_version, commit=chosen.short_commit)
    toolchain.make_current(chosen)


def use(prefix: str) -> None:
    """``inv use ID``."""
    chosen = toolchain.find(prefix)
    activate(chosen)
    console.answer(f"{chosen.id} is current: {chosen.source}, backends {', '.join(chosen.backends)}")


def show_configuration(asked: BuildRequest, *, as_json: bool) -> None:
    """``inv build --dry-run``: the source is fetched (its options are needed), nothing is compiled."""
    configuration = configure(asked)
    there = toolchain.load(configuration.id) is not None
    if as_json:
        console.answer_json(
            {
                "toolchain_id": configuration.id,
                "reused": there,
                "commit": configuration.tree.commit,
                "variants": [variant.name for variant in configuration.variants],
                "cuda": list(configuration.cuda.reasons) if configuration.cuda else None,
                "options": list(configuration.options.argv()),
                "disk_bytes": disk_bytes(configuration.cuda),
                "jobs": configuration.jobs.count,
                "reason": configuration.jobs.reason,
            }
        )
        return
    console.answer(f"toolchain {configuration.id}{' (there already)' if there else ''}")
    console.answer(f"source    {configuration.tree.pin}, llama.cpp {configuration.tree.commit}")
    console.answer(f"compilers {configuration.c.version}; {configuration.cxx.version}")
    for reason in configuration.cuda.reasons if configuration.cuda else ():
        console.answer(f"cuda      {reason}")
    console.answer(f"disk      {console.format_bytes(disk_bytes(configuration.cuda))} free are needed")
    console.answer(f"jobs      {configuration.jobs.count} ({configuration.jobs.reason})")
    for option in configuration.options.argv():
        console.answer(f"          {option}")


def examine(*, as_json: bool) -> int:
    """``inv doctor``: the findings with the mend for each; the exit code of the first that is bad, else 0."""
    with console.step("look at machine, toolchain and bindings"):
        findings = doctor.examine()
    if as_json:
        console.answer_json(doctor.as_json(findings))
    else:
        for finding in findings:
            console.answer_finding(finding.state, finding.subject, finding.finding, finding.mend)
    return next((finding.exit_code for finding in findings if finding.state == "bad"), 0)


def clean(*, unused: bool, used: bool, everything: bool) -> None:
    """Delete work and logs; also toolchains that are not in use, those in use, or all that can be made again."""
    home = files.foundry_home()
    names = ("work", "logs") if not everything else ("work", "logs", "sources", "hub", "tune", "toolchains")
    with files.home_alone() as alone:
        if not alone:
            raise UsageError(f"{home} is in use", hint="wait until the other command has ended, then clean")
        before = files.tree_bytes(home)
        for name in names:
            files.remove(home / name, within=home)
        in_use = {found.id for kind in KINDS if (found := toolchain.current(kind))}
        for folder in (home / "toolchains").glob("*"):
            if not folder.is_symlink() and (used if folder.name in in_use else unused):
                files.remove(folder, within=home)
        freed = before - files.tree_bytes(home)
    console.answer(f"{console.format_bytes(freed)} freed in {home}")


def ensure_current() -> Toolchain:
    """The Toolchain in use, its bindings installed; before the first build, the default one is built."""
    if found := toolchain.current():
        if bindings.prebuilt_version() is None:  # recipes need the tools alone
            activate(found)
        return found
    console.say("no toolchain yet: building the default one")
    return build_and_use(request(), use=True, quiet=True)


def _built_json(built: Built) -> dict[str, object]:
    made = built.toolchain
    return {
        "toolchain_id": made.id,
        "reused": built.reused,
        "commit": made.commit,
        "backends": list(made.backends),
        "architectures": list(made.architectures),
        "executed": made.executed,
        "reason": made.reason,
        "wheel": str(made.wheel) if made.wheel_name else None,
        "seconds": round(built.seconds, 3),
    }


def _prebuilt_json(installed: Installed) -> dict[str, object]:
    return {
        "toolchain_id": None,
        "reused": False,
        "commit": installed.proof.commit,
        "backends": list(installed.proof.backends),
        "architectures": list(installed.architectures),
        "executed": installed.executed,
        "reason": installed.reason,
        "wheel": str(installed.wheel),
        "abi": installed.abi,
        "rejected": list(installed.rejected),
        "seconds": round(installed.seconds, 3),
    }
