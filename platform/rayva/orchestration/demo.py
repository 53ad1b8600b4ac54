"""The end of the demo: the served model is asked about a picture that it has never seen."""

from __future__ import annotations

import io
import socket
from dataclasses import dataclass

from PIL import Image

from rayva.data.schema import ImageRecord, Question
from rayva.data.tables import read_records
from rayva.errors import ServingError
from rayva.orchestration.console import serving_recipe
from rayva.orchestration.summary import record_served
from rayva.recipes.schema import Serving
from rayva.serving.client import ChatClient, user_message
from rayva.steps import read_summary
from rayva.storage import Storage

QUESTIONS = 3
_FOLDER = "demo"
_ENLARGED_SIDE = 512


@dataclass(frozen=True)
class Exam:
    """A held-out picture (an encoded file) and questions about it with their accepted answers."""

    picture: bytes
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def choose_exam(storage: Storage, data_folder: str) -> Exam:
    """The first held-out picture that there are enough questions of different kinds about.

    Raises:
        ServingError: the run holds no such picture.
    """
    by_image: dict[str, dict[str, Question]] = {}
    questions = read_records(storage, f"{data_folder}/questions.parquet", Question)
    for question in sorted(questions, key=lambda question: question.question_id):
        by_image.setdefault(question.image_id, {}).setdefault(question.kind, question)
    suited = {image_id: kinds for image_id, kinds in by_image.items() if len(kinds) >= QUESTIONS}
    for image in read_records(storage, f"{data_folder}/images.parquet", ImageRecord):
        if image.image_id in suited and image.split == "test" and image.content is not None:
            chosen = list(suited[image.image_id].values())[:QUESTIONS]
            return Exam(image.content, tuple((each.question, each.accepted) for each in chosen))
    raise ServingError(f"{data_folder} holds no test picture with {QUESTIONS} kinds of questions")


def write_picture(storage: Storage, picture: bytes) -> tuple[str, str]:
    """Writes the picture as PNG, as it is and enlarged for people; returns both paths."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    factor = max(1, _ENLARGED_SIDE // max(image.size))
    enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    paths = []
    for name, version in (("picture.png", image), ("picture-enlarged.png", enlarged)):
        file = io.BytesIO()
        version.save(file, "PNG")
        storage.write_bytes(f"{_FOLDER}/{name}", file.getvalue())
        paths.append(storage.uri(_FOLDER, name))
    return paths[0], paths[1]


def ask_served_model(storage: Storage, serving: Serving) -> list[str]:
    """Serves the run's model, asks it, records picture and answers in the summary; returns lines to show."""
    from rayva.orchestration.endpoint import running_endpoint
    from rayva.orchestration.startup import start_ray, stop_ray

    summary = read_summary(storage)
    # By its name alone: the run may have been moved since.
    data_folder = f"steps/{summary['stages']['data']['folder'].rpartition('/')[2]}"
    exam = choose_exam(storage, data_folder)
    plain, enlarged = write_picture(storage, exam.picture)
    serving = serving.model_copy(update={"port": free_port(serving.host)})
    start_ray(serving_recipe(serving), storage)
    try:
        with running_endpoint({"model": storage.root}, serving) as url:
            client = ChatClient(url)
            [model] = client.models()
            answers = [
                "".join(client.stream(model, [user_message(question, [exam.picture])]))
                for question, _ in exam.questions
            ]
    finally:
        stop_ray()
    asked = [question for question, _ in exam.questions]
    record_served(
        storage,
        plain,
        [{"question": question, "answer": answer} for question, answer in zip(asked, answers, strict=True)],
    )
    lines = [f"A picture that the model has never seen: {enlarged}"]
    for (question, accepted), answer in zip(exam.questions, answers, strict=True):
        lines += [f"  {question}", f"    {answer}  (right: {' or '.join(accepted)})"]
    return lines


def free_port(host: str) -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
