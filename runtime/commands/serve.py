"""``serve``: one model or several behind the OpenAI API."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from runtime.commands.options import flags_of, model_options, request_of
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.serve.run import Options

DEFAULT_PORT: Final = 8080
DEFAULT_QUEUE: Final = 32
DEFAULT_DRAIN_S: Final = 30.0

_PASSED_ON: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "LLAMA_CPP_LIB_PATH", "HF_HOME", "HF_HUB_CACHE")
# Beside FOUNDRY_*, of our environment into a unit's: nothing secret.


def add(verbs: Any) -> None:
    """Declare the verb."""
    serve = verbs.add_parser(
        "serve",
        parents=[model_options(several=True)],
        help="serve models to clients of the OpenAI API",
        description=run.__doc__,
        epilog="A folder of recipes as MODEL stands for those that have a result. docs/serving.md tells it all.",
    )
    door = serve.add_argument_group("the door")
    door.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="any but loopback demands an API key")
    door.add_argument("--port", type=_port, default=DEFAULT_PORT, metavar="N", help="default 8080; 0 takes a free one")
    door.add_argument("--api-key-file", metavar="FILE", help="keys, one a line (or one in FOUNDRY_API_KEY)")
    door.add_argument(
        "--allowed-host",
        type=_authority,
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="another Host that is ours",
    )
    door.add_argument(
        "--allowed-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="URL",
        help="a web page's origin that may ask",
    )
    door.add_argument("--ui", action="store_true", help="llama-server's web page, where the build has it")
    door.add_argument("--allow-admin", action="store_true", help="also what changes the server or shows others' work")
    load = serve.add_argument_group("load")
    load.add_argument("--parallel", type=_count, metavar="N", help="clients answered at once, each with --n-ctx tokens")
    load.add_argument("--max-queue", type=_count0, default=DEFAULT_QUEUE, metavar="N", help="that may wait (32)")
    load.add_argument("--models-max", type=_count, metavar="N", help="of several models, loaded at once (what fits)")
    load.add_argument("--drain-s", type=_seconds, default=DEFAULT_DRAIN_S, metavar="S", help="for replies to end (30)")
    more = serve.add_argument_group("what the models do")
    more.add_argument("--mmproj", metavar="FILE", help="a vision or audio part to load beside the model")
    more.add_argument("--pooling", choices=("mean", "cls", "last"), help="of an embedding model (default: its own)")
    show = serve.add_argument_group("instead of serving")
    show.add_argument("--print-command", action="store_true", help="print the llama-server command that would run")
    show.add_argument("--systemd", action="store_true", help="print a hardened systemd unit that serves like this")
    serve.add_argument("--json", action="store_true", help="one JSON object on stdout once it is ready")
    serve.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; running replies end first."""
    from runtime.serve import address
    from runtime.serve.run import as_json, prepare_service
    from runtime.serve.run import run as serve
    from toolchain.base import console
    from toolchain.base.command import shown

    if arguments.systemd and arguments.print_command:
        raise UsageError("--systemd and --print-command both print something", hint="give one of them")
    if arguments.systemd:
        return _print_unit(arguments)
    options = options_of(arguments)
    if not arguments.print_command:
        return serve(options)
    address.require_key(options.host, address.read_keys(options.api_key_file), options.allowed_origins)
    service = prepare_service(options)
    if arguments.json:
        shown_models = [as_json(model) for model in service.models]
        console.answer_json({"argv": list(service.argv), "models": shown_models, "models_max": service.at_once})
    else:
        console.answer(shown(service.argv))
    return 0


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line asks for; UsageError for what makes no sense with several models."""
    from runtime.serve.presets import expand
    from runtime.serve.run import Options
    from toolchain.base import files

    typed = expand(arguments.model)
    if len(typed) > 1 and (given := [name for name in ("lora", "mmproj", "pooling") if getattr(arguments, name)]):
        raise UsageError(f"--{given[0]} belongs to one model, and {len(typed)} are named", hint="serve that one alone")
    common = replace(request_of(arguments), mmproj=arguments.mmproj)
    requests = [replace(common, model=each) for each in typed]
    return Options(
        requests=requests,
        host=arguments.host,
        port=arguments.port,
        api_key_file=files.expand(arguments.api_key_file) if arguments.api_key_file else None,
        allowed_hosts=frozenset(arguments.allowed_host),
        allowed_origins=frozenset(arguments.allowed_origin),
        parallel=arguments.parallel,
        max_queue=arguments.max_queue,
        drain_s=arguments.drain_s,
        ui=arguments.ui,
        models_max=arguments.models_max,
        allow_admin=arguments.allow_admin,
        pooling=arguments.pooling,
        json=arguments.json,
        verbose=arguments.verbose,
    )


def _print_unit(arguments: argparse.Namespace) -> int:
    import getpass

    from runtime.memory.kernels import installed_build
    from runtime.resolve import locate
    from runtime.serve import address
    from runtime.serve.presets import expand
    from runtime.serve.systemd import Unit, unit_text
    from toolchain.base import console, files, machine

    key_file = files.expand(arguments.api_key_file).absolute() if arguments.api_key_file else None
    if key_file is None and os.environ.get(address.KEY_VARIABLE):
        raise UsageError(
            f"the key in {address.KEY_VARIABLE} does not go into a unit, which all may read",
            hint="write it to a file: --api-key-file FILE",
        )
    address.require_key(arguments.host, address.read_keys(key_file), frozenset(arguments.allowed_origin))
    for each in expand(arguments.model):
        locate(each)
    chosen = {name: value for name, value in os.environ.items() if name.startswith("FOUNDRY_") or name in _PASSED_ON}
    chosen.pop(address.KEY_VARIABLE, None)
    home = files.foundry_home().absolute()
    unit = Unit(
        argv=_argv_again(arguments),
        folder=files.PROJECT_ROOT,
        user=getpass.getuser(),
        writable=(home,),
        drain_s=arguments.drain_s,
        port=arguments.port,
        names=tuple(arguments.model),
        environment={**chosen, "FOUNDRY_HOME": str(home)},
        key_file=key_file,
        gpu=bool(machine.probe().gpus) and installed_build().gpu_backend is not None,
    )
    console.answer(unit_text(unit).rstrip("\n"))
    console.say("install it: as root, write this to /etc/systemd/system/foundry-serve.service, then")
    console.say("`systemctl daemon-reload && systemctl enable --now foundry-serve`")
    return 0


def _argv_again(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The command that serves like this from anywhere: files by their whole path, no key, nothing that prints."""
    from runtime.engine.adapters import parse_adapter

    argv = [sys.executable, "-m", "runtime", "serve", *map(_anywhere, arguments.model)]
    values = {
        **flags_of(arguments),
        **{
            name: getattr(arguments, name)
            for name in ("host", "port", "parallel", "max_queue", "models_max", "pooling")
        },
        "drain_s": f"{arguments.drain_s:g}",
        "mmproj": arguments.mmproj and _anywhere(arguments.mmproj),
    }
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    for option, each in (("--allowed-host", arguments.allowed_host), ("--allowed-origin", arguments.allowed_origin)):
        for value in each:
            argv += [option, value]
    for path, scale in map(parse_adapter, arguments.lora):
        argv += ["--lora", f"{path.absolute()}={scale:.9g}"]
    argv += [
        f"--{name.replace('_', '-')}"
        for name in ("ui", "allow_admin", "no_tune", "force", "verbose")
        if getattr(arguments, name)
    ]
    return tuple(argv)


def _anywhere(typed: str) -> str:
    """What names a file or folder here, as it is named from anywhere; a recipe's or a repository's name as it is."""
    from toolchain.base import files

    path, colon, kind = typed.rpartition(":")
    for name, rest in ((typed, ""), (path, colon + kind)):
        here: Path = files.expand(name)
        if name and here.exists():
            return f"{here.absolute()}{rest}"
    return typed


def _authority(text: str) -> str:
    from runtime.serve.guard import host_and_port

    if host_and_port(text, 0) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME or NAME:PORT")
    return text


def _origin(text: str) -> str:
    from runtime.serve.guard import host_and_port

    scheme, _, authority = text.partition("://")
    if text != "*" and not (scheme and host_and_port(authority, 0)):
        raise argparse.ArgumentTypeError(f"{text!r} is no SCHEME://NAME[:PORT], without a path, nor *")
    return text


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _count(text: str) -> int:
    return _whole(text, 1, 1 << 16)


def _count0(text: str) -> int:
    return _whole(text, 0, 1 << 16)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{value} does not lie between {least} and {most}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds between 0 and 86400")
    return value
