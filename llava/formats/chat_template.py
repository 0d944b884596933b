"""Conversation templates as Jinja source, which transformers and vLLM read from chat_template.jinja."""

import json

from llava.config import IMAGE_PLACEHOLDER
from llava.preprocess.conversation import Style, Template

# Renders the content of one message. In a list of parts, image placeholders precede the text, as in our prompts.
_CONTENT = (
    "{%- macro content(message) -%}{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- MARK -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{{- (NEWLINE if not loop.first else '') ~ part.text -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set system = content(messages[0]) -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = SYSTEM -%}{%- set turns = messages -%}{%- endif -%}"
)
_COLON = (
    "{{- system ~ SEP -}}{%- for turn in turns -%}"
    "{%- if turn.role == 'user' -%}{{- USER ~ ': ' ~ content(turn) ~ SEP -}}"
    "{%- else -%}{{- ASSISTANT ~ ': ' ~ content(turn) ~ (SEP2 or SEP) -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- ASSISTANT ~ ':' -}}{%- endif -%}"
)
_CHATML = (
    "{{- SYSTEM_ROLE ~ system ~ SEP -}}{%- for turn in turns -%}"
    "{{- (USER if turn.role == 'user' else ASSISTANT) ~ content(turn) ~ SEP -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- ASSISTANT -}}{%- endif -%}"
)
_LLAMA_2 = (
    "{%- for turn in turns -%}{%- if turn.role == 'user' -%}"
    "{%- set head = SYS_OPEN ~ system ~ SYS_CLOSE if loop.first and system else '' -%}"
    "{{- (SEP if not loop.first else '') ~ '[INST] ' ~ head ~ content(turn) ~ ' [/INST]' -}}"
    "{%- else -%}{{- ' ' ~ content(turn) ~ ' ' ~ SEP2 -}}{%- endif -%}{%- endfor -%}"
)
_BODIES = {Style.SINGLE: _COLON, Style.TWO: _COLON, Style.MPT: _CHATML, Style.LLAMA_2: _LLAMA_2}


def chat_template(template: Template) -> str | None:
    """Returns the template as Jinja source, or None for a non-chat style or a template with few-shot turns.

    Unlike `render`, the Jinja template also adds a separator after an empty turn.
    """
    if template.style not in _BODIES or template.few_shot:
        return None
    values = {
        "SYSTEM": template.system,
        "SYSTEM_ROLE": template.system_role,
        "USER": template.user,
        "ASSISTANT": template.assistant,
        "SEP": template.sep,
        "SEP2": template.sep2,
        "MARK": f"{IMAGE_PLACEHOLDER}\n",
        "NEWLINE": "\n",
        "SYS_OPEN": "<<SYS>>\n",
        "SYS_CLOSE": "\n<</SYS>>\n\n",
    }
    body = _BODIES[template.style]
    used = {name: text for name, text in values.items() if name in _CONTENT + _SYSTEM + body}
    constants = "".join(f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in used.items())
    return constants + _CONTENT + _SYSTEM + body
