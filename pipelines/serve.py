"""Brings up the endpoint for a run's registered model, or for a model folder, until Ctrl-C.

python pipelines/serve.py --storage runs/demo
python pipelines/serve.py --model models:/rayva-tiny@champion --tracking-uri http://mlflow:5000
python pipelines/serve.py --storage runs/demo serving.port=8001 serving.max_replicas=4
"""

import argparse
import threading

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration.console import guarded, program, serving_recipe, serving_settings
from rayva.recipes import from_dict
from rayva.recipes.schema import Serving
from rayva.serving.address import check_exposure, check_port
from rayva.storage import Storage


def main() -> int:
    options = _parser().parse_intermixed_args()
    return guarded(lambda: _serve(options), "The endpoint is down.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--storage", help="storage root of a run: serves the model that it registered")
    which.add_argument("--model", help="a model folder, or models:/NAME@ALIAS")
    parser.add_argument("--tracking-uri", help="where the registry is, for models:/...")
    parser.add_argument("--name", help="the name that clients use")
    parser.add_argument("overrides", nargs="*", metavar="serving.key=value", help="settings to change")
    return parser


def _serve(options: argparse.Namespace) -> int:
    serving = serving_settings(_settings_of_run(options.storage), options.overrides)
    check_exposure(serving.host)
    check_port(serving.host, serving.port)
    print("Bringing the endpoint up ...", flush=True)
    from rayva.orchestration.endpoint import running_endpoint
    from rayva.orchestration.startup import start_ray, stop_ray

    start_ray(serving_recipe(serving))
    try:
        args = {
            "model": options.storage or options.model,
            "tracking_uri": options.tracking_uri,
            "model_name": options.name,
        }
        with running_endpoint(args, serving) as url:
            chat = f"{program('rayva')} chat --url {url} --image PICTURE"
            print(f"Serving at {url}/v1 (Ctrl-C stops). Try:\n  {chat}", flush=True)
            threading.Event().wait()
    finally:
        stop_ray()
    return 0


def _settings_of_run(root: str | None) -> Serving:
    """What the run's recipe says about serving; the defaults where only a model is given."""
    if root is not None:
        storage = Storage(root)
        if storage.exists("recipe.json"):
            return from_dict(storage.read_json("recipe.json")).serving
    return Serving()


if __name__ == "__main__":
    raise SystemExit(main())
