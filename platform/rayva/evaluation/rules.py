"""What a judge is told: rules by category, and the layout of the original's review prompt.

The rules here are our own wording of what the original asks for; `--rules` reads a file in its format,
{category: {role, prompt}}, and takes that instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayva.errors import DataError
from rayva.evaluation.reading import as_id, as_object, as_text, read_document, read_rows

SYSTEM = "You are a fair and exact examiner. You compare answers and grade how good each one is."
_TASK = (
    "Grade the two answers above to the user's question. The user was looking at an image; you are given "
    "{seen} instead of it.\nJudge how helpful, relevant, correct and detailed each answer is, and give each "
    "a score from 1 to 10, where more is better.\nYour first line must hold nothing but the two scores, for "
    "{role} 1 and {role} 2 in this order, with a space between them.\nFrom the second line on, explain the "
    "scores. Do not let the order of the answers, or their length alone, decide."
)
_BOXES = (
    "sentences that describe it, and the objects in it with their boxes (x1, y1, x2, y2), as shares of "
    "width and height from the top left corner,"
)
_CAPTION = "a description of it"
_ROLE = "Assistant"
WILD = "llava_bench_"
"""Prefix of the categories of LLaVA-Bench (in the wild), as the original's rule file has them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How the answers are called in the prompt, and what is asked about them."""

    role: str
    prompt: str


_COCO_RULE = Rule(_ROLE, _TASK.format(seen=_BOXES, role=_ROLE))
_WILD_RULE = Rule(_ROLE, _TASK.format(seen=_CAPTION, role=_ROLE))
BUILT_IN: dict[str, Rule] = {
    **dict.fromkeys(("conv", "detail", "complex", "default"), _COCO_RULE),
    **{WILD + category: _WILD_RULE for category in ("conv", "detail", "complex")},
}


@dataclass(frozen=True, slots=True)
class Context:
    """What stands for the image: sentences, and objects with normalised boxes (none in the wild)."""

    sentences: tuple[str, ...]
    boxes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        sentences = "\n".join(self.sentences)
        return sentences + ("\n\n" + "\n".join(self.boxes) if self.boxes else "")


def read_rules(path: str | None) -> dict[str, Rule]:
    """Rules of a file in the original's format; the built-in ones without a file.

    Raises:
        DataError: the file is missing, cut, or has no rules in it.
    """
    if path is None:
        return BUILT_IN
    rules = {}
    for category, value in as_object(read_document(path, "--rules"), path).items():
        where = f"{path}: {category}"
        row = as_object(value, where)
        role, prompt = (as_text(row.get(name), f"{where}: {name}") for name in ("role", "prompt"))
        rules[category] = Rule(role, prompt)
    if not rules:
        raise DataError(f"{path} has no rules", "give {category: {role, prompt}}")
    return rules


def rule_for(rules: Mapping[str, Rule], category: str, context: Context) -> tuple[str, Rule]:
    """The key and the rule for a question's category; without boxes, that of the wild benchmark.

    Raises:
        DataError: the file has neither the category nor `default`.
    """
    plain = category.removeprefix(WILD)
    for key in (plain if context.boxes else WILD + plain, category, plain, "default"):
        if key in rules:
            return key, rules[key]
    raise DataError(
        f"the rules have no category {category!r}; they have {', '.join(sorted(rules))}",
        "add it, or a rule named default",
    )


def review_prompt(context: Context, question: str, answers: tuple[str, str], rule: Rule) -> str:
    """The user message: context, question, two answers in the order in which they are shown, and the rule."""
    role = rule.role
    parts = [f"[Context]\n{context.text}\n\n", f"[Question]\n{question}\n\n"]
    for number, answer in enumerate(answers, 1):
        parts.append(f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n")
    return "".join([*parts, f"[System]\n{rule.prompt}\n\n"])


def read_contexts(path: str) -> dict[str, Context]:
    """Contexts by image name: {image, captions, instances} (COCO) or {image, caption} (in the wild) a line.

    Raises:
        DataError: the file is missing, cut, or a row is no context.
    """
    contexts = {}
    for number, value in enumerate(read_rows(path, "contexts"), 1):
        where = f"{path}: row {number}"
        row = as_object(value, where)
        image = as_id(row.get("image", row.get("id")), f"{where}: image")
        given = row.get("captions", row.get("caption"))
        sentences = [given] if isinstance(given, str) else given
        if not isinstance(sentences, list) or not sentences:
            raise DataError(f"{where} has neither captions nor caption", "check the file")
        contexts[image] = Context(
            tuple(as_text(sentence, f"{where}: captions") for sentence in sentences),
            _boxes(row.get("instances", []), where),
        )
    return contexts


def _boxes(instances: object, where: str) -> tuple[str, ...]:
    if not isinstance(instances, list):
        raise DataError(f"{where}: instances is no list", "check the file")
    rows: Sequence[dict[str, object]] = [as_object(value, f"{where}: instances") for value in instances]
    return tuple(f"{row.get('category')}: {row.get('bbox')}" for row in rows)
