"""Settings of the environment from the command line: read, stored, and used wherever the run makes environments."""

import json

import pytest
import torch

from runs import resume
from runs.cli import main
from runs.config import RunConfig
from runs.errors import UsageError
from runs.options import ResumeOptions, TrainOptions, environment_settings
from runs.parsing import parse
from runs.play import evaluate_run


def settings(*flags: str) -> dict:
    return environment_settings(parse(TrainOptions, ["--env", "dmc/walker-walk", *flags], "neoteny train", "example"))


def test_flags_become_plain_settings():
    assert settings() == settings("--obs", "state") == {}
    assert settings("--obs", "pixels") == {"obs": "pixels"}
    pictures = settings("--obs", "pixels", "--image-size", "64", "--frame-stack", "1", "--render-profile", "fast")
    assert pictures == {"obs": "pixels", "image_size": 64, "frame_stack": 1, "render_profile": "fast"}
    values = ["a=0.0", "b=machado", "c=true", "d=[240, 320]", 'e="5"', "f=x=y", "g=null", "h=NaN"]
    read = {"a": 0.0, "b": "machado", "c": True, "d": [240, 320], "e": "5", "f": "x=y", "g": None, "h": "NaN"}
    assert settings("--env-set", *values) == read
    assert type(settings("--env-set", "a=0.0")["a"]) is float


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-set", "time_limit"], "KEY=VALUE"),
        (["--env-set", "=1"], "KEY=VALUE"),
        (["--env-set", "a=1", "a=2"], "'a' is given twice"),
        (["--obs", "pixels", "--env-set", "obs=state"], "'obs' is given twice"),
        (["--env-set", "a=1", "--env-set", "b=2"], "flag '--env-set' is given twice"),
        (["--env-set", "seed=3"], "'seed', which other flags decide"),
        (["--env-set", "row_seeds=[3]"], "'row_seeds', which other flags decide"),
    ],
)
def test_what_cannot_be_a_setting_is_one_sentence(flags, message):
    with pytest.raises(UsageError, match=message):
        settings(*flags)


@pytest.mark.parametrize(
    ("env_id", "flags", "message"),
    [
        ("dmc/walker-walk", ["--env-set", "protocol=machado"], "no setting 'protocol'"),
        (
            "dmc/walker-walk",
            ["--env-set", "time_limit=long"],
            "time_limit must be a positive number of seconds, got 'long'",
        ),
        ("dmc/walker-walk", ["--image-size", "64"], "only with obs='pixels'"),
        ("gym/CartPole-v1", ["--obs", "pixels"], "no setting 'obs'"),
        (
            "gym/Pendulum-v1",
            ["--env-set", "max_episode_steps=long"],
            "must be a whole number of at least 1, got 'long'",
        ),
        ("gym/CartPole-v0", ["--env-set", "max_episode_steps=long"], "does not take the settings"),
    ],
)
def test_what_the_environment_does_not_have_ends_with_code_2(env_id, flags, message, tmp_path, capsys):
    assert main(["train", "td3", "--env", env_id, *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_agent_for_vectors_refuses_pixels(tmp_path, capsys):
    flags = ["--obs", "pixels", "--image-size", "20", "--render-profile", "fast"]
    assert main(["train", "td3", "--env", "dmc/pendulum-swingup", *flags, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    if "OpenGL" in message:
        pytest.skip(message)
    assert "needs a vector of observations, this environment shows [9, 20, 20]" in message
    assert not (tmp_path / "out").exists()


def test_training_evaluation_and_replaying_use_the_settings(tmp_path):
    """0.2 seconds are 20 steps of cartpole, against 1 000 by default."""
    torch.set_num_threads(1)
    flags = (
        "--no-tensorboard --quiet --steps 60 --seeds 1 --num-envs 2 --eval-every 30 --eval-episodes 2 --warmup-steps 20"
    )
    arguments = ["--env", "dmc/cartpole-swingup", "--env-set", "time_limit=0.2", "sparse=true", *flags.split()]
    arguments += ["--warmup-steps", "20"]
    assert main(["train", "td3", *arguments, "--out", str(tmp_path), "--name", "run"]) == 0
    run = tmp_path / "run"
    assert RunConfig.load(run).env_settings == {"time_limit": 0.2, "sparse": True}
    assert RunConfig.load(run).environment["runner"]["settings"]["sparse"] is True
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/length", "eval/length"):
        lengths = [row["value"] for row in rows if row["name"] == name]
        assert lengths
        assert set(lengths) == {20.0}, name
    assert evaluate_run(run, 1, 0, "cpu")["metrics"]["eval/length"]["mean"] == 20.0
    assert resume._fit(RunConfig.load(run), ResumeOptions(run=run)) == (
        RunConfig.load(run),
        [],
    )  # the same environment, not the default
