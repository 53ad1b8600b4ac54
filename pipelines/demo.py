"""What `make demo` runs: the whole job with the recipe `tiny`, then three questions to the served model.

Finished work is kept in the storage root (runs/demo in the checkout): start it again after an
interruption and it goes on; start it again after the end and it only says so.
"""

import argparse
import shlex
import sys

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration import entry
from rayva.orchestration.console import guarded
from rayva.provenance import REPOSITORY
from rayva.recipes import from_dict
from rayva.steps import read_summary
from rayva.storage import Storage

_AGAIN = "Stopped. Finished steps are kept; the same command goes on."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default=str(REPOSITORY / "runs" / "demo"), help="default: runs/demo")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    options = parser.parse_intermixed_args()
    code = entry.main(argv=["--recipe", "tiny", "--storage", options.storage, *options.overrides])
    return code or guarded(lambda: _ask(Storage(options.storage)), _AGAIN)


def _ask(storage: Storage) -> int:
    served = read_summary(storage)["served"]
    if served is None:
        from rayva.orchestration.demo import ask_served_model

        print("\nAsking the served model ...", flush=True)
        lines = ask_served_model(storage, from_dict(storage.read_json("recipe.json")).serving)
    else:
        lines = [f"The demo is finished. The served model was asked about {served['picture']}:"]
        for turn in served["answers"]:
            lines += [f"  {turn['question']}", f"    {turn['answer']}"]
    print("\n" + "\n".join(lines))
    serve = shlex.join([sys.executable, "pipelines/serve.py", "--storage", storage.root])
    print(f"\nServe it: {serve}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
