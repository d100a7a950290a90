"""The doctor: healthy here, and for every trap it finds the right fix."""

import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from runs import doctor
from runs.doctor import Check, known_conflicts, print_doctor, run_probe


def test_this_machine_is_healthy():
    checks = doctor.doctor()
    others = {"python", "neighbours", "extras", "backends", "images", "offline"}
    assert {*doctor.PROBES, *others} == {check.name for check in checks}
    assert [check for check in checks if check.required and not check.ok] == []
    details = {check.name: check.detail for check in checks}
    assert "10 frames" in details["video"]
    assert all(backend in details["backends"] for backend in doctor.RENDER_BACKENDS)
    assert re.search(r"\b1\d\d games found", details["atari"])
    assert "weights_only=True" in details["checkpoint"]
    assert f"of {os.cpu_count()}" in details["processor"]


def shadow(folder: Path, module: str, code: str) -> dict[str, str]:
    """Environment variables under which `module` is replaced by `code`, as a broken installation would."""
    path = folder.joinpath(*module.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".py").write_text(code)
    for package in list(path.parents)[: module.count(".")]:
        (package / "__init__.py").touch()
    return {"PYTHONPATH": str(folder)}


BREAKS = {
    "dm_control": (
        "dm_control.suite",
        "def load(*_, **__): raise AttributeError(\"'MjModel' object has no attribute 'flex_vertedge'\")",
        "AttributeError: 'MjModel' object has no attribute 'flex_vertedge'",
        "pip install 'mujoco==3.17.0' 'dm-control==1.0.50'",
    ),
    "mujoco": ("imageio", "import imageio_core", "No module named 'imageio_core'", "imageio>=2.30"),
    "atari": ("ale_py", "", "cannot import name 'AtariVectorEnv'", "ale-py>=0.12.1"),
    "rendering": ("mujoco", "raise ImportError('libEGL.so.1: cannot open')", "libEGL.so.1", "apt-get install libegl1"),
    "video": ("av", "raise ImportError('libav broken')", "ImportError: libav broken", "av>=16"),
    "torchvision": (
        "torchvision",
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "RuntimeError: operator torchvision::nms does not exist",
        "install both from one index",
    ),
    "tensorboard": ("tensorboard", "", "ModuleNotFoundError", "tensorboard>=2.20"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_package_fails_its_probe_with_the_fix(name: str, tmp_path: Path):
    module, code, error, fix = BREAKS[name]
    check = run_probe(name, shadow(tmp_path, module, code))
    assert not check.ok
    assert error in check.detail
    assert fix in check.fix
    assert "\n" not in check.detail + check.fix


def test_wrong_results_fail_too(tmp_path: Path):
    """A library that runs but computes something else: both overlapping boxes kept."""
    code = "import torch\n__version__ = '0'\nclass ops:\n    nms = staticmethod(lambda *_: torch.tensor([0, 1, 2]))"
    check = run_probe("torchvision", shadow(tmp_path, "torchvision", code))
    assert not check.ok
    assert "kept the boxes [0, 1, 2]" in check.detail


def test_a_crash_and_a_hang_cost_one_line_each(tmp_path: Path):
    crash = shadow(tmp_path / "crash", "av", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert run_probe("video", crash).detail == "the process was killed by SIGSEGV"
    hang = shadow(tmp_path / "hang", "av", "import time; time.sleep(60)")
    check = run_probe("video", hang, seconds=3)
    assert (check.ok, check.detail) == (False, "no answer within 3 seconds")
    leave = shadow(tmp_path / "leave", "av", "import os; os._exit(0)")
    assert not run_probe("video", leave).ok  # an exit code of 0 alone proves nothing


def test_the_users_choice_of_renderer_is_tried():
    check = run_probe("dm_control", {"MUJOCO_GL": "nonsense"})
    assert not check.ok
    assert check.fix == "unset MUJOCO_GL, or set it to egl"


def test_the_renderer_that_works_is_named():
    assert doctor._render_backends({"egl": True, "osmesa": False}).ok
    other = doctor._render_backends({"egl": False, "osmesa": True})
    assert (other.ok, other.fix) == (False, "set MUJOCO_GL=osmesa")
    none = doctor._render_backends({"egl": False, "osmesa": False})
    assert "apt-get install libegl1" in none.fix
    assert none.detail == "egl does not work, osmesa does not work"


def test_data_that_is_here_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "FASHION_MNIST", tmp_path)
    images, offline = doctor._data()
    assert "dataset-fashion-mnist" in images.fix
    assert (offline.ok, offline.detail) == (False, f"Minari data sets in {tmp_path}: none")
    data = tmp_path / "lab" / "pendulum" / "random-v0" / "data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text("{}")
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    images, offline = doctor._data()
    assert "Fashion-MNIST" in images.detail
    assert (offline.ok, offline.detail) == (True, f"Minari data sets in {tmp_path}: lab/pendulum/random-v0")


TESTED = {"mujoco": "3.17.0", "dm-control": "1.0.50", "gymnasium": "1.4.0", "pillow": "13.0.0", "pandas": "3.1.1"}


def test_the_tested_versions_have_no_conflict():
    assert known_conflicts(TESTED) == []
    assert known_conflicts({}) == []


@pytest.mark.parametrize(
    ("versions", "fix"),
    [
        ({"mujoco": "4.0.0"}, "'mujoco==3.17.0' 'dm-control==1.0.50'"),
        ({"mujoco": "3.18.0rc1"}, "'mujoco==3.17.0' 'dm-control==1.0.50'"),
        ({"rliable": "1.2.0"}, "'pandas<3' 'arch<8'"),
        ({"rliable": "1.2.0", "pandas": "2.3.0", "arch": "8.0.0"}, "'pandas<3' 'arch<8'"),
        ({"d3rlpy": "2.8.1", "gymnasium": "1.0.0"}, "'gymnasium>=1.4,<1.5'"),
        ({"avalanche-lib": "0.6.0"}, "neoteny's checkpoints"),
        ({"moviepy": "2.2.1"}, "pip uninstall moviepy"),
        ({"mediapy": "1.2.4"}, "ffmpeg"),
        ({"minari": "0.5.4"}, "neoteny[offline]"),
    ],
)
def test_each_known_trap_is_found(versions: dict[str, str], fix: str):
    (found,) = known_conflicts(TESTED | versions, has_ffmpeg=False)
    assert fix in found[1]


@pytest.mark.parametrize(
    "versions",
    [
        {"rliable": "1.2.0", "pandas": "2.3.0", "arch": "7.2.0"},
        {"moviepy": "2.2.1", "pillow": "11.3.0"},
        {"minari": "0.5.4", "h5py": "3.16.0"},
        {"avalanche-lib": "0.7.0"},
    ],
)
def test_good_neighbours_are_left_alone(versions: dict[str, str]):
    assert known_conflicts(TESTED | versions) == []


def test_only_required_checks_decide_the_exit_code(capsys: pytest.CaptureFixture[str]):
    good = Check("atari", True, "Pong steps")
    missing = Check("rendering", False, "no libEGL", "install it", required=False)
    broken = Check("video", False, "ImportError: [av]", "pip install av")
    assert print_doctor([good, missing], Console(width=80)) == 0
    text = capsys.readouterr().out
    assert "install it" in text
    assert "Ready to train." in text
    assert print_doctor([good, missing, broken], Console(width=80)) == 1
    text = capsys.readouterr().out
    assert "[av]" in text  # not taken for markup
    assert "failed: video" in text


def test_cores_are_those_this_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert doctor.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= doctor.usable_cores() <= len(before)
