"""The command line of pipelines/evaluate.py where it evaluates a model on tasks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from rayva.errors import DataError
from rayva.evaluation.chat import ChatModel, endpoint
from rayva.evaluation.judge import Judge
from rayva.evaluation.tasks.registry import TASKS, make_tasks
from rayva.orchestration.console import command_again, guarded, in_temporary_copy
from rayva.steps import SUMMARY, read_summary
from rayva.storage import Storage

_OWN = ("--model", "--endpoint", "--tasks", "--out")
_ABOUT = """\
Evaluates a model on tasks, with the data in your folders.

examples:
  python pipelines/evaluate.py --model runs/demo --tasks grounding --out runs/eval
  python pipelines/evaluate.py --model FOLDER --tasks scienceqa pope --out OUT \\
      scienceqa.folder=/data/scienceqa pope.folder=/data/pope pope.images=/data/coco/val2014
  python pipelines/evaluate.py --endpoint http://HOST:8000 --endpoint-model NAME --tasks vqa --out OUT \\
      vqa.data=questions.json
  python pipelines/evaluate.py --model FOLDER --tasks llava_bench --out OUT llava_bench.folder=DIR \\
      --judge-url https://HOST --judge-model NAME --judge-runs 3

The same command, given again, goes on where it stopped: what is answered is not asked again. Without --model,
--endpoint, --tasks and --out this is the step `evaluate` of a recipe's run (the gate), as in
  python pipelines/evaluate.py --recipe tiny --storage runs/demo     (--recipe tiny --help tells the rest)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 an error to mend, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_intermixed_args(arguments)
    told = f"Stopped. What is answered is kept; go on with:\n  {command_again()}"
    return guarded(lambda: _run(options), told)


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether the arguments are for this, and not for the step `evaluate` of a recipe's run."""
    own = any(argument.partition("=")[0] in _OWN for argument in arguments)
    return own or (len(arguments) == 1 and arguments[0] in ("-h", "--help"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="model folder, storage root of a run, or models:/NAME@ALIAS")
    which.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint instead")
    parser.add_argument("--endpoint-model", metavar="NAME", help="the model to ask there")
    parser.add_argument(
        "--endpoint-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable of its key"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="questions under way at an endpoint (8)")
    parser.add_argument(
        "--registry-uri",
        metavar="URI",
        help="registry, for models:/... (default: --tracking-uri)",
    )
    parser.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(TASKS)}")
    parser.add_argument("--out", required=True, metavar="STORAGE", help="folder or URI that holds all of it")
    parser.add_argument("settings", nargs="*", metavar="task.key=value", help="where the data is, and more")
    _sampling_arguments(parser.add_argument_group("answering"))
    _judge_arguments(parser.add_argument_group("judge (llava_bench)"))
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow store that takes the figures (default: SQLite under --out); none for no tracking",
    )
    parser.add_argument("--experiment", default="rayva-evaluate", help="MLflow experiment")
    parser.add_argument("--dry-run", action="store_true", help="only tell how much would be asked")
    return parser


def _sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0, help="of the draws of --limit and --temperature")
    group.add_argument("--max-new-tokens", type=int, help="default: each task's own")
    group.add_argument("--limit", type=int, metavar="N", help="only N questions of each task")
    group.add_argument("--batch-size", type=int, default=16, help="questions at once (16)")
    group.add_argument("--replicas", type=int, help="copies of the model (default: as many as pay)")
    group.add_argument("--cpus-per-replica", type=float, default=1.0)
    group.add_argument("--gpus-per-replica", type=float, default=0.0)
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on GPUs that have it, else float32",
    )  # fmt: skip


def _judge_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint")
    group.add_argument("--judge-model", metavar="NAME", help="its model: pin an exact version")
    group.add_argument(
        "--judge-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable of its key"
    )
    group.add_argument("--judge-runs", type=int, default=1, help="reviews of each answer (1)")
    group.add_argument("--judge-temperature", type=float, default=0.2, help="default: 0.2")
    group.add_argument("--judge-max-tokens", type=int, default=1024)
    group.add_argument("--judge-concurrency", type=int, default=8)
    group.add_argument(
        "--judge-order", choices=("reference_first", "candidate_first", "both"), default="reference_first",
        help="which answer the judge sees first; both asks twice",
    )  # fmt: skip
    group.add_argument(
        "--compat", choices=("none", "original"), default="none",
        help="original: reviews that cannot be read count as -1",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    _check_numbers(options)
    names, settings = _split(options.tasks, options.settings)
    named = any(text.startswith(("grounding.run=", "grounding.data=")) for text in settings)
    if "grounding" in names and not named:
        settings += _own_questions(options.model)
    tasks = make_tasks(names, settings)
    if options.dry_run:
        for task in tasks:
            count = len(task.read())
            print(f"{task.name}: {count:,} questions")
        return 0
    remote, judge = _asked_model(options), _judge(options)

    from rayva.orchestration.answering import Replicas
    from rayva.orchestration.exam import Exam, run_exam

    exam = Exam(
        tasks=tasks,
        model=None if remote else _find(options),
        endpoint=remote,
        replicas=Replicas(
            options.replicas, options.cpus_per_replica, options.gpus_per_replica, options.batch_size,
            options.precision,
        ),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        judge=judge,
        compat=options.compat,
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
    )  # fmt: skip
    storage = _out(options.out)
    if storage.is_local:
        # Matplotlib and MLflow keep caches, which belong under the storage root like all the rest.
        os.environ.setdefault("MPLCONFIGDIR", storage.path(".cache/matplotlib"))
    if remote is None:
        _with_ray(storage)
    figures = run_exam(exam, storage)
    print(json.dumps(figures, indent=1))
    return 0


def _out(given: str) -> Storage:
    """Where the evaluation lies; a job's own copy of the code is no place for it."""
    if "://" not in given and not os.path.isabs(os.path.expanduser(given)) and in_temporary_copy():
        raise DataError(
            f"--out {given} is relative, and this job runs in a copy of the code that goes when it ends",
            "give an absolute path that all nodes share, or a URI such as s3://bucket/eval",
        )
    return Storage(given)


def _with_ray(storage: Storage) -> None:
    from rayva.orchestration.console import serving_recipe
    from rayva.orchestration.startup import start_ray
    from rayva.recipes.schema import Serving

    start_ray(serving_recipe(Serving()), storage)


def _check_numbers(options: argparse.Namespace) -> None:
    least = {
        "batch_size": 1, "concurrency": 1, "judge_runs": 1, "judge_concurrency": 1, "limit": 1,
        "max_new_tokens": 1, "replicas": 1, "temperature": 0, "cpus_per_replica": 0, "gpus_per_replica": 0,
        "judge_temperature": 0, "judge_max_tokens": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise DataError(f"--{name.replace('_', '-')} is {value}", f"give at least {low}")


def _split(tasks: Sequence[str], settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of tasks, with blanks or commas between them, and settings, wherever they stand."""
    given = [*tasks, *settings]
    names = [name for text in given if "=" not in text for name in text.split(",") if name]
    return names, [text for text in given if "=" in text]


def _own_questions(model: str | None) -> list[str]:
    """A run's model is asked the run's own held-out questions, where no others are named."""
    if model is None or model.startswith("models:") or not Storage(model).exists(SUMMARY):
        return []
    return [f"grounding.run={model}"]


def _find(options: argparse.Namespace) -> str:
    from rayva.serving.source import find_model

    storage = Storage(options.model) if not options.model.startswith("models:") else None
    if storage is not None and storage.exists(SUMMARY) and not storage.exists("rayva.json"):
        # A run's own model, whether or not it has been registered.
        assistant = read_summary(storage).get("assistant")
        if assistant:
            return str(assistant)
    tracked = options.tracking_uri if options.tracking_uri != "none" else None
    registry = options.registry_uri or (tracked if storage is None else None)
    return find_model(options.model, registry).folder


def _asked_model(options: argparse.Namespace) -> ChatModel | None:
    if options.endpoint is None:
        return None
    if not options.endpoint_model:
        raise DataError("the endpoint may serve several models", "name one with --endpoint-model NAME")
    return ChatModel(
        options.endpoint_model, endpoint(options.endpoint, options.endpoint_key_env, options.concurrency)
    )


def _judge(options: argparse.Namespace) -> Judge | None:
    if (options.judge_url is None) != (options.judge_model is None):
        raise DataError("a judge takes an address and a model", "give --judge-url and --judge-model together")
    if options.judge_url is None:
        return None
    place = endpoint(options.judge_url, options.judge_key_env, options.judge_concurrency)
    return Judge(
        ChatModel(options.judge_model, place),
        options.judge_temperature,
        options.judge_max_tokens,
        options.judge_runs,
        options.judge_order,
    )
