"""The language model of an imported checkpoint: its configuration, its tensors, its tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rayva.errors import WeightsError
from rayva.model.checkpoint import LazyTensor, Tensors, check_part, load_each, read_json
from rayva.model.language import load_tokenizer, refuse_changed_logits
from rayva.model.shards import CheckpointWriter, write_json
from rayva.text.twin import twin_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these makes a folder one of a tokenizer."""
_COPIED = (
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""Model types of the original code, and the language model in each."""
_MULTIMODAL = (
    "mm_", "image_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "pretrain_mm_", "tokenizer_",
    "vision_tower", "rayva_", "auto_map", "_", "attn_implementation", "transformers_version",
    "architectures", "torch_dtype", "dtype", "quantization_config",
)  # fmt: skip
"""Beginnings of the config keys that are not the language model's own, that are written anew, or that
could name code (`auto_map`, kernels of the hub as `attn_implementation`)."""
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim",
)  # fmt: skip
_MOST = 2**31
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Ends of the names of numbers that old checkpoints store and models compute themselves."""
_PROBES = (
    "USER: What's in it?  It's 2024,\n\nnot 1999.\tI DON'T know\u2026",
    " caf\u00e9 cafe\u0301 \u4f60\u597d \u0434\u0430 \u0645\u0631\u062d \ufb01 \U0001f600\u200d",
    "def f(x):\r\n    return x[0] + 1  # ok\n",
)
"""Texts that tokenizers differ in: spaces, line breaks, digits, apostrophes, accents, scripts, code."""
_REMEDY = "fetch or save the checkpoint again"


@dataclass(frozen=True)
class LanguagePart:
    """A causal language model, described but not read yet.

    Attributes:
        config: its config.json, and `config_file`, where that was found.
        tensors: by their Hugging Face names, as far as the checkpoint has them.
        where: names the weight files in complaints.
    """

    config: dict[str, Any]
    config_file: Path
    tensors: Tensors
    where: str

    @property
    def hidden(self) -> int:
        """H, the embedding size."""
        return count(self.config, "hidden_size", self.config_file)


def count(config: Mapping[str, Any], key: str, file: Path) -> int:
    """A positive whole number of a configuration; `WeightsError` where it is none."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST:
        raise WeightsError(f"{file}: {key} is {value!r}, expected a positive whole number", _REMEDY)
    return value


def language_config(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The language model's own part of a LLaVA's (or of its own) config.json.

    Raises:
        WeightsError: a model type that there is no language model for, or a size that is none.
    """
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str):
        raise WeightsError(f"{file}: model_type is {kind!r}, expected a name", _REMEDY)
    if kind.startswith("llava") and kind not in _ORIGINAL_TYPES:
        raise WeightsError(
            f"{file}: model_type {kind} is none of LLaVA v0 to 1.5 ({', '.join(_ORIGINAL_TYPES)})",
            "import one of those",
        )
    if raw.get("quantization_config"):
        raise WeightsError(
            f"{file}: quantization_config: quantized weights cannot be imported", "import the full precision"
        )
    own = {key: value for key, value in raw.items() if not key.startswith(_MULTIMODAL)}
    for key in _COUNTS:
        if own.get(key) is not None:
            count(own, key, file)
    return {**own, "model_type": _ORIGINAL_TYPES.get(kind, kind)}


def is_original_type(raw: Mapping[str, Any]) -> bool:
    """Whether config.json is that of the original code's LLaVA, judged by its keys."""
    kind = raw.get("model_type")
    named = isinstance(kind, str) and kind.startswith("llava") and "text_config" not in raw
    return named or any(key.startswith("mm_") for key in raw)


def check_language(part: LanguagePart) -> LanguagePart:
    """Checks every tensor against the architecture, and drops what the model computes or ties itself.

    Raises:
        WeightsError: a tensor that is missing, unknown, or of another shape or precision.
    """
    model = _skeleton(part)
    refuse_changed_logits(str(part.config_file), model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {n: t for n, t in part.tensors.items() if n in expected or not n.endswith(_BUFFERS)}
    if model.config.tie_word_embeddings:
        head = _name_of(model, model.get_output_embeddings())
        table = _name_of(model, model.get_input_embeddings())
        del expected[head]
        if head in tensors and table in tensors:
            _require_equal(tensors[head], tensors[table], part.config_file)
        tensors.pop(head, None)
    check_part("language model", tensors, expected, part.where, str(part.config_file))
    dtype = next(iter(tensors.values())).dtype
    config = {
        **part.config,
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(model.config.tie_word_embeddings),
    }
    return replace(part, tensors=tensors, config=config)


def _skeleton(part: LanguagePart) -> PreTrainedModel:
    """The model without memory for its weights."""
    layers = max(
        [value for key, value in part.config.items() if "layers" in key and isinstance(value, int)],
        default=0,
    )
    experts = max([v for k, v in part.config.items() if "experts" in k and isinstance(v, int)], default=0)
    if max(layers, experts) > max(len(part.tensors), 1024):
        raise WeightsError(
            f"{part.config_file}: num_hidden_layers: {max(layers, experts)} layers or experts, "
            f"but {part.where} holds {len(part.tensors)} tensors",
            _REMEDY,
        )
    try:
        settings = {key: value for key, value in part.config.items() if key != "model_type"}
        config = AutoConfig.for_model(part.config["model_type"], **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library's checks, and what they overlook, fail in many ways
        raise WeightsError(
            f"{part.config_file} describes no language model that can be built: {first_line(error)}",
            "the file must be the config.json of a causal language model that transformers knows",
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, short."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def _name_of(model: PreTrainedModel, module: torch.nn.Module) -> str:
    name: str = next(name for name, found in model.named_modules() if found is module)
    return f"{name}.weight"


def _require_equal(head: LazyTensor, table: LazyTensor, config_file: Path) -> None:
    if head.shape != table.shape or not torch.equal(head.load(), table.load()):
        raise WeightsError(
            f"{head.where} differs from {table.key}, though {config_file} says tie_word_embeddings",
            "set tie_word_embeddings to what the weights are",
        )


def find_tokenizer(*folders: Path | None) -> Path:
    """The first of `folders` that holds a tokenizer; `WeightsError` where none does."""
    given = [folder for folder in folders if folder is not None]
    for folder in given:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise WeightsError(
        f"no tokenizer in {' or '.join(str(folder) for folder in given)} (none of "
        f"{', '.join(TOKENIZER_FILES)})",
        "name its folder with --tokenizer",
    )


def write_tokenizer(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    added: tuple[str, ...] = (),
    hugging_face: bool = False,
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Copies a tokenizer's files, adds control tokens, tells which it lacked, and proves that it loads.

    Args:
        config: of the language model; transformers chooses a tokenizer's class by the model_type beside it.
        hugging_face: whether the checkpoint was made for transformers, which takes tokenizer.json as it
            stands there. Original checkpoints were trained with the language model's own class.
    """
    copied = [name for name in _COPIED if (source / name).is_file()]
    for name in copied:
        if name.endswith(".json"):
            read_json(source / name)
        shutil.copyfile(source / name, target / name)
    write_json(target / "config.json", config)
    try:
        tokenizer = _usable(target)
        if hugging_face and "tokenizer.json" in copied:
            tokenizer = _with_the_same_ids(_usable(source), tokenizer, target)
    except WeightsError as error:
        raise WeightsError(
            f"{source}: {', '.join(copied)} are no tokenizer: {error.what.replace(str(target), str(source))}",
            "fetch the tokenizer again, or name another one's folder with --tokenizer",
        ) from error
    missing = [token for token in added if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        tokenizer.save_pretrained(target)
    return tokenizer, missing


def _usable(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(folder))
    twin_of(tokenizer)
    return tokenizer


def _with_the_same_ids(
    own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, target: Path
) -> PreTrainedTokenizerBase:
    """`tokenizer`, of `target`, or one there that encodes as `own`, the checkpoint's, does where it lies.

    Beside another config.json the same files may be loaded as another class, with another normaliser:
    then what `own` is made of is written to `target`, to be taken as it stands.
    """
    if _probed(tokenizer) == _probed(own):
        return tokenizer
    own.save_pretrained(target)
    file = target / "tokenizer_config.json"
    write_json(file, {**read_json(file), "tokenizer_class": PreTrainedTokenizerFast.__name__})
    tokenizer = _usable(target)
    if _probed(tokenizer) != _probed(own):
        raise WeightsError("loaded beside the language model alone, it encodes texts in another way")
    return tokenizer


def _probed(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What tells two tokenizers apart: their own names, and their ids of texts of many kinds."""
    ends = tokenizer.bos_token or "", tokenizer.eos_token or ""
    texts = (*_PROBES, _PROBES[0].join(ends), f"a{ends[1]}b {ends[0]} c\n{ends[1]}")
    return [len(tokenizer), *ends, *(tokenizer(text).input_ids for text in texts)]


def write_language(
    part: LanguagePart, target: Path, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any]
) -> None:
    """Writes config.json, generation_config.json and the weights.

    Raises:
        WeightsError: the tokenizer has more tokens than the embedding has rows.
    """
    rows = count(part.config, "vocab_size", part.config_file)
    if len(tokenizer) > rows:
        raise WeightsError(
            f"{part.config_file}: vocab_size is {rows}, but the tokenizer has {len(tokenizer)} tokens",
            "give the tokenizer that the model was trained with (--tokenizer)",
        )
    write_json(target / "config.json", part.config)
    write_json(target / "generation_config.json", _end_tokens(part, generation, rows))
    writer = CheckpointWriter(target)
    writer.add(load_each(part.tensors, "language model"))
    writer.finish()


def generation_settings(*folders: Path | None) -> dict[str, Any]:
    """generation_config.json of the first folder that has one."""
    for folder in folders:
        if folder is not None and (folder / "generation_config.json").is_file():
            return read_json(folder / "generation_config.json")
    return {}


def _end_tokens(part: LanguagePart, generation: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Where answers begin and end; sampling defaults of the checkpoint are the caller's affair."""
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(key, part.config.get(key))
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < rows for i in ids):
            found[key] = value
    return found


def with_marker_rows(
    part: LanguagePart, ids: Sequence[int], fresh: bool, tokens: int, table_VH: Tensor | None
) -> LanguagePart:
    """The model with trained rows for the tokens `ids` around images, which its base does not know.

    Args:
        fresh: whether the tokens are new to the tokenizer; spare rows of the base are then no rows of theirs.
        tokens: of the tokenizer; the tables grow where they have fewer rows.
        table_VH: the trained embeddings as stage 1 stored them: of the two tokens alone, or of all.

    New rows that nobody trained, those of the LM head among them, are the mean of the rows before them, as
    in the original code.

    Raises:
        WeightsError: the embedding has another name than that of Llama and its kin.
    """
    if EMBEDDING not in part.tensors:
        raise WeightsError(
            f"{part.config_file}: a {part.config['model_type']} model, whose embedding is not called "
            f"{EMBEDDING}, cannot take rows for new tokens",
            "give the base that the projector was trained with",
        )
    before = count(part.config, "vocab_size", part.config_file)
    rows = max(before, tokens)
    new = [*(ids if fresh else ()), *range(before, rows)]
    trained = None if table_VH is None else _trained_rows(table_VH, ids, fresh, part.tensors[EMBEDDING])
    tensors = dict(part.tensors)
    if trained is not None or new:
        tensors[EMBEDDING] = _with_rows(tensors[EMBEDDING], rows, new, ids, trained)
    if HEAD in tensors and new:
        tensors[HEAD] = _with_rows(tensors[HEAD], rows, new, (), None)
    return replace(part, tensors=tensors, config={**part.config, "vocab_size": rows})


def _trained_rows(table_VH: Tensor, ids: Sequence[int], fresh: bool, base: LazyTensor) -> Tensor:
    """The rows of the tokens `ids` in what stage 1 stored.

    The original adds the tokens and cuts or extends the table to the tokenizer's size: they are its last
    rows. They stand at their ids where the tokenizer had them before, or where a table of the base's size
    ends in the base's own spare rows.
    """
    last = slice(len(table_VH) - len(ids), None)
    by_id = not fresh
    if fresh and len(table_VH) == base.shape[0]:
        by_id = torch.equal(table_VH[last].to(base.dtype), base.load()[last])
    if by_id and len(ids) < len(table_VH) and max(ids) < len(table_VH):
        return table_VH[list(ids)]
    return table_VH[last]


def _with_rows(
    tensor: LazyTensor, rows: int, new: Sequence[int], ids: Sequence[int], trained_RH: Tensor | None
) -> LazyTensor:
    def read() -> Tensor:
        weight_VH = tensor.load()
        grown_VH = weight_VH.new_empty(rows, *weight_VH.shape[1:])
        grown_VH[: len(weight_VH)] = weight_VH
        if new:
            grown_VH[list(new)] = weight_VH[: min(new)].float().mean(dim=0).to(weight_VH.dtype)
        if trained_RH is not None:
            grown_VH[list(ids)] = trained_RH.to(weight_VH.dtype)
        return grown_VH

    return replace(tensor, read=read, shape=(rows, *tensor.shape[1:]))
