"""The Rayva model folder: everything that answering about pictures needs, and nothing else.

rayva.json               format, vision settings, projector kind and sizes, conversation template
projector.safetensors    W
language/                Hugging Face causal language model and tokenizer
vision/                  the vision tower's folder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rayva.errors import WeightsError
from rayva.model.batch import Batch, Row, collate, expand_images
from rayva.model.generate import Sampling, Written, generate, stream
from rayva.model.language import eos_token_ids, load_language_model, load_tokenizer
from rayva.model.projector import ProjectorKind, build_projector, load_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.text.conversation import Message
from rayva.text.encode import encode_begun, encode_prompt
from rayva.text.image_markers import MarkedImages
from rayva.text.templates import Template, get_template
from rayva.vision.towers import VisionTower, load_tower

FORMAT = "rayva-model-1"


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """How the vision tower in `vision/` is to be run; `digest` proves that it is the trained one's."""

    kind: Literal["clip", "siglip", "efficientnet_lite"]
    layer: int
    image_size: int | None
    aspect: Literal["square", "pad"]
    tokens: int
    hidden: int
    digest: str


@dataclass(frozen=True, slots=True)
class ConversationSettings:
    """The template that stage 2 trained with, and the tokens around each image if there are such."""

    template: str
    system: str | None
    image_markers: tuple[str, str] | None = None

    def build(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template itself."""
        template = get_template(self.template, tokenizer=tokenizer, system=self.system)
        return MarkedImages(template, self.image_markers) if self.image_markers else template


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What rayva.json holds beside the format's name."""

    vision: VisionSettings
    conversation: ConversationSettings
    projector: ProjectorKind

    @classmethod
    def read(cls, folder: Path) -> ModelSettings:
        """Reads `folder`/rayva.json; `WeightsError` where it is missing or not of this format."""
        remedy = "Give the folder that the finetune step wrote (it holds rayva.json)."
        try:
            raw = json.loads((folder / "rayva.json").read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise WeightsError(f"{folder} has the format {raw['format']!r}, expected {FORMAT!r}", remedy)
            return cls(
                vision=VisionSettings(**raw["vision"]),
                conversation=_conversation(raw["conversation"]),
                projector=raw["projector"],
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(f"{folder} is not a Rayva model folder: {error}", remedy) from error

    def write(self, folder: Path) -> None:
        """Writes `folder`/rayva.json."""
        raw = {"format": FORMAT, **asdict(self)}
        (folder / "rayva.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _conversation(raw: dict[str, Any]) -> ConversationSettings:
    markers = raw.get("image_markers")
    if markers is not None:
        before, after = markers
        markers = (str(before), str(after))
    return ConversationSettings(raw["template"], raw["system"], markers)


def save_model_folder(
    folder: Path,
    *,
    language: PreTrainedModel,
    language_state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    projector_state: Mapping[str, Tensor],
    vision: Path,
    settings: ModelSettings,
) -> None:
    """Writes a complete model folder; `vision` is the tower's folder, which is copied.

    The states are given apart from their modules, because under ZeRO 3 a module does not hold its
    weights. Sampling defaults that the base model came with are left out: they are the caller's
    affair, and some of them cannot be saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: getattr(language.config, name, None) for name in ("bos_token_id", "pad_token_id")}
    language.generation_config = GenerationConfig(
        eos_token_id=list(eos_token_ids(language, tokenizer)), **ids
    )
    language.save_pretrained(folder / "language", state_dict=dict(language_state))
    tokenizer.save_pretrained(folder / "language")
    save_projector(projector_state, folder / "projector.safetensors")
    shutil.copytree(vision, folder / "vision", dirs_exist_ok=True)
    settings.write(folder)


def save_projector(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes W as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


@dataclass(frozen=True, slots=True)
class Assistant:
    """A model that answers: tower, projector, language model, tokenizer and template together."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tower: VisionTower
    model: VisionLanguageModel
    device: torch.device
    settings: ModelSettings

    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Visual features [N, D] of each picture, on the CPU."""
        if not images:
            return []
        features_BND = self.tower.encode(self.tower.preprocess(list(images)).to(self.device))
        return list(features_BND.float().cpu())

    def answer_batch(
        self,
        prompts: Sequence[Sequence[Message]],
        features: Sequence[Sequence[Tensor]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        begun: Sequence[str] | None = None,
    ) -> list[str]:
        """Answers each conversation; `features[i]` holds [N, D] for each image of `prompts[i]`, in order.

        Where `begun[i]` is not empty, the assistant has already said that and goes on from there.
        Raises `ImageCountError` where a conversation's images and features differ in number.
        """
        if not prompts:
            return []
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed)
        batch = self._batch(prompts, features, begun)
        return generate(self.model, batch, sampling, self.tokenizer)

    def stream(
        self,
        prompt: Sequence[Message],
        features: Sequence[Tensor],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Written]:
        """One answer, piece by piece."""
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed)
        return stream(self.model, self._batch([prompt], [features]), sampling, self.tokenizer)

    def prompt_length(self, prompt: Sequence[Message]) -> int:
        """Positions that a conversation takes, image tokens included."""
        ids = encode_prompt(list(prompt), self.template, self.tokenizer)
        return len(expand_images(ids, None, self.settings.vision.tokens)[0])

    def _batch(
        self,
        prompts: Sequence[Sequence[Message]],
        features: Sequence[Sequence[Tensor]],
        begun: Sequence[str] | None = None,
    ) -> Batch:
        rows = []
        for prompt, images, said in zip(prompts, features, begun or [""] * len(prompts), strict=True):
            if said:
                ids = encode_begun(list(prompt), said, self.template, self.tokenizer)
            else:
                ids = encode_prompt(list(prompt), self.template, self.tokenizer)
            ids, labels = expand_images(ids, None, self.settings.vision.tokens)
            rows.append(Row(ids, labels, torch.cat(list(images)) if images else None))
        return collate(rows, self.model.vision_hidden, left=True).to(self.device)

    def _sampling(self, max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=self.template.stop,
            eos_ids=eos_token_ids(self.model.language, self.tokenizer),
        )


def load_assistant(
    path: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Assistant:
    """Loads a Rayva model folder for answering.

    Raises `WeightsError` where a part is missing or damaged, or where the vision tower is not the one
    that the model was trained with.
    """
    path, device = Path(path), torch.device(device)
    settings = ModelSettings.read(path)
    vision = settings.vision
    tower = load_tower(
        str(path / "vision"),
        kind=vision.kind,
        layer=vision.layer,
        image_size=vision.image_size,
        aspect=vision.aspect,
        device=str(device),
        dtype=dtype,
    )
    if tower.digest != vision.digest:
        raise WeightsError(
            f"The vision tower in {path / 'vision'} is not the one that the model was trained with",
            "Restore the folder from the finetune step's output; do not exchange the tower.",
        )
    language = load_language_model(str(path / "language"), dtype)
    tokenizer = load_tokenizer(str(path / "language"))
    projector = build_projector(settings.projector, vision.hidden, language.config.hidden_size)
    load_projector(projector, path / "projector.safetensors")
    model = VisionLanguageModel(language, projector.to(dtype)).to(device).eval()
    template = settings.conversation.build(tokenizer)
    return Assistant(tokenizer, template, tower, model, device, settings)
