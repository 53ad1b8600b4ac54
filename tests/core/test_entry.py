"""The scripts of pipelines/ and the `rayva` command: help, faults, dry runs, and quick starts."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayva import cli
from rayva.commands import COMMANDS
from rayva.orchestration import entry, exam_entry
from rayva.orchestration.console import command_again, program
from rayva.orchestration.pipeline import STEPS
from rayva.recipes import resolve, to_dict
from tests.core import job

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "torch", "transformers", "mlflow", "deepspeed", "PIL")

FINISHED = """
import json, runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, "pipelines")  # as Python does for a script
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps(sorted(sys.modules)))
"""


def script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_every_step_has_its_script() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "pipelines").glob("[a-z]*.py")}
    assert set(scripts) >= {"full", *(step.name for step in STEPS)}
    # Evaluation does more than the step; its entry knows the step, too.
    for step in STEPS:
        if step.name != "evaluate":
            assert f'main(only="{step.name}")' in scripts[step.name]


def test_help_works_from_any_folder(tmp_path: Path) -> None:
    # A Hugging Face library is called `evaluate`, too.
    done = script(str(ROOT / "pipelines" / "evaluate.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--storage" in done.stdout
    assert "The same command, given again, goes on" in done.stdout


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    done = script("pipelines/full.py", "--recipe", "tiny", "--storage", str(root), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [step.name for step in STEPS]
    assert "would run" in done.stdout
    assert not root.exists()


def test_settings_may_stand_before_and_after_options(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    mixed = [
        "--recipe",
        "tiny",
        "data.train_scenes=100",
        "--storage",
        root,
        "data.test_scenes=20",
        "--dry-run",
    ]
    last = [
        "--recipe",
        "tiny",
        "--storage",
        root,
        "--dry-run",
        "data.train_scenes=100",
        "data.test_scenes=20",
    ]
    told = [script("pipelines/full.py", *arguments) for arguments in (mixed, last)]
    assert [done.returncode for done in told] == [0, 0], told[0].stderr
    assert told[0].stdout == told[1].stdout


@pytest.mark.parametrize(
    "command",
    [
        ["pipelines/serve.py", "serving.port=8001", "--model", "nowhere", "serving.prot=1"],
        ["pipelines/demo.py", "data.seed=1", "--storage", "nowhere", "serving.prot=1"],
    ],
)
def test_so_they_may_with_other_scripts(command: list[str], tmp_path: Path) -> None:
    done = script(str(ROOT / command[0]), *command[1:], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "serving.port" in done.stderr, "the nearest key: all settings were read as such"


def test_so_they_may_with_rayva(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "tiny", "data.seed=3", "--json", "data.test_scenes=20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["data"]["seed"], told["data"]["test_scenes"]) == (3, 20)


@pytest.mark.parametrize("content", ["[]", '{"stages": 3}', "{}", "not JSON"])
def test_another_programs_summary_is_told(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "other"
    root.mkdir()
    (root / "summary.json").write_text(content)
    out = str(tmp_path / "out")
    for use in (
        lambda: cli.main(["export", str(root), out]),
        lambda: cli.main(["chat", str(root)]),
        lambda: cli.main(["compare", str(root)]),
        lambda: exam_entry.main(["--model", str(root), "--tasks", "grounding", "--out", out]),
    ):
        assert use() == 2
        assert f"error: {root}/summary.json is " in capsys.readouterr().err


def test_the_registry_is_where_an_evaluation_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    asked = ["--model", "models:/m@candidate", "--tasks", "vqa", "--out", str(tmp_path / "out")]
    asked.append(f"vqa.data={rows}")
    assert exam_entry.main(asked) == 2
    assert "give its address with --tracking-uri" in capsys.readouterr().err
    for given in (["--tracking-uri", "htp://b"], ["--tracking-uri", "none", "--registry-uri", "htp://b"]):
        assert exam_entry.main([*asked, *given]) == 2
        assert "htp://b" in capsys.readouterr().err


def test_a_single_steps_script_runs_only_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(only="features", argv=["--storage", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "data", "features"]


def test_a_ray_job_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pipelines/full.py", "--force", "data", "--storage", "/a run"])
    assert command_again() == f"{sys.executable} pipelines/full.py --storage '/a run'"
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    python = Path(sys.executable).name
    again = f"ray job submit --working-dir . -- {python} pipelines/full.py --storage '/a run'"
    assert command_again() == again
    whole = str(ROOT / "pipelines" / "full.py")  # on the node: whoever submits has another path to it
    monkeypatch.setattr("sys.argv", [whole, "--storage", "/a run"])
    assert command_again() == again


@pytest.mark.parametrize("force", [["--force", "data"], ["--force=data"], ["--fo", "data"], ["--f=data"]])
def test_what_was_forgotten_is_not_forgotten_again(force: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pipelines/full.py", *force, "finetune.lr=1e-4", "--until=data"])
    assert command_again() == f"{sys.executable} pipelines/full.py finetune.lr=1e-4 --until=data"


def test_a_program_is_named_so_that_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a venv", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rayva").write_text("")
        (tmp_path / folder / "rayva").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "a venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert program("rayva") == f"'{tmp_path}/a venv/rayva'", "that of the PATH is another one"
    assert program("mlflow") == "mlflow", "not in this environment at all"
    monkeypatch.setenv("PATH", f"{tmp_path}/a venv:{tmp_path}/other")
    assert program("rayva") == "rayva"
    monkeypatch.setenv("PATH", "")
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert program("rayva") == "rayva", "whoever reads this is elsewhere"


@pytest.fixture(autouse=True)
def own_signals():
    """The command line puts its own handler in place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "tyni"], "the nearest is 'tiny'"),
        (["finetune.epoch=2"], "the nearest is 'finetune.epochs'"),
        (["--config", "/none.yaml"], "/none.yaml cannot be read"),
        (["--recipe", "llava-7b"], "data.finetune_json=..."),
        (["--storage", "/dev/null/run"], "/dev/null/run"),
        (["--storage", "nosuch://x"], "nosuch://x"),
        (["--storage", "s3://"], "names no place"),
        (["tracking.uri=http://"], "names no host"),
        (["data.captions=https://me:hunter2@host/x"], "https://***@host/x"),
    ],
)
def test_faults_are_one_paragraph_and_exit_code_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(argv=["--storage", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert told in said
    assert "\n\n" not in said


def test_a_finished_job_says_so_without_heavy_imports(tmp_path: Path) -> None:
    """Manifests for the real steps are put there by hand; then the real script is run."""
    from rayva.orchestration.pipeline import make_plan
    from rayva.storage import Storage

    storage = Storage(str(tmp_path))
    grounding = {"accuracy": 0.9, "accuracy_shuffled_images": 0.4, "accuracy_no_image": 0.3, "questions": 10}
    outputs = {
        "evaluate": {"grounding": grounding, "passed": True, "why": "because"},
        "register": {"model_name": "rayva-tiny", "version": "1", "aliases": ["candidate"]},
    }
    about = {"settings": {}, "inputs": {}, "code": {"commit": "c"}, "mlflow": job.INFO}
    for planned in make_plan(resolve("tiny"), storage):
        planned.folder.finish(outputs.get(planned.step.name, {}), {}, 1.0, about)
    done = script("-c", FINISHED, "pipelines/full.py", "--recipe", "tiny", "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "All 8 steps are finished; there is nothing to do." in done.stdout
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded.intersection(HEAVY) == set()
    assert storage.read_json("summary.json")["model"]["name"] == "rayva-tiny"


def test_relative_storage_is_refused_where_the_checkout_is_a_temporary_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_x.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert entry.main(argv=["--storage", "runs/x"]) == 2
    assert "is relative" in capsys.readouterr().err


def test_the_recipe_command_prints_what_config_takes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipe", "llava-13b", "finetune.lr=1e-5"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["finetune"]["lr"] == 1e-5
    config = tmp_path / "r.yaml"
    config.write_text(printed)
    assert cli.main(["recipe", "tiny", "--config", str(config), "--json"]) == 0
    expected = to_dict(resolve("llava-13b", None, ["finetune.lr=1e-5"]))
    assert json.loads(capsys.readouterr().out) == expected


def test_the_recipe_command_quotes_what_only_looks_like_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipe", "tiny", "language.revision=12345e7"]) == 0
    config = tmp_path / "r.yaml"
    config.write_text(capsys.readouterr().out)
    assert cli.main(["recipe", "tiny", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["language"]["revision"] == "12345e7"
    assert cli.main(["recipe", "--config", str(config)]) == 2
    assert "none is named" in capsys.readouterr().err


def test_a_dry_run_tells_what_force_would_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"steps": job.STEPS, "start": job.nothing, "open_tracker": job.Tracker}
    assert entry.main(argv=["--storage", str(tmp_path)], **given) == 0
    capsys.readouterr()
    assert entry.main(argv=["--storage", str(tmp_path), "--force", "train", "--dry-run"], **given) == 0
    data, train, evaluate = capsys.readouterr().out.splitlines()
    assert data.startswith("data       finished, took")
    assert train.startswith("train      would run: again, for --force")
    assert evaluate.startswith("evaluate   would run: again, for --force")
    assert entry.main(argv=["--storage", str(tmp_path), "--dry-run"], **given) == 0
    assert "would run" not in capsys.readouterr().out


def test_the_command_tells_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "llava7b"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        cli.main(["recip"])
    assert cli.main([]) == 0


def test_every_command_has_its_module() -> None:
    for name, (module, _) in COMMANDS.items():
        assert importlib.util.find_spec(module) is not None, name
    present = {path.stem for path in (ROOT / "platform/rayva/commands").glob("[a-z]*.py")}
    assert present == {module.rpartition(".")[2] for module, _ in COMMANDS.values()}
