"""The project's conversation templates as Jinja chat templates, for the exported checkpoints.

What they render is the text of `rayva.text.templates`; the export's tests compare the two. Pictures
stand in front of their message's text, each on a line of its own.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from rayva.errors import WeightsError
from rayva.text.templates import Template
from rayva.text.twin import twin_of

_FLATTEN = """
{%- set all = namespace(system=none, turns=[]) -%}
{%- for message in messages -%}
  {%- set part = namespace(images=[], texts=[]) -%}
  {%- if message['content'] is string -%}
    {%- set part.texts = [message['content']] -%}
  {%- else -%}
    {%- for piece in message['content'] -%}
      {%- if piece['type'] == 'text' -%}
        {%- set part.texts = part.texts + [piece['text']] -%}
      {%- else -%}
        {%- set part.images = part.images + ['<image>'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = part.texts | join('\\n') -%}
  {%- set content = (part.images + ([text] if text else [])) | join(BEHIND_IMAGE) -%}
  {%- if message['role'] == 'system' -%}
    {%- set all.system = content if all.system is none else all.system + '\\n' + content -%}
  {%- elif all.turns or message['role'] == 'user' or KEEPS_UNASKED -%}
    {%- set turn = {'role': message['role'], 'content': content, 'images': part.images | join} -%}
    {%- set all.turns = all.turns + [turn] -%}
  {%- endif -%}
{%- endfor -%}
{%- set system = DEFAULT_SYSTEM if all.system is none else all.system -%}
"""

_PLAIN = """
{%- for turn in all.turns -%}
  {{- turn['content'] + '\\n' if turn['role'] == 'assistant' else turn['images'] -}}
{%- endfor -%}
"""

_V0 = """
{{- system + '\\n\\n' if system else '' -}}
{{- '### ' -}}
{%- for turn in all.turns -%}
  {{- ('Assistant: ' if turn['role'] == 'assistant' else 'Human: ') + turn['content'] + '\\n### ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

_V1 = """
{{- system + ' ' if system else '' -}}
{%- for turn in all.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- 'USER: ' + turn['content'] + ' ' if turn['content'] else 'USER:' -}}
  {%- else -%}
    {{- 'ASSISTANT:' -}}
    {{- ' ' + turn['content'] if turn['content'] else '' -}}
    {{- EOS if turn['content'] or loop.last else '' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_LLAMA_2 = """
{%- for turn in all.turns -%}
  {%- if turn['role'] == 'user' -%}
    {{- '[INST] ' if loop.first else BOS + '[INST] ' -}}
    {{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' -}}
    {{- turn['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + turn['content'] if turn['content'] else '' -}}
    {{- ' ' + EOS if turn['content'] or loop.last else '' -}}
  {%- endif -%}
{%- endfor -%}
"""

_CHATML = """
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' if system else '' -}}
{%- for turn in all.turns -%}
  {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_PADDED = """
{%- for piece in written.split(IMAGE) -%}
  {{- '' if loop.first else IMAGE -}}
  {%- if piece and not piece.startswith(' ') and UNCONTROLLED -%}
    {{- PREFIX_PAD if loop.first else IMAGE_PAD -}}
  {%- endif -%}
  {{- piece -}}
{%- endfor -%}
"""
"""Writes what is needed to begin a text behind the prefix and behind each image; see `_text_start`."""

_OWN = """
{%- set messages = ([] if system is none else [{'role': 'system', 'content': system}]) + all.turns %}"""

_UNASKED = ("v0", "chatml", "tokenizer")
"""Templates that write an answer before the first question; the others leave it out."""
_BODIES = {"plain": _PLAIN, "v0": _V0, "v1": _V1, "llama_2": _LLAMA_2, "chatml": _CHATML}


def chat_template(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    image_markers: tuple[str, str] | None = None,
) -> str:
    """A Jinja chat template that writes conversations down as `template` does.

    `system` is the recipe's own system message, which only the tokenizer's template needs to be told;
    `image_markers` are tokens in front of and behind each image.

    Raises:
        WeightsError: there is no Jinja form of the template.
    """
    before, after = image_markers or ("", "")
    pad = _text_start(tokenizer)
    image, image_pad = json.dumps(f"{before}<image>{after}"), "" if after else pad
    flatten = _FLATTEN.replace("'<image>'", image)
    flatten = flatten.replace("KEEPS_UNASKED", "true" if template.name in _UNASKED else "false")
    if template.name == "tokenizer":
        given = "none" if system is None else json.dumps(system)
        flatten = flatten.replace("BEHIND_IMAGE", json.dumps(f"{image_pad}\n"))
        return (flatten.replace("DEFAULT_SYSTEM", given) + _OWN).strip() + str(tokenizer.chat_template)
    if template.name not in _BODIES:
        raise WeightsError(
            f'the template "{template.name}" has no Jinja form', "use the Rayva folder as it is"
        )
    body = _BODIES[template.name].replace("BOS", json.dumps(tokenizer.bos_token or ""))
    body = body.replace("EOS", json.dumps(template.stop[0]))
    prefix_ids = list(twin_of(tokenizer).prefix_ids) if template.adds_bos else []
    prefix = "".join(tokenizer.convert_ids_to_tokens(prefix_ids))
    if pad:
        body = "{%- set written -%}" + body + "{%- endset -%}" + _PADDED
        body = body.replace("IMAGE_PAD", json.dumps(image_pad)).replace("IMAGE", image)
        body = body.replace("PREFIX_PAD", json.dumps(pad if prefix else ""))
        body = body.replace("UNCONTROLLED", _uncontrolled(tokenizer))
    flatten = flatten.replace("BEHIND_IMAGE", json.dumps("\n"))
    flatten = flatten.replace("DEFAULT_SYSTEM", json.dumps(template.system))
    return (flatten + "{{- " + json.dumps(prefix) + " -}}" + body).strip()


def _uncontrolled(tokenizer: PreTrainedTokenizerBase) -> str:
    """That a piece of ChatML begins with no control token: no prefix space goes in front of one."""
    twin = twin_of(tokenizer)
    controls = [token for token in ("<|im_start|>", "<|im_end|>") if twin.markup(token) != token]
    return " and ".join(f"not piece.startswith({json.dumps(token)})" for token in controls) or "true"


def _text_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """What has to be written behind a control token for the text there to be encoded as a text's beginning.

    Training encodes the text behind BOS and behind an image so, like the original. SentencePiece
    tokenizers of the newer kind (`legacy=false`) put their prefix space in front of a whole text only,
    and not behind a control token: there the space must be written.
    """
    if not tokenizer.all_special_tokens:
        return ""
    token, probe = tokenizer.all_special_tokens[0], "\na"
    wanted = [tokenizer.convert_tokens_to_ids(token), *_ids(tokenizer, probe)]
    if _ids(tokenizer, token + probe) == wanted:
        return ""
    return " " if _ids(tokenizer, f"{token} {probe}") == wanted else ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
