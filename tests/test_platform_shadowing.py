"""The folder `platform/` must never hide the standard library's module of that name.

It is a source root, not a package: a Python file directly in it, or an __init__.py, would take the place
of `platform` in every process that has the checkout on its path, Ray's own among them.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = sysconfig.get_path("stdlib")
SHOW = "import platform, rayva; print(platform.__file__, platform.system(), rayva.__file__)"


def test_no_python_file_lies_directly_in_platform() -> None:
    found = [
        path.name for path in (ROOT / "platform").iterdir() if path.suffix in {".py", ".pyc", ".so", ".pyi"}
    ]
    assert found == []


def test_no_module_of_the_package_has_a_stdlib_name_at_the_top() -> None:
    names = {path.stem for path in (ROOT / "platform").glob("*")}
    assert names.isdisjoint(sys.stdlib_module_names)


@pytest.mark.parametrize("folders", [["platform", "."], [".", "platform"]])
def test_import_platform_is_the_stdlibs_whatever_the_path(folders: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    module, _, package = done.stdout.split()
    assert Path(module).parent == Path(STDLIB)
    assert Path(package) == ROOT / "platform" / "rayva" / "__init__.py"


def test_a_script_of_pipelines_imports_the_checkouts_package(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'pipelines')!r}); import _bootstrap; {SHOW}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    module, _, package = done.stdout.split()
    assert Path(module).parent == Path(STDLIB)
    assert Path(package).is_relative_to(ROOT / "platform")
