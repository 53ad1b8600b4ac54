"""How long a step waits for its data, with features on local disk and on an S3 server with a delay.

The server is moto's on this machine, in a process of its own; before it answers a request it sleeps for
`--latency` milliseconds. It shares the cores with training. Features are random ones of the tower's shape,
which take as long to read. Local files were just written, so they come from the page cache.

    python benchmarks/wait.py                             # SmolLM2-135M's shape, 20 ms
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_support as support
import rayva_side
import synthetic
from lengths import TITLES
from synthetic import Setting

_TITLE = "Waiting for data"
_BUCKET = "bench"


def main() -> None:
    synthetic.run(_TITLE, _options(), _child, _measure, _body)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    synthetic.add_options(parser, steps=6)
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds a request (default: 20)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: all cores)")
    return synthetic.parse(parser)


def _measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    samples = (options.warm_up + options.steps) * options.batch_size
    synthetic.make_tokenizer().save_pretrained(setting.file("tokenizer"))
    synthetic.write_images(setting, samples)
    store = rayva_side.write_random_store(setting, setting.root, samples)
    common = {
        "setting": setting.json(),
        "threads": options.threads,
        "warm_up": options.warm_up,
        "stage": synthetic.stage_changes(options),
        "store": store["store"],
    }
    figures: dict[str, Any] = {"bytes_per_image": store["bytes_per_image"], "stages": {}}
    with _s3_server(options.latency / 1000) as env:
        support.run_child(__file__, common | {"kind": "upload"}, env)
        for name in options.stages:
            synthetic.write_samples(setting, name, name, samples)
            work = common | {"kind": "train", "name": name}
            figures["stages"][name] = {
                "local": support.run_child(__file__, work | {"root": setting.root}),
                "s3": support.run_child(__file__, work | {"root": f"s3://{_BUCKET}/run"}, env),
            }
    return figures


@contextmanager
def _s3_server(latency: float) -> Iterator[dict[str, str]]:
    """Runs the server; yields the environment in which s3fs finds it."""
    server = support.start_child(__file__, {"kind": "serve", "latency": latency})
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rsplit(" ", 1)[-1])
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
    finally:
        server.kill()
        server.communicate()


def _child(work: dict[str, Any]) -> None:
    if work["kind"] == "serve":
        _serve(work["latency"])
        return
    setting = Setting(**work["setting"])
    if work["kind"] == "upload":
        _upload(setting, work["store"])
        support.tell("uploaded")
        return
    support.set_threads(work["threads"])
    features = rayva_side.stored_features(setting, work["root"], work["store"])
    source = rayva_side.source_of(setting, work["name"], work["name"], features)
    stage = rayva_side.stage_settings(work["name"], **work["stage"])
    support.tell(rayva_side.train_timed(setting, stage, source, work["name"], work["warm_up"]))


def _serve(latency: float) -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def delayed(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        time.sleep(latency)
        answer: Iterable[bytes] = application(environ, start_response)
        return answer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, delayed, threaded=True)
    print(f"port {server.port}", flush=True)
    server.serve_forever()


def _upload(setting: Setting, store: str) -> None:
    from rayva.storage import Storage

    target = Storage(f"s3://{_BUCKET}/run")
    target.fs.mkdir(_BUCKET)
    target.upload(Path(setting.root) / store, store)


def _body(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    places = {"local": "local disk", "s3": f"S3 at {options.latency:g} ms"}
    rows = [
        [
            TITLES[name],
            label,
            f"{sides[place]['seconds'] / sides[place]['steps']:.2f}",
            f"{sides[place]['wait_share']:.2%}",
        ]
        for name, sides in figures["stages"].items()
        for place, label in places.items()
    ]
    return (
        f"Global batch of {options.batch_size}, each sample with an image of "
        f"{figures['bytes_per_image'] / 1024:,.0f} KiB; steps after the first {options.warm_up}.\n\n"
        + support.table(["", "features on", "seconds a step", "share of it spent waiting"], rows)
    )


if __name__ == "__main__":
    main()
