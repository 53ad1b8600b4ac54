"""The command line of the scripts in pipelines/: arguments, signals, errors and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayva.errors import RayvaError
from rayva.orchestration.console import command_again, guarded, in_temporary_copy
from rayva.orchestration.pipeline import STEPS, Planned, Step, make_plan, run_job, select, with_dependents
from rayva.orchestration.summary import summary_text
from rayva.progress import duration
from rayva.provenance import REPOSITORY
from rayva.recipes import Recipe, require_runnable, resolve
from rayva.storage import Storage

_EPILOG = """\
Finished steps are skipped and an interrupted one goes on where it stopped, so that the same command, given
again, finishes the job. A changed setting runs again only what depends on it.

examples:
  python pipelines/full.py --recipe tiny --storage runs/demo
  python pipelines/full.py --recipe tiny --storage runs/demo finetune.lr=5e-4 --dry-run
  python pipelines/full.py --recipe llava-7b --storage s3://bucket/run --config my.yaml
  ray job submit --working-dir . -- python pipelines/full.py --recipe tiny --storage /shared/run
"""


def main(
    only: str | None = None,
    argv: Sequence[str] | None = None,
    steps: Sequence[Step] = STEPS,
    **job: Any,
) -> int:
    """Runs a script of pipelines/: the whole job, or the step `only` with what it depends on.

    Args:
        job: further arguments of `run_job`.

    Returns:
        Exit code: 0 done, 2 an error to mend, 130 interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser(only, steps).parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    stopped = f"Stopped. Finished steps are kept; go on with:\n  {command_again()}"
    return guarded(lambda: _run(options, only, steps, job), stopped)


def _parser(only: str | None, steps: Sequence[Step]) -> argparse.ArgumentParser:
    names = [step.name for step in steps]
    about = {step.name: step.about for step in steps}
    described = (
        f"Runs the step {only!r} ({about[only]}), first what it depends on."
        if only
        else "From images to a registered model, in one job.\n\nsteps:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in about.items())
    )
    parser = argparse.ArgumentParser(
        description=described, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help="named recipe (default: tiny)")
    parser.add_argument(
        "--storage", help="folder or URI that holds the whole run (default: runs/RECIPE in the checkout)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings to change")
    if only is None:
        parser.add_argument("--until", metavar="STEP", choices=names, help="stop after this step")
    parser.add_argument(
        "--force", metavar="STEP", choices=names, action="append", default=[],
        help="forget this finished step and all that depends on it, and run them again",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only tell which steps are finished")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    return parser


def _run(options: argparse.Namespace, only: str | None, steps: Sequence[Step], job: dict[str, Any]) -> int:
    recipe = resolve(options.recipe, options.config, options.overrides)
    storage = Storage(storage_root(options.storage, recipe))
    until = getattr(options, "until", None)
    if options.dry_run:
        require_runnable(recipe)
        _show_plan(make_plan(recipe, storage, steps), storage, until, only, options.force)
        return 0
    summary = run_job(
        recipe, storage, until=until, only=only, force=options.force, steps=steps, tell=_tell, **job
    )
    print(summary_text(summary, storage), flush=True)
    return 0


def _tell(text: str) -> None:
    print(text, flush=True)


def _show_plan(
    plan: Sequence[Planned], storage: Storage, until: str | None, only: str | None, force: Sequence[str]
) -> None:
    forced = with_dependents(plan, force)
    for planned in select(plan, until, only):
        name, manifest = planned.step.name, planned.manifest
        again = manifest is not None and name in forced
        took = f", took {duration(manifest['seconds'])}" if manifest else ""
        state = "finished" if manifest and not again else "would run"
        why = ": again, for --force" if again else "" if manifest else f": {planned.why}"
        print(f"{name:<10} {state}{why}{took}  [{storage.uri(planned.folder.rel)}]")


def storage_root(given: str | None, recipe: Recipe) -> str:
    """Where the run lies. A job's own copy of the code is temporary: nothing may be kept in there."""
    temporary = in_temporary_copy()
    if given is None:
        if not temporary:
            return str(REPOSITORY / "runs" / recipe.name)
        home = Path.home() / "rayva-runs" / recipe.name
        print(f"No --storage given; this job's run is kept in {home} on this node.", flush=True)
        return str(home)
    if temporary and "://" not in given and not os.path.isabs(os.path.expanduser(given)):
        raise RayvaError(
            f"--storage {given} is relative, and this job runs in a copy of the code that goes when it ends.",
            "give an absolute path that all nodes share, or a URI such as s3://bucket/run",
        )
    return given
