"""What the scripts of pipelines/ share: arguments of `serving.*`, errors, exit codes, the command again."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rayva.errors import RayvaError, RecipeError
from rayva.interruption import Interruptions
from rayva.provenance import REPOSITORY
from rayva.recipes.load import from_dict, merge, parse_override, to_dict
from rayva.recipes.schema import Features, Recipe, Scaling, Serving

INTERRUPTED = 130
USER_ERROR = 2


def guarded(action: Callable[[], int], interrupted: str) -> int:
    """Runs `action`; errors to mend become one paragraph and exit code 2, Ctrl-C the text `interrupted`.

    After Ctrl-C further ones are ignored: what is left to do is to clean up. At last Ray is left.
    """
    try:
        with Interruptions():
            return action()
    except RayvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, SystemExit):
        # Ray's own handler of SIGTERM raises SystemExit.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{interrupted}", file=sys.stderr, flush=True)
        return INTERRUPTED
    finally:
        _leave_ray()


def _leave_ray() -> None:
    """Ends a cluster that was started here. Ray is not imported for that if nothing has needed it."""
    if "ray" in sys.modules:
        from rayva.orchestration.startup import stop_ray

        stop_ray()
    elif (worker := sys.modules.get("ray._private.worker")) is not None:
        # Interrupted while it was imported: it has nothing to end, and would trip over what is missing.
        atexit.unregister(worker.shutdown)


def command_again() -> str:
    """The command that started this process, as a line for a shell, but for what `--force` forgot.

    A Ray job is submitted again, from the checkout; its interpreter is a node's own, not the one of whoever
    submits.
    """
    arguments = _without_force(sys.argv[1:])
    if in_temporary_copy():
        script = Path(sys.argv[0]).resolve()
        inside = str(script.relative_to(REPOSITORY)) if script.is_relative_to(REPOSITORY) else sys.argv[0]
        name = Path(sys.executable).name
        return f"ray job submit --working-dir . -- {shlex.join([name, inside, *arguments])}"
    return shlex.join([sys.executable, sys.argv[0], *arguments])


def program(name: str) -> str:
    """What starts a program of this environment in a shell here: its name, or its path if PATH has it not.

    `make demo` leaves PATH as it is. A job's node is not where its words are read: there, the name.
    """
    beside, found = Path(sys.executable).with_name(name), shutil.which(name)
    if in_temporary_copy() or not beside.exists() or (found and os.path.samefile(found, beside)):
        return name
    return shlex.quote(str(beside))


def in_temporary_copy() -> bool:
    """Whether this is a Ray job that runs in a copy of the code, which goes when the job ends."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def _without_force(arguments: Sequence[str]) -> list[str]:
    """The arguments to go on with: what --force forgot is forgotten, and must not be so again."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, _ = argument.partition("=")
        # argparse takes shortened options too; no other one begins with --f.
        if not (option.startswith("--f") and "--force".startswith(option)):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def serving_settings(base: Serving, overrides: Sequence[str]) -> Serving:
    """`base` with `serving.key=value` overrides put over it.

    Raises:
        RecipeError: another key, or a value that does not fit.
    """
    settings = to_dict(serving_recipe(base))
    for override in overrides:
        change = parse_override(override)
        if set(change) != {"serving"}:
            raise RecipeError(f"{override!r} does not concern the endpoint", "only serving.* can be changed")
        settings = merge(settings, change)
    return from_dict(settings).serving


def serving_recipe(serving: Serving) -> Recipe:
    """A recipe that asks the cluster for nothing beside the endpoint's replicas."""
    return Recipe(
        name="serve",
        serving=serving,
        scaling=Scaling(cpus_per_worker=0.0),
        features=Features(encoder_cpus=0.0, decoder_cpus=0.01),
    )
