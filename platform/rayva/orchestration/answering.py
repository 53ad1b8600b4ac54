"""A model folder answers questions: Ray Data over resident replicas, one load for all tasks.

Each batch goes to a replica that has the whole model. A replica writes its answers to the storage before it
hands them back, so that a job that is killed asks only what no replica had answered.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from rayva.errors import CapacityError, RayvaError
from rayva.evaluation.answers import Answered, AnswerStore, Asked, batches, pack_messages, unpack_messages
from rayva.orchestration.faults import user_error
from rayva.orchestration.ray_data import data_context
from rayva.progress import Progress
from rayva.recipes.schema import Precision
from rayva.storage import Storage
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from rayva.model.folder import Assistant
    from rayva.text.conversation import Message

_BATCHES_PER_REPLICA = 4
"""Fewer do not pay for loading another copy of the model."""
_KEPT_PICTURES = 512
_MAX_PIXELS, _MAX_BYTES = 89_478_485, 64 << 20
_PICTURE = pa.struct([("name", pa.string()), ("uri", pa.string()), ("content", pa.binary())])
_QUESTIONS = pa.schema(
    [
        ("task", pa.string()),
        ("item_id", pa.string()),
        ("key", pa.string()),
        ("messages", pa.string()),
        ("pictures", pa.list_(_PICTURE)),
        ("then", pa.string()),
        ("max_new_tokens", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Replicas:
    """How many copies of the model there are, and what each takes; None: as many as there is room for."""

    count: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    batch_size: int = 16
    precision: Precision = "auto"


def answer_all(folder: str, questions: Sequence[Asked], out: Storage, replicas: Replicas) -> None:
    """Answers every question; the answers are then in `out` (see `AnswerStore`).

    Args:
        folder: the model folder, as a path or URI that every node sees.

    Raises:
        CapacityError: there is no room for a single replica.
        RayvaError: the model cannot be loaded.
    """
    planned = batches(questions, replicas.batch_size)
    count = _count(replicas, len(planned))
    with data_context(block_bytes=1 << 20):
        dataset = ray.data.from_arrow([_table(batch) for batch in planned]).map_batches(
            _Replica,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(folder, out, replicas),
            compute=ActorPoolStrategy(size=count),
            num_cpus=replicas.cpus,
            num_gpus=replicas.gpus,
        )
    try:
        with Progress("evaluate", len(questions), "answers") as progress:
            for bundle in dataset.iter_internal_ref_bundles():
                for reference in bundle.block_refs:
                    progress.advance(ray.get(reference).num_rows)
    except Exception as error:
        known = user_error(error, out.root)
        if known is None or known is error:
            raise
        raise known from error


def _count(replicas: Replicas, num_batches: int) -> int:
    total = ray.cluster_resources()
    rooms = [
        int(total.get(kind, 0.0) / each + 1e-4)
        for kind, each in (("CPU", replicas.cpus), ("GPU", replicas.gpus))
        if each
    ]
    room = min(rooms, default=1)
    if room < (replicas.count or 1):
        raise CapacityError(
            f"{replicas.count or 1} replicas of {replicas.cpus:g} CPUs, {replicas.gpus:g} GPUs do not fit: "
            f"the cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs.",
            "lower --replicas, --cpus-per-replica or --gpus-per-replica",
        )
    return replicas.count or min(room, max(1, -(-num_batches // _BATCHES_PER_REPLICA)))


def _table(batch: Sequence[Asked]) -> pa.Table:
    rows = [
        {
            "task": one.task,
            "item_id": one.item.item_id,
            "key": one.key,
            "messages": pack_messages(one.item.messages),
            "pictures": [{"name": p.name, "uri": p.uri, "content": p.content} for p in one.item.pictures],
            "then": one.item.then,
            "max_new_tokens": one.sampled.max_new_tokens,
            "temperature": one.sampled.temperature,
            "top_p": one.sampled.top_p,
            "seed": one.sampled.seed,
        }
        for one in batch
    ]
    return pa.Table.from_pylist(rows, schema=_QUESTIONS)


class _Replica:
    """The whole model, resident on one actor."""

    def __init__(self, folder: str, out: Storage, replicas: Replicas) -> None:
        import torch

        torch.set_num_threads(max(1, int(replicas.cpus)))
        self._store = AnswerStore(out)
        # What an actor's constructor raises is lost when the actor dies of it; so it waits for a call.
        self._answerer: Answerer | RayvaError
        try:
            self._answerer = Answerer(load_model(folder, replicas))
        except RayvaError as error:
            self._answerer = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if isinstance(self._answerer, RayvaError):
            raise self._answerer
        answers = self._answerer.answer(batch.to_pylist())
        self._store.add(answers)
        return pa.table({"key": [answer.key for answer in answers]})


def load_model(folder: str, replicas: Replicas) -> Assistant:
    """The model in the precision that is asked for; `auto` is bf16 on GPUs that have it, else fp32."""
    import torch

    from rayva.model.folder import load_assistant
    from rayva.training.precision import resolve_precision

    device = torch.device("cuda" if replicas.gpus > 0 else "cpu")
    wanted: Precision = replicas.precision
    if wanted == "auto" and device.type == "cpu":
        wanted = "float32"
    dtype, _ = resolve_precision(wanted, device)
    storage = Storage(folder)
    return load_assistant(storage.localize(""), device, dtype)


class Answerer:
    """Answers batches of questions (rows as `_QUESTIONS` has them) with one model."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        """Of the pictures shown last: benchmarks ask several questions about each."""

    def answer(self, rows: Sequence[dict[str, Any]]) -> list[Answered]:
        """An answer to each row, or the reason why one of its pictures cannot be shown."""
        failures = self._encode([picture for row in rows for picture in row["pictures"]])
        too_long = {row["key"]: why for row in rows if (why := self._too_long(row))}
        usable = [
            row
            for row in rows
            if row["key"] not in too_long and not any(_name(p) in failures for p in row["pictures"])
        ]
        texts = dict(zip((row["key"] for row in usable), self._texts(usable), strict=True))
        return [self._answered(row, texts.get(row["key"]), failures, too_long) for row in rows]

    def _too_long(self, row: dict[str, Any]) -> str:
        """Why a conversation does not fit the model's context; empty where it does."""
        context = self._assistant.model.context
        if context is None:
            return ""
        length = self._assistant.prompt_length(unpack_messages(row["messages"]))
        if length < context:
            return ""
        return f"the question takes {length} positions; the model's context is {context}"

    def _answered(
        self, row: dict[str, Any], text: str | None, failures: dict[str, str], too_long: dict[str, str]
    ) -> Answered:
        names = (row["task"], row["item_id"], row["key"])
        if text is not None:
            return Answered(*names, text=text)
        reasons = [failures[_name(p)] for p in row["pictures"] if _name(p) in failures]
        return Answered(*names, error=too_long.get(row["key"]) or reasons[0])

    def _texts(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        if not rows:
            return []
        prompts = [unpack_messages(row["messages"]) for row in rows]
        shown = [[self._features[_name(p)] for p in row["pictures"]] for row in rows]
        texts = self._generate(rows, prompts, shown, None)
        marks = [row["then"].strip().rpartition("\n")[2] for row in rows]
        open_rows = [n for n, row in enumerate(rows) if row["then"] and marks[n] not in texts[n]]
        if open_rows:
            begun = [texts[n].rstrip() + rows[n]["then"] for n in open_rows]
            pick = [rows[n] for n in open_rows]
            more = self._generate(pick, [prompts[n] for n in open_rows], [shown[n] for n in open_rows], begun)
            for n, said, text in zip(open_rows, begun, more, strict=True):
                texts[n] = f"{said} {text.strip()}"
        return texts

    def _generate(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Sequence[Message]],
        shown: Sequence[Sequence[Tensor]],
        begun: Sequence[str] | None,
    ) -> list[str]:
        first = rows[0]
        return self._assistant.answer_batch(
            prompts,
            shown,
            first["max_new_tokens"],
            first["temperature"],
            first["top_p"],
            first["seed"],
            begun,
        )

    def _encode(self, pictures: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Sees to the features of all pictures; returns the reason for each that cannot be used, by name."""
        wanted = {_name(picture): picture for picture in pictures}
        for name in wanted:
            if name in self._features:
                self._features.move_to_end(name)
        missing = [name for name in wanted if name not in self._features]
        with ThreadPoolExecutor(max_workers=4) as pool:
            loaded = list(pool.map(lambda name: _load(wanted[name]), missing))
        failures = {
            n: str(found) for n, found in zip(missing, loaded, strict=True) if isinstance(found, BadImage)
        }
        good = [
            (n, found) for n, found in zip(missing, loaded, strict=True) if not isinstance(found, BadImage)
        ]
        features = self._assistant.encode_images([image for _, image in good])
        self._features.update(zip((name for name, _ in good), features, strict=True))
        while len(self._features) > max(_KEPT_PICTURES, len(wanted)):
            self._features.popitem(last=False)
        return failures


def _name(picture: dict[str, Any]) -> str:
    content: bytes | None = picture["content"]
    return str(picture["uri"]) if content is None else hashlib.sha256(content).hexdigest()


def _load(picture: dict[str, Any]) -> Any:
    """The picture, or why it cannot be used."""
    try:
        content = picture["content"]
        data = read_image_bytes(picture["uri"], _MAX_BYTES) if content is None else content
        return decode_image(data, _MAX_PIXELS, _MAX_BYTES)
    except BadImage as error:
        return error


def question_rows(questions: Sequence[Asked], size: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of rows as a replica is given them, for running one in this process."""
    for batch in batches(questions, size):
        yield _table(batch).to_pylist()
