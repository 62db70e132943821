"""The `.venv`: which torch, what a stamp promises, what is left of a kill, and what pip's failures mean."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from installer import environment, packages
from installer.environment import Wanted
from installer.packages import PYTORCH_INDEX, Pip, TorchSource, torch_sources
from installer.report import Report, StopError, explain

ROOT = Path(__file__).resolve().parents[2]
WANTED = Wanted(build="cpu", torch_index="", tests=False, digest="abc")


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "log" / "install.log", steps=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a fresh `.venv` and one constraint; making it takes some seconds, so tests share it."""
    root = tmp_path_factory.mktemp("a folder with spaces")
    (root / "installer").mkdir()
    (root / "installer" / "constraints.txt").write_text("platformdirs==4.14.7\n")
    environment.make_venv(root / ".venv", Report(root / "install.log", steps=1), os.open(root / "lock", os.O_CREAT))
    return root


@pytest.fixture
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "1")


# ------------------------------------------------------------------------------------------------- which torch


def offers(*pairs: tuple[str, str]):
    return lambda index: [version for where, version in pairs if where == index]


def test_a_processor_takes_the_small_build_where_pip_already_finds_it():
    found = torch_sources("cpu", "2.13.0", offers(("", "2.13.0+cpu")), "linux", "x86_64")
    assert found == [TorchSource("torch==2.13.0+cpu")]


def test_else_from_pytorchs_own_index():
    cpu = PYTORCH_INDEX + "cpu"
    found = torch_sources("cpu", "2.13.0", offers(("", "2.13.0"), (cpu, "2.13.0+cpu")), "linux", "x86_64")
    assert found == [TorchSource("torch==2.13.0+cpu", cpu)]


def test_else_the_large_build_and_that_is_known_before():
    found = torch_sources("cpu", "2.13.0", offers(("", "2.13.0")), "linux", "x86_64")
    assert found == [TorchSource("torch==2.13.0", large=True)]


def test_a_card_on_linux_takes_the_registrys_build_and_not_a_local_cpu_build():
    first, second = torch_sources("cuda", "2.13.0", offers(), "linux", "x86_64")
    assert first == TorchSource("torch===2.13.0")
    assert second == TorchSource("torch==2.13.0")


def test_a_card_on_windows_takes_pytorchs_cuda_13_index():
    first, *_ = torch_sources("cuda", "2.13.0", offers(), "win32", "AMD64")
    assert first == TorchSource("torch==2.13.0+cu130", PYTORCH_INDEX + "cu130")


def test_the_registrys_build_for_windows_is_the_small_one():
    assert torch_sources("cpu", "2.13.0", offers(), "win32", "AMD64") == [TorchSource("torch==2.13.0")]


def index_with_torch(folder: Path, *versions: str) -> str:
    """A package index in a folder, with a torch of each of these versions that holds nothing; returns its URL."""
    place = folder / "simple" / "torch"
    place.mkdir(parents=True)
    for version in versions:
        info = f"torch-{version}.dist-info"
        with zipfile.ZipFile(place / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    (place / "index.html").write_text(
        "".join(f'<a href="{file.name}">{file.name}</a>' for file in place.glob("*.whl"))
    )
    return place.parent.as_uri()


def installed_torch(root: Path) -> list[str]:
    return [info.name[6:-10] for info in (root / ".venv").glob("[lL]ib/**/site-packages/torch-*.dist-info")]


def test_each_choice_replaces_the_build_that_is_there(root, report, no_settings, tmp_path, monkeypatch):
    ordinary = index_with_torch(tmp_path / "a", "2.13.0", "2.13.0+cpu")
    monkeypatch.setenv("PIP_INDEX_URL", ordinary)
    pip = Pip(root, report, 0)
    assert set(pip.offered_torch()) == {"2.13.0", "2.13.0+cpu"}

    def choose(build: str) -> list[str]:
        packages.install_torch(pip, torch_sources(build, "2.13.0", pip.offered_torch, "linux", "x86_64"), report)
        return installed_torch(root)

    assert choose("cpu") == ["2.13.0+cpu"]
    assert choose("cuda") == ["2.13.0"]
    assert choose("cpu") == ["2.13.0+cpu"]
    other = index_with_torch(tmp_path / "b", "2.13.0+mine")
    packages.install_torch(pip, [TorchSource("torch==2.13.0", other, again=True)], report)
    assert installed_torch(root) == ["2.13.0+mine"]


def test_versions_are_read_from_what_pip_prints():
    said = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0+cpu, 2.13.0\n  INSTALLED: 2.13.0+cpu\n"
    assert packages.parse_versions(said) == ["2.15.0", "2.13.0+cpu", "2.13.0"]
    assert packages.parse_versions("ERROR: No matching distribution found for torch") == []


def test_the_constraints_pin_every_package_that_is_installed_here():
    text = (ROOT / "installer" / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("==" in line and "+" not in line for line in lines)
    assert packages.pinned_torch(text) in text
    pinned = {line.split("==")[0].lower().replace("-", "_").replace(".", "_") for line in lines}
    for named in ("torch", "numpy", "safetensors", "pyside6_essentials", "transformers", "diffusers", "tokenizers"):
        assert named in pinned


# --------------------------------------------------------------------------------------------------- the stamp


def test_a_stamp_is_read_back(tmp_path):
    environment.write_stamp(tmp_path, WANTED)
    assert environment.read_stamp(tmp_path) == WANTED
    assert [path.name for path in tmp_path.iterdir()] == [environment.STAMP]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"build": "cpu"}'])
def test_no_stamp_or_a_damaged_one_means_not_complete(tmp_path, content):
    if content is not None:
        (tmp_path / environment.STAMP).write_text(content)
    assert environment.read_stamp(tmp_path) is None


@pytest.mark.parametrize(
    ("have", "enough"),
    [
        (None, False),
        (WANTED, True),
        (replace(WANTED, tests=True), True),
        (replace(WANTED, build="cuda"), False),
        (replace(WANTED, torch_index="https://example.org"), False),
        (replace(WANTED, digest="other"), False),
    ],
    ids=["nothing", "same", "more", "other build", "other index", "other versions"],
)
def test_an_environment_is_kept_when_it_has_what_is_wanted(have, enough):
    assert environment.satisfies(have, WANTED) is enough


def test_an_environment_without_the_tests_packages_does_not_do_for_tests():
    assert not environment.satisfies(WANTED, replace(WANTED, tests=True))


def test_the_digest_follows_versions_and_place(tmp_path):
    def tree(name: str, constraints: str) -> str:
        root = tmp_path / name
        (root / "installer").mkdir(parents=True)
        (root / "pyproject.toml").write_text("[project]")
        (root / "installer" / "constraints.txt").write_text(constraints)
        return environment.digest(root)

    first = tree("a", "torch==2.13.0")
    assert first == environment.digest(tmp_path / "a")
    assert first != tree("b", "torch==2.13.0")  # moved: an editable install names its folder
    (tmp_path / "a" / "installer" / "constraints.txt").write_text("torch==2.13.1")
    assert first != environment.digest(tmp_path / "a")


# -------------------------------------------------------------------------------------------- killed half-way


def test_a_fresh_environment_works(root):
    assert environment.works(root / ".venv")


@pytest.mark.parametrize("leave", [(), ("bin",), ("bin", "pyvenv.cfg")], ids=["empty", "no cfg", "no pip"])
@pytest.mark.skipif(os.name == "nt", reason="the folder is laid out for Linux")
def test_a_half_made_environment_does_not_work(tmp_path, root, leave):
    venv = tmp_path / ".venv"
    venv.mkdir()
    if "bin" in leave:
        (venv / "bin").mkdir()
        (venv / "bin" / "python").symlink_to(sys.executable)
    if "pyvenv.cfg" in leave:
        (venv / "pyvenv.cfg").write_text((root / ".venv" / "pyvenv.cfg").read_text())
    assert not environment.works(venv)


def test_packages_cut_short_are_forgotten_and_whole_ones_kept(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, files in {
        "whole-1.dist-info": ["METADATA", "RECORD"],
        "cut-1.dist-info": ["METADATA"],
        "~orch": [],
    }.items():
        (site / name).mkdir(parents=True)
        for file in files:
            (site / name / file).touch()
    assert sorted(environment.heal(tmp_path)) == ["cut-1.dist-info", "~orch"]
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_making_again_heals_what_works(root, report):
    site = next((root / ".venv").glob("[lL]ib*/**/site-packages"))
    (site / "cut-1.dist-info").mkdir()
    environment.make_venv(root / ".venv", report, 0)
    assert not (site / "cut-1.dist-info").exists()
    assert "cut-1" in report.log_text()


def test_a_second_installer_waits_for_the_first(tmp_path, report):
    lock = tmp_path / "install.lock"
    code = (
        "import sys, time; from pathlib import Path; from installer.environment import only_one\n"
        "from installer.report import Report\n"
        f"with only_one(Path({str(lock)!r}), Report(Path({str(tmp_path / 'other.log')!r}), 1)):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = [sys.executable, "-c", code.replace("other", "second").replace("time.sleep(60)", "pass")]
        with subprocess.Popen(second, cwd=ROOT, stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            while "waiting for it to end" not in (waiting.stdout.readline()):
                assert waiting.poll() is None
            time.sleep(0.1)
            assert waiting.poll() is None
            first.kill()
            assert "held" in waiting.communicate(timeout=30)[0]


# --------------------------------------------------------------------------------------------- pip's failures


def test_without_a_network_it_says_so(root, report, no_settings, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    with pytest.raises(StopError) as stop:
        Pip(root, report, 0).install("platformdirs")
    assert "cannot be reached" in stop.value.what
    assert "network" in stop.value.todo
    assert str(report.log) in stop.value.todo


def test_a_package_that_nobody_has_is_named(root, report, no_settings, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StopError, match="No package server has platformdirs"):
        Pip(root, report, 0).install("platformdirs")
    assert Pip(root, report, 0).offered_torch() == []


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "The disk is full",
        ),
        ("OSError: [Errno 13] Permission denied: '/x/.venv/lib'", "may not be written"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "certificate is not trusted"),
        ("NameResolutionError: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
        ("ReadTimeoutError: Read timed out.", "cannot be reached"),
        ("ERROR: something new", "could not be installed"),
    ],
)
def test_each_failure_is_one_sentence_and_one_step(said, what):
    stop = explain(said, "The packages could not be installed.", Path("install.log"))
    assert what in stop.what
    assert "install.log" in stop.todo


def test_where_to_install_is_not_for_the_settings_to_say(root, report, no_settings, monkeypatch):
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_TARGET", str(root / "elsewhere"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    Pip(root, report, 0).install("pip")  # there already: nothing to do, if it looks into the .venv
    assert "Requirement already satisfied: pip in ./.venv" in report.log_text()
    assert not (root / "elsewhere").exists()
