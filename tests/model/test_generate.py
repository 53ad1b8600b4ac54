"""Generation: the same tokens as Hugging Face's, in batches, with stop strings, and piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rayva.errors import WeightsError
from rayva.model.batch import Batch, Row, collate, expand_images
from rayva.model.folder import Assistant, ModelSettings, load_assistant
from rayva.model.generate import Sampling, choose, cut_at_stop, generate, generate_ids, stream
from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IMAGE_TOKEN_INDEX
from tests.export.tiny_model import make_model_folder

QUESTIONS = ["what colour is the circle?", "where?", "is a large red circle left of it or not?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("assistant"))


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return load_assistant(folder)


def _picture(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def _prompts() -> list[list[Message]]:
    return [[Message("user", (IMAGE, f"\n{question}"))] for question in QUESTIONS]


def _batch(assistant: Assistant) -> Batch:
    features = [assistant.encode_images([_picture(c)]) for c in ("red", "blue", "white")]
    return assistant._batch(_prompts(), features)


def test_greedy_equals_hugging_face(assistant: Assistant) -> None:
    batch = _batch(assistant)
    with torch.inference_mode():
        expected = assistant.model.language.generate(
            inputs_embeds=assistant.model.embed(batch),
            attention_mask=batch.attention_mask_BT,
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=2,
            pad_token_id=0,
        )
    produced = generate_ids(assistant.model, batch, Sampling(max_new_tokens=16, eos_ids=(2,)))
    for tokens, wanted in zip(produced, expected.tolist(), strict=True):
        ended = wanted.index(2) if 2 in wanted else len(wanted)
        assert tokens == wanted[:ended]


def test_answers_in_a_batch_equal_answers_alone(assistant: Assistant) -> None:
    features = [assistant.encode_images([_picture(c)]) for c in ("red", "blue", "white")]
    together = assistant.answer_batch(_prompts(), features, max_new_tokens=12)
    alone = [
        assistant.answer_batch([prompt], [feature], max_new_tokens=12)[0]
        for prompt, feature in zip(_prompts(), features, strict=True)
    ]
    assert together == alone
    assert assistant.answer_batch([], [], max_new_tokens=4) == []


def test_questions_with_and_without_images_share_a_batch(assistant: Assistant) -> None:
    text_only = [Message("user", ("where?",))]
    picture = assistant.encode_images([_picture("red")])
    answers = assistant.answer_batch([text_only, _prompts()[0]], [[], picture], max_new_tokens=6)
    assert answers[0] == assistant.answer_batch([text_only], [[]], max_new_tokens=6)[0]
    assert answers[1] == assistant.answer_batch(_prompts()[:1], [picture], max_new_tokens=6)[0]


def test_a_row_ends_where_the_context_does_and_the_others_go_on(assistant: Assistant) -> None:
    assert assistant.model.context == 512
    long, short = (Row([1] + [40] * more, [-100] * (more + 1), None) for more in (507, 3))
    rows = [collate([row], assistant.model.vision_hidden, left=True) for row in (long, short)]
    both = collate([long, short], assistant.model.vision_hidden, left=True)
    together = generate_ids(assistant.model, both, Sampling(max_new_tokens=16))
    assert [len(row) for row in together] == [4, 16]
    alone = [generate_ids(assistant.model, row, Sampling(max_new_tokens=16))[0] for row in rows]
    assert together == alone


def test_stop_strings_end_an_answer_and_are_cut_off(assistant: Assistant) -> None:
    batch = _batch(assistant)
    (free, *_) = generate(assistant.model, batch, Sampling(max_new_tokens=16), assistant.tokenizer)
    stop = free[5:7]
    sampling = Sampling(max_new_tokens=16, stop=(stop,))
    (cut, *_) = generate(assistant.model, batch, sampling, assistant.tokenizer)
    assert cut == free[: free.index(stop)]
    assert cut_at_stop("one###two##", ("###", "##")) == "one"


@pytest.mark.parametrize("stops", [False, True])
def test_streamed_pieces_add_up_to_the_answer(assistant: Assistant, stops: bool) -> None:
    row = collate([Row([1, 40, 41], [-100] * 3, None)], assistant.model.vision_hidden, left=True)
    free = generate(assistant.model, row, Sampling(max_new_tokens=20), assistant.tokenizer)[0]
    sampling = Sampling(max_new_tokens=20, stop=(free[4:6],) if stops else ())
    pieces = list(stream(assistant.model, row, sampling, assistant.tokenizer))
    assert "".join(p.text for p in pieces) == generate(assistant.model, row, sampling, assistant.tokenizer)[0]
    assert len(pieces) > 1
    assert all(piece.text and piece.finish is None for piece in pieces[:-1])
    assert pieces[-1].finish == ("stop" if stops else "length")
    assert pieces[-1].tokens == 20 or stops


def test_sampling_is_reproducible_and_keeps_to_the_nucleus(assistant: Assistant) -> None:
    batch = _batch(assistant)
    warm = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
    first = generate_ids(assistant.model, batch, warm)
    assert first == generate_ids(assistant.model, batch, warm)
    assert first != generate_ids(assistant.model, batch, Sampling(8, temperature=1.5, seed=4))
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(500, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits, Sampling(temperature=1.0, top_p=0.7), generator)
    assert set(drawn.tolist()) == {0, 1}
    assert 0.5 < float((drawn == 0).float().mean()) < 0.75


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1e-38), Sampling(temperature=1e-6), Sampling(temperature=1, top_p=1e-300)],
)
def test_sampling_at_its_lowest_takes_the_likeliest(sampling: Sampling) -> None:
    logits = torch.tensor([[-60.0, 80.0, 79.0], [3.0, 1.0, 2.0]]).repeat(50, 1)
    drawn = choose(logits, sampling, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, logits.argmax(dim=-1))


def test_the_image_reaches_the_answer(assistant: Assistant) -> None:
    red, blue = (assistant.encode_images([_picture(c)])[0] for c in ("red", "blue"))
    assert red.shape == (assistant.settings.vision.tokens, assistant.settings.vision.hidden)
    hidden = []
    for feature in (red, blue):
        batch = assistant._batch(_prompts()[:1], [[feature]])
        hidden.append(assistant.model.forward_hidden(batch)[0, -1])
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-4)


def test_prompt_length_counts_image_tokens(assistant: Assistant) -> None:
    prompt = _prompts()[0]
    batch = assistant._batch([prompt], [assistant.encode_images([_picture("red")])])
    assert assistant.prompt_length(prompt) == batch.input_ids_BT.shape[1]
    ids, _ = expand_images([IMAGE_TOKEN_INDEX], None, assistant.settings.vision.tokens)
    assert int((batch.input_ids_BT == IMAGE_TOKEN_INDEX).sum()) == len(ids)


def test_a_folder_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a Rayva model folder"):
        load_assistant(tmp_path)
    (tmp_path / "rayva.json").write_text('{"format": "other"}')
    with pytest.raises(WeightsError, match="format 'other'"):
        ModelSettings.read(tmp_path)


def test_another_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings.read(folder)
    assert settings == ModelSettings.read(folder)
    copy = tmp_path / "model"
    copy.mkdir()
    for part in ("language", "vision", "projector.safetensors"):
        (copy / part).symlink_to(folder / part)
    text = (folder / "rayva.json").read_text()
    (copy / "rayva.json").write_text(text.replace(settings.vision.digest, "0" * 64))
    with pytest.raises(WeightsError, match="not the one"):
        load_assistant(copy)
