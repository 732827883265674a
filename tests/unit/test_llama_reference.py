"""docs/llama.md tells every public name, and the class costs nothing where it is not used."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from runtime.llama.reference import MARK, PAGE, check_reference, reference, write_reference
from tests.front_door import ROOT, run
from toolchain.base.errors import UsageError


def test_page_is_what_the_docstrings_say() -> None:
    check_reference(ROOT / "docs")


def test_every_public_name_stands_in_the_reference() -> None:
    from runtime import LLaMa

    text = reference()
    names = [name for name in dir(LLaMa) if not name.startswith("_")]
    assert len(names) > 30
    for name in names:
        assert f"#### `llm.{name}`\n" in text, name
    for name in inspect.signature(LLaMa).parameters:
        assert f"`{name}`" in text, name


def test_page_that_is_out_of_date_is_refused_and_written_anew_below_its_start(tmp_path: Path) -> None:
    page = tmp_path / PAGE
    page.write_text(f"My start.\n\n{MARK}\nold")
    with pytest.raises(UsageError, match="out of date") as caught:
        check_reference(tmp_path)
    assert "inv reference" in caught.value.hint
    write_reference(tmp_path)
    check_reference(tmp_path)
    assert page.read_text().startswith("My start.\n\n" + MARK)
    page.write_text("all gone")
    with pytest.raises(UsageError, match="lost the line"):
        write_reference(tmp_path)


def test_help_of_the_command_line_does_not_import_the_class() -> None:
    program = (
        "import sys, runtime, runtime.__main__ as m\n"
        "try:\n    m.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not [n for n in sys.modules if n.startswith(('runtime.llama', 'runtime.model', 'numpy', 'llama_cpp'))\n"
        "            and n != 'runtime.model_file']\n"
        "from runtime import LLaMa\nassert 'numpy' not in sys.modules and 'llama_cpp' not in sys.modules\n"
    )
    done = run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import runtime

    with pytest.raises(AttributeError, match="no attribute 'Llama'"):
        runtime.Llama  # noqa: B018
