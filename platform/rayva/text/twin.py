"""A twin of a tokenizer in which text can never become a control token.

The twin has the same ids, but its control tokens are called by secret names, drawn anew in each
process. Markup names them by those; text cannot. Everything else (merges, normalisation, the
prefix space after a control token or not) is the tokenizer's own.
"""

from __future__ import annotations

import json
import re
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from rayva.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKUP_LIKE = re.compile(r"<\S+>|\[[A-Z_/]+\]")
_NONCE = secrets.token_hex(8)


def _secret_name(token_id: int | str) -> str:
    # Brackets that are neither word characters, nor spaces, nor changed by Unicode normalisation.
    return f"\u27e6{_NONCE}-{token_id}\u27e7"


class TokenizerTwin:
    """Encodes text in which secret names, and only they, are control tokens.

    Attributes:
        prefix_ids: what the tokenizer puts in front of any text (often BOS, often nothing).
        control_ids: ids that text can never become.
        bos, eos: secret names of those tokens; None where the tokenizer has none.
        strips: whether some control token swallows the white space beside it.
        size: length of the vocabulary it was made from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise WeightsError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no fast form",
                "labels need its character offsets: use a folder with a tokenizer.json",
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        controls = _control_tokens(spec, set(tokenizer.all_special_tokens))
        self._names = {text: _secret_name(token_id) for text, token_id in controls.items()}
        self.control_ids = frozenset(controls.values())
        self.strips = any(
            token["content"] in controls and (token["lstrip"] or token["rstrip"])
            for token in spec["added_tokens"]
        )
        self.boundary = _secret_name("boundary")
        self._backend = _renamed(spec, self._names)
        self._backend.add_special_tokens([AddedToken(self.boundary, normalized=False, special=True)])
        self.boundary_id = self._backend.token_to_id(self.boundary)
        self._check(controls)
        self.size = len(tokenizer)
        self.bos_token, self.eos_token = tokenizer.bos_token, tokenizer.eos_token
        self.bos = self._names.get(tokenizer.bos_token)
        self.eos = self._names.get(tokenizer.eos_token)
        self.prefix_ids = _prefix_ids(tokenizer)
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.markup = lru_cache(maxsize=256)(self._markup)

    def _markup(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: self._names[found[0]], text)

    def first_control_end(self, markup: str) -> int:
        """Where the first control token named in `markup` ends; its length if it names none."""
        found = self._pattern.search(markup) if self._pattern else None
        return found.end() if found else len(markup)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` and the characters [start, end) that each stands for; nothing is added."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def is_current(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokenizer still is what this twin was made from."""
        same_ends = tokenizer.bos_token == self.bos_token and tokenizer.eos_token == self.eos_token
        return same_ends and len(tokenizer) == self.size

    def _check(self, controls: dict[str, int]) -> None:
        for text, token_id in controls.items():
            name = self._names[text]
            # In mid-text too: some normalisers change a token only there, or only at the beginning.
            if self.encode(name)[0] != [token_id] or token_id not in self.encode(f"a{name}a")[0]:
                raise WeightsError(
                    f'the control token "{text}" of this tokenizer is changed by its own normaliser',
                    "declare it with normalized=false in tokenizer.json",
                )


_twins: WeakKeyDictionary[PreTrainedTokenizerBase, TokenizerTwin] = WeakKeyDictionary()


def twin_of(tokenizer: PreTrainedTokenizerBase) -> TokenizerTwin:
    """The tokenizer's twin, made once and remade when the tokenizer gains tokens.

    Raises:
        WeightsError: the tokenizer has no fast form, or its files contradict each other.
    """
    twin = _twins.get(tokenizer)
    if twin is None or not twin.is_current(tokenizer):
        twin = _twins[tokenizer] = _make(tokenizer)
    return twin


def _make(tokenizer: PreTrainedTokenizerBase) -> TokenizerTwin:
    try:
        return TokenizerTwin(tokenizer)
    except WeightsError:
        raise
    except BaseException as error:
        # The tokenizers library raises the base class itself, and panics with what is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeightsError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} cannot be used: {why}",
            "its tokenizer.json and tokenizer_config.json must be whole and belong together",
        ) from error


def _control_tokens(spec: dict[str, Any], special: set[str]) -> dict[str, int]:
    """Added tokens that steer the model: declared special, or written like markup.

    The others (runs of spaces, words that somebody added) are ordinary text.
    """
    return {
        token["content"]: token["id"]
        for token in spec["added_tokens"]
        if token["special"] or token["content"] in special or _MARKUP_LIKE.fullmatch(token["content"])
    }


def _renamed(spec: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """The tokenizer of `spec` with its control tokens renamed, and without what it adds around a text."""
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            # Found in the text as it stands: a normaliser that begins every text with a space would give
            # the name one too, and then it is found at a text's beginning alone.
            token["normalized"] = token["single_word"] = False
    # Without post-processor the offsets of a token also keep the space in front of its word.
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts in front of a text, found by asking it."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False).input_ids
    whole = tokenizer(probe).input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    raise WeightsError("the tokenizer changes a text when it adds special tokens to it")
