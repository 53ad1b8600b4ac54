"""The rule on descriptions that are no language at all: markup, errors in JSON, random keys."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import Pair

_MARKUP = re.compile(
    r"\A(?:\{\s*[\"'}]|\[\s*[{\"]|<(?:!doctype|\?xml|html|head|body|div|p|pre|h\d)\b)|</(?:html|body|div)>",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\blorem ipsum\b", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]+")
_TOKENS = re.compile(r"\S+")
_FUNCTION_TEXT = """
a an the of and in on is are was were with to at by for from it its there this that his her their as
or but not be been has have will can he she they you we one two these those which who while when each
other some what
der die das den dem ein eine einen einem einer und ist sind im am auf mit zu von vor neben
de het een en op met van zijn staat naast voor
le la les un une des du et est sont dans sur avec au aux qui
el los las una unos y con del al por que hay esta
o os as um uma e em no na do da dos das com ao
il lo gli uno di nel nella sul sulla che i amb
en ett och med av som till er det og et til
i w z na do jest oraz przy obok pod nad je ve v se s u su pri za
si cu pe la sunt este
bir ve ile bu da var yang dan di ini itu dengan sebuah seekor adalah ada pada ke
ang ng sa mga ay isang at may na ya wa kwa ni katika
ja on ovat joka kun se mis ning az egy es van
"""
"""English; German; Dutch; French; Spanish; Portuguese; Italian, Catalan; Swedish, Norwegian, Danish; Polish,
Czech, Croatian and their kin; Romanian; Turkish, Indonesian and Malay; Tagalog and Swahili; Finnish, Estonian
and Hungarian. Most others come with letters that are not ASCII."""
_FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
"""Words that hardly a text does without."""
_FEWEST_FUNCTION_WORDS = 1 / 20


def nonsense(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Markup or a placeholder; of descriptions also what is no language and says no word of its context."""
    if kind == "conversation":  # its answers may be a name, a number or what is written on a sign
        return None
    for pair in pairs:
        for pattern in (_MARKUP, _PLACEHOLDER):
            if (found := pattern.search(pair.answer)) and not _told(pattern, context):
                return found[0]
        if kind == "detail" and _is_gibberish(pair.answer, context):
            return pair.answer[:80]
    return None


def _told(pattern: re.Pattern[str], context: Context) -> bool:
    return any(pattern.search(caption) for caption in context.captions)


def _is_gibberish(text: str, context: Context) -> bool:
    """Almost no function words of any language, and nothing of the context; other scripts are not judged."""
    words = [word.lower() for word in _LETTERS.findall(text)]
    if not text.isascii():
        return False
    if words and _content(words) & _content(_context_words(context)):
        return False
    told = sum(word in _FUNCTION_WORDS for word in words)
    return told < _FEWEST_FUNCTION_WORDS * len(_TOKENS.findall(text))


def _context_words(context: Context) -> list[str]:
    said = (*context.captions, *(instance.category for instance in context.instances), *context.crowds)
    return [word.lower() for text in said for word in _LETTERS.findall(text)]


def _content(words: Sequence[str]) -> set[str]:
    """Words that mean something, in the singular as far as an "s" tells."""
    return {word.removesuffix("s") for word in words if len(word) > 2 and word not in _FUNCTION_WORDS}
