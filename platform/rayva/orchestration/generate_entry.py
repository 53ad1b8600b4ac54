"""The command line of pipelines/generate.py."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rayva.errors import DataError
from rayva.orchestration.console import guarded
from rayva.orchestration.entry import storage_root
from rayva.orchestration.faults import user_error
from rayva.orchestration.generate_batch import read_batches
from rayva.orchestration.generate_costs import price_of, spent_at, told
from rayva.orchestration.generate_run import Plan, forecast, make_plan, run
from rayva.provenance import REPOSITORY
from rayva.recipes import refuse_secrets, resolve
from rayva.storage import Storage

UNFINISHED = 3
"""Exit code: some samples are still to be asked for; the same command goes on."""

_EPILOG = """\
Answers are kept as they come: killed, stopped by --max-cost or cut off, the same command goes on and pays for
nothing twice. samples.json can be trained on with data.source=llava data.finetune_json=FILE.

examples:
  python pipelines/generate.py --storage runs/instruct --input caps_boxes.jsonl --teacher endpoint \\
    --model gpt-4o --max-cost 20 --dry-run
  python pipelines/generate.py --storage runs/instruct --input scenes --teacher symbolic
  python pipelines/generate.py --storage runs/instruct --input c.jsonl --teacher batch --model gpt-4o
  python pipelines/generate.py ... --teacher batch --model gpt-4o --batch-results output.jsonl

exit codes: 0 done, 2 an error to mend, 3 unfinished (budget, failures, a batch to wait for), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    stopped = "Stopped. Answers are kept; the same command goes on."
    return guarded(lambda: _run(options), stopped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Writes conversations, detailed descriptions and complex reasoning about images that the "
        "teacher never sees: it reads their captions and boxes (section 3 of the paper).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="tiny", help="named recipe (default: tiny)")
    parser.add_argument(
        "--storage", "--out", default=None, help="folder or URI of all that is kept (default: runs/generate)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings to change")
    for flag, setting, about in _FLAGS:
        parser.add_argument(flag, metavar="VALUE", dest=setting, help=f"{about} (generation.{setting})")
    parser.add_argument(
        "--batch-results", metavar="FILE", nargs="+", default=[],
        help="result files of the batch API, with --teacher batch",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="count samples, tokens and dollars; ask nothing"
    )
    parser.add_argument("--force", action="store_true", help="forget a finished run (answers stay)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    return parser


_FLAGS = (
    ("--input", "input", "JSON Lines of {id, image, captions, instances}, or scenes or emoji: built-in data"),
    ("--coco-captions", "coco_captions", "COCO's captions_*.json, instead of --input"),
    ("--coco-instances", "coco_instances", "COCO's instances_*.json, for the boxes"),
    ("--teacher", "teacher", "symbolic, endpoint or batch"),
    ("--base-url", "base_url", "the endpoint"),
    ("--model", "model", "the teacher's name"),
    ("--samples", "samples", "how many in all; three for each image by default"),
    ("--kinds", "kinds", "shares of conversations, descriptions and reasoning; 58,23,77 by default"),
    ("--concurrency", "concurrency", "calls in flight"),
    ("--rpm", "requests_per_minute", "most requests a minute"),
    ("--tpm", "tokens_per_minute", "most tokens a minute, prompts and answers"),
    ("--max-cost", "max_cost", "dollars"),
    ("--prompts", "prompts", "folder of prompts in the original's layout"),
    ("--prices", "prices", "YAML table of prices"),
)
_BUILT_IN = ("scenes", "emoji")


def _run(options: argparse.Namespace) -> int:
    recipe = resolve(options.recipe, options.config, [*_flag_overrides(options), *options.overrides])
    if options.batch_results and recipe.generation.teacher != "batch":
        raise DataError("--batch-results belongs to --teacher batch", "leave one of them out")
    refuse_secrets(recipe)
    root = storage_root(options.storage or str(REPOSITORY / "runs" / "generate"), recipe)
    storage = Storage(root)
    plan = make_plan(recipe, storage)
    if options.dry_run:
        _show_forecast(plan)
        return 0
    if options.force:
        plan.folder.forget()
    if options.batch_results:
        _tell(f"Batch results: {read_batches(plan, options.batch_results)}")
    try:
        summary = run(plan)
    except Exception as error:
        known = user_error(error, storage.root)
        if known is None or known is error:
            raise
        raise known from error
    _show(plan, summary)
    if not summary.get("finished_before"):
        _show_batch(summary.get("batch"))
    return UNFINISHED if summary["unfinished"] else 0


def _flag_overrides(options: argparse.Namespace) -> list[str]:
    given = {setting: getattr(options, setting) for _, setting, _ in _FLAGS}
    overrides = []
    if given["input"] in _BUILT_IN:
        overrides += ["generation.source=dataset", f"data.source={given.pop('input')}"]
    elif given["coco_captions"] is not None:
        overrides.append("generation.source=coco")
    for setting, value in given.items():
        if value is not None:
            text = f"[{value.replace(':', ',')}]" if setting == "kinds" else value
            overrides.append(f"generation.{setting}={text}")
    return overrides


def _show_forecast(plan: Plan) -> None:
    count = len(plan.inputs.contexts)
    _tell(f"{count:,} context{'s' if count != 1 else ''}, {sum(plan.inputs.bad.values()):,} unusable")
    if plan.inputs.first_bad:
        _tell(f"unusable: {dict(plan.inputs.bad)}; the first, {plan.inputs.first_bad}")
    _tell(f"{'kind':<14}{'samples':>9}{'known':>9}{'prompt tokens':>16}{'answer tokens':>16}{'dollars':>10}")
    rows = forecast(plan)
    for row in rows:
        cost = "?" if row.cost is None else f"{row.cost:.2f}"
        _tell(
            f"{row.kind:<14}{row.samples:>9,}{row.known:>9,}{row.prompt_tokens:>16,}"
            f"{row.completion_tokens:>16,}{cost:>10}"
        )
    costs = [row.cost for row in rows if row.cost is not None]
    if len(costs) == len(rows):
        _tell(f"About ${sum(costs):.2f}. Estimates: four bytes a token, answers as long as the examples'.")
    else:
        _tell("The price of this model is not known: give --prices FILE.")
    if (limit := plan.settings.max_cost) is not None:
        spent = spent_at(plan.storage, price_of(plan.settings))
        _tell(f"${spent:.2f} are spent at this storage: --max-cost leaves ${max(0.0, limit - spent):.2f}.")


def _show(plan: Plan, summary: dict[str, Any]) -> None:
    if summary.get("finished_before"):
        _tell("This run is finished; there is nothing to do.")
    _tell(f"{summary['samples']:,} of {summary['tasks']:,} samples: {summary['by_kind']}")
    if summary["rejected_answers"]:
        _tell(f"{summary['rejected_answers']:,} answers were rejected: {summary['reasons']}")
    if summary["bad_contexts"]:
        _tell(f"unusable contexts: {summary['bad_contexts']}")
    if empty := summary.get("empty_boxes"):
        _tell(f"boxes without an area that were left out: {empty:,}")
    for error, count in summary["errors"].items():
        _tell(f"{count} samples failed: {error}")
    _tell(
        f"tokens: {summary['prompt_tokens']:,} prompt, {summary['completion_tokens']:,} answer; "
        f"{told(summary)}"
    )
    _tell(f"LLaVA JSON: {summary['json']}")
    if summary["images"]:
        _tell(f"images:     {summary['images']}")
    _tell(f"report:     {summary['report']}")
    if summary["samples"]:
        config = shlex.quote(summary["train"])
        images = "" if summary["images"] else " data.pretrain_images=DIR data.finetune_images=DIR"
        _tell(f"train on it: python pipelines/full.py --recipe NAME --config {config}{images}")
    if rejected := summary["statuses"].get("rejected"):
        tried = plan.settings.attempts
        _tell(
            f"{rejected:,} sample{'s were' if rejected != 1 else ' was'} rejected after {tried} "
            f"attempt{'s' if tried != 1 else ''}; generation.attempts={2 * tried} asks again."
        )
    if summary["unfinished"]:
        left = {k: v for k, v in summary["statuses"].items() if k in ("failed", "stopped", "waiting")}
        _tell(f"Unfinished: {left}. The same command goes on; a budget wants a higher --max-cost.")


def _show_batch(batch: dict[str, Any] | None) -> None:
    """What is to be given to the batch API now; None for another teacher."""
    if batch is None:
        return
    for uri in batch["uris"]:
        _tell(f"To be given to the batch API: {uri}")
    if batch["uris"] and batch["cost_at_most"]:
        _tell(f"These {batch['requests']:,} requests cost at most ${batch['cost_at_most']:.4f}.")
    if batch["left_out"]:
        first = "read the results of these first, or " if batch["uris"] else ""
        _tell(
            f"{batch['left_out']:,} more requests might pass --max-cost and were left out: {first}"
            "give a higher --max-cost, with the same command."
        )


def _tell(text: str) -> None:
    print(text, flush=True)
