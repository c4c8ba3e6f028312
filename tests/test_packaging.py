# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a newcomer installs: the metadata, the wheel, and the cost of the import."""

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import rxt_hf

ROOT = Path(__file__).parent.parent
NOT_AT_IMPORT = ("flash_attn", "peft", "datasets", "kernels")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def cpu_seconds(statement: str) -> float:
    """CPU time of a fresh process, which other load on the machine changes less than the clock."""
    return float(run_python(f"{statement}\nimport time; print(time.process_time())").stdout)


@pytest.fixture(scope="module")
def wheel_contents(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "rxt_hf", folder / "rxt_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    build = [sys.executable, "-c", "import setuptools.build_meta as backend; backend.build_wheel('dist')"]
    subprocess.run(build, cwd=folder, capture_output=True, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_whole_package_and_nothing_else(wheel_contents):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rxt_hf").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert "rxt_hf/py.typed" in expected
    assert {name for name in wheel_contents if ".dist-info/" not in name} == expected


def test_wheel_carries_the_licence_with_the_note_on_the_patent(wheel_contents):
    assert any(name.endswith("licenses/LICENSE") for name in wheel_contents)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "P.453260" in text


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    made = shutil.ignore_patterns("__pycache__", ".git", "venv", "cache", "*.egg-info", ".*_cache", "dist", "build")
    shutil.copytree(ROOT, folder / "source", ignore=made)
    build = [sys.executable, "-c", "import setuptools.build_meta as backend; backend.build_sdist('..')"]
    subprocess.run(build, cwd=folder / "source", capture_output=True, check=True)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def test_sdist_holds_whatever_readme_and_tests_name(unpacked_sdist):
    folders = ("rxt_hf", "tests", "examples", "benchmarks", "model_cards", "docs")
    files = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    expected = {path for path in files if "__pycache__" not in path.parts} | {Path(".ci", "run"), Path("LICENSE")}
    assert {path for path in expected if not (unpacked_sdist / path).is_file()} == set()


@pytest.mark.slow
def test_tests_of_an_unpacked_sdist_are_collected_and_run(unpacked_sdist):
    environment = {**os.environ, "PYTHONPATH": str(unpacked_sdist)}
    for words in (["--collect-only", "-m", ""], ["tests/test_configuration_rxt.py"]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, cwd=unpacked_sdist, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


def test_version_of_the_metadata_is_that_of_the_package():
    assert version("rxt-hf") == rxt_hf.__version__


def test_console_script_names_the_command_line():
    (script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "rxt")
    assert callable(script.load())


def test_import_pulls_no_optional_package_and_writes_nothing():
    code = f"import sys, rxt_hf; print([name for name in {NOT_AT_IMPORT} if name in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_import_costs_less_than_1_3_times_the_import_of_a_model_of_transformers():
    statements = ("import rxt_hf", "from transformers import LlamaForCausalLM")
    ours, theirs = zip(*([cpu_seconds(statement) for statement in statements] for _ in range(3)), strict=True)
    assert statistics.median(ours) < 1.3 * statistics.median(theirs)


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert all(getattr(rxt_hf, name) is not None for name in rxt_hf.__all__)
    assert set(rxt_hf.PLACES) < set(rxt_hf.__all__) == set(dir(rxt_hf))


@pytest.mark.parametrize(
    "name", ["RxTSession", "convert.from_llm", "convert.from_rxlm", "hub.export", "presets.PRESETS", "DEMO"]
)
def test_names_that_the_readme_uses_need_no_import_but_that_of_the_package(name):
    code = f"import rxt_hf; assert rxt_hf.{name}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
