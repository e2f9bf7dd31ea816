"""Chat templates: rendered as transformers does, never lost, and bounded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm import InputError
from mlx_openelm.checkpoint.hub import DEMO
from mlx_openelm.tokenizer import chat
from mlx_openelm.tokenizer.chat import CHAT_TEMPLATE, render_chat
from mlx_openelm.tokenizer.files import carry_tokenizer, write_tokenizer_files
from mlx_openelm.tokenizer.tokenizer import Tokenizer, load_tokenizer

# In the manner of the families that they are named after
TEMPLATES = {
    "openelm": CHAT_TEMPLATE,
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3.2": "{{- bos_token }}\n{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n        {%- set date_string ="
    " strftime_now('%d %b') %}\n"
    "    {%- else %}\n        {%- set date_string = '26 Jul 2024' %}\n    {%- endif"
    " %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n"
    "{%- endif %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "{%- if tools is not none %}\n    {{- 'Environment: ipython\\n' }}\n"
    "    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n        {{- '\\n\\n' }}\n"
    "    {%- endfor %}\n{%- endif %}\n{{- 'Today: ' + date_string + '\\n\\n' + system_message }}\n"
    "{%- for message in messages %}\n"
    "    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    "qwen 3": "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n"
    "    {{- '# Tools\\n<tools>' }}\n    {%- for tool in tools %}\n        {{- '\\n' }}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '\\n</tools><|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if ns.multi_step and message.role == 'user' and message.content is string %}\n"
    "        {%- set ns.multi_step = false %}\n        {%- set ns.last = index %}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
    "    {%- set content = message.content if message.content is string else '' %}\n"
    "    {%- if message.role == 'assistant' and loop.index0 > ns.last %}\n"
    "        {{- '<think>' + message.reasoning_content | default('none') }}\n    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + content.split('</think>')[-1].lstrip('\\n') "
    "+ '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    "mistral": "{%- set loop_messages = messages %}{{ bos_token }}"
    "{%- for message in loop_messages | rejectattr('role', 'equalto', 'system') %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools is not none and loop.last %}{{ '[AVAILABLE_TOOLS] [' }}"
    '{%- for tool in tools %}{%- set tool = tool.function %}{{ \'{"type": "function", \' }}'
    "{%- for key, val in tool.items() if key != 'return' %}"
    "{%- if val is string %}{{ '\"' + key + '\": \"' + val + '\"' }}"
    "{%- else %}{{ '\"' + key + '\": ' + val|tojson }}{%- endif %}"
    "{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}{{ '}' }}{%- endfor %}"
    "{{ '] [/AVAILABLE_TOOLS]' }}{%- endif %}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{%- else %}{{ ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}",
    "gemma": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma 3, content in parts": "{%- for message in messages %}{%- if message.content is string %}"
    "{{ message.content | trim }}{%- elif message.content is iterable %}"
    "{%- for item in message.content %}{%- if item.type == 'image' %}<image>"
    "{%- elif item.type == 'text' %}{{ item.text | trim }}{%- endif %}{%- endfor %}{%- else %}"
    "{{ raise_exception('Invalid content type') }}{%- endif %}{%- endfor %}",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and"
    " message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "command r": "{{ bos_token }}{%- macro document_turn(documents) -%}{%- for doc in"
    " documents %}\n"
    "Document: {{ loop.index0 }}\n{% for key, value in doc.items() %}\n"
    "{{ key|title }}: {{ value }}\n{% endfor %}\n{%- endfor -%}{%- endmacro %}"
    "{% if documents %}<results>{{ document_turn(documents) }}</results>{% endif %}"
    "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "<|START|>{{ message.content }}<|END|>{% if loop.index > 4 %}{% break %}{% endif"
    " %}{% endfor %}",
    "command r, nested macros": "{%- macro json(value, depth=0) -%}"
    "{%- if value is mapping -%}{{ '{' }}{%- for k, v in value.items() -%}"
    "{{ k }}={{ json(v, depth + 1) }};{%- endfor -%}{{ '}' }}"
    "{%- elif value is iterable and value is not string -%}"
    "[{%- for v in value -%}{{ json(v, depth + 1) }},{%- endfor -%}]"
    "{%- else -%}{{ value }}@{{ depth }}{%- endif -%}{%- endmacro -%}"
    "{%- macro outer(m) -%}<{{ caller(json(m)) }}>{%- endmacro -%}"
    "{% for m in messages %}{% call(x) outer(m) %}{{ x }}!{% endcall %}{% endfor %}",
    "smollm 3": "{# ───── defaults ───── #}\n"
    "{%- if enable_thinking is not defined -%}\n{%- set enable_thinking = true -%}\n{%- endif -%}\n"
    "{%- if enable_thinking -%}{%- set mode = '/think' -%}{%- else -%}"
    "{%- set mode = '/no_think' -%}{%- endif -%}\n"
    "{{- '<|im_start|>system\\n' -}}{{- mode ~ ' ' ~ (xml_tools | default('-')) ~ '\\n' -}}\n"
    "{%- for message in messages -%}\n    {%- set content = message.content -%}\n"
    "    {%- if message.role == 'user' -%}\n        {{ '<|im_start|>user\\n' + content + '\\n' }}\n"
    "    {%- elif message.role == 'assistant' -%}\n        {% generation %}\n"
    "        {{ '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}\n"
    "        {% endgeneration %}\n    {%- endif -%}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    "granite": "{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{%- endif %}\n"
    "{%- for m in messages %}\n    {{- m['role'] | upper + ': ' + m['content'] + '\\n' }}\n"
    "{%- endfor %}",
    "deepseek": "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}",
    "special tokens": "{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ image_token }}"
    "{{ cls_token is defined }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "what is defined": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}"
    "{{ nothing is defined }}{{ enable_thinking is defined }}{{ dict(a=1)['a'] }}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(sort_keys=true, "
    "separators=(',', ':'), ensure_ascii=true) }}{{ m | tojson(indent=2) }}{% endfor %}",
    "whitespace": "  {% for m in messages %}  \n  {{ m.content }}  \n  {% endfor %}  \n\n",
    "filters": "{% for r, g in messages | groupby('role') %}{{ r }}:{{ g |"
    " map(attribute='content') "
    "| join('|') }}{{ g | length }}{% endfor %}{{ (messages | selectattr('role',"
    " 'equalto', 'user') "
    "| first).content | replace('a', 'b') | e | wordcount }}{{ range(3) | list }}{{ '%s-%03d' % "
    "('a', 7) }}{{ 'x' * 3 + 'y' }}{{ 2 ** 10 }}{{ [1] + [2] }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}"
    "{{ m.get('tool_calls', 'no calls') }}{% endfor %}",
}

TALK = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": ' Grüße "x" <b> & {{ a }}\n'},
    {"role": "assistant", "content": "Ein König 👑", "tool_calls": None, "thinking": "hm"},
    {"role": "user", "content": "And a tale?"},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": " Was ist das? "}],
    }
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "ä <b>", "parameters": {"z": 1, "a": [True, None]}},
}
CALLS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (TALK, {"add_generation_prompt": True}),
    (TALK[1:], {"add_generation_prompt": True, "tools": [TOOL]}),
    (TALK[:3], {"add_generation_prompt": False, "enable_thinking": False}),
    (TALK[1:2], {"add_generation_prompt": True, "enable_thinking": True, "xml_tools": "x"}),
    (TALK[1:3], {"continue_final_message": True, "add_generation_prompt": False}),
    (TALK, {"add_generation_prompt": True, "documents": [{"title": "T", "text": "ö"}]}),
    (PARTS, {"add_generation_prompt": True}),
    (TALK[1:2], {"add_generation_prompt": True, "bos_token": "<other>"}),
]

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, "image_token": "<unk>"}


def directory_with(path: Path, template: object = None, **files: str) -> Path:
    """The demo's tokenizer, with a template in its configuration, and in files."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_bytes((DEMO / "demo/tokenizer.json").read_bytes())
    config = CONFIG if template is None else {**CONFIG, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        file = path / name.replace("__", "/").replace("_j", ".j")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return path


def theirs_of(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def rendered(tokenizer: Any, messages: Any, options: dict[str, Any]) -> str | None:
    """The text, or None when it can't be rendered."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        if isinstance(tokenizer, Tokenizer):
            assert isinstance(error, InputError)
            assert "\n" not in str(error)
        return None
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    directory_with(tmp_path, TEMPLATES[name])
    ours, theirs = load_tokenizer(tmp_path), theirs_of(tmp_path)
    count = 0
    for messages, options in CALLS:
        if name == "openelm" and messages is PARTS:
            continue  # refused by us: content that isn't text
        expected = rendered(theirs, messages, options)
        assert rendered(ours, messages, options) == expected, options
        count += expected is not None
    assert count >= 5
    ids = ours.apply_chat_template(TALK[1:2])
    again = theirs.apply_chat_template(TALK[1:2], add_generation_prompt=True, return_dict=False)
    assert ids == again


NAMED_LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
WHERE: dict[str, dict[str, Any]] = {
    "none": {},
    "configuration": {"template": "C"},
    "named": {"template": NAMED_LIST},
    "named without default": {"template": [{"name": "rag", "template": "R"}]},
    "file": {"chat_template_jinja": "F"},
    "file before configuration": {"template": "C", "chat_template_jinja": "F"},
    "several files": {
        "template": "C",
        "chat_template_jinja": "F",
        "additional_chat_templates__tool_use_jinja": "T",
    },
    "further files only": {"template": "C", "additional_chat_templates__rag_jinja": "R"},
}


@pytest.mark.parametrize("where", WHERE)
def test_where_templates_are_found_and_that_they_are_carried(where: str, tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "a", **WHERE[where])
    for name, write in (
        ("b", carry_tokenizer),
        ("c", lambda a, b: write_tokenizer_files(a, b, chat=where != "none")),
    ):
        (tmp_path / name).mkdir()
        write(directory, tmp_path / name)
        for file in directory.rglob("*"):
            if file.is_file():
                copy = tmp_path / name / file.relative_to(directory)
                assert copy.read_bytes() == file.read_bytes()
    for name in "abc":
        ours, theirs = load_tokenizer(tmp_path / name), theirs_of(tmp_path / name)
        assert ours.chat_template == theirs.chat_template
        assert ours.has_chat_template == (where != "none")
        for options in ({}, {"tools": [TOOL]}, {"chat_template": "rag"}, {"chat_template": "X"}):
            assert rendered(ours, TALK, options) == rendered(theirs, TALK, options)


def test_a_sentencepiece_directory_keeps_its_template(tmp_path: Path) -> None:
    source, out = directory_with(tmp_path / "a", "C"), tmp_path / "b"
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes((DEMO / "demo/tokenizer.model").read_bytes())
    out.mkdir()
    write_tokenizer_files(source, out, chat=True)
    assert load_tokenizer(out).chat_template == theirs_of(out).chat_template == "C"
    assert json.loads((out / "tokenizer_config.json").read_text())["image_token"] == "<unk>"


def test_chat_template_json_is_the_last_resort(tmp_path: Path) -> None:
    files = {"chat_template_json": json.dumps({"chat_template": "J"})}
    assert load_tokenizer(directory_with(tmp_path, **files)).chat_template == "J"
    assert load_tokenizer(directory_with(tmp_path, "C", **files)).chat_template == "C"
    directory_with(tmp_path, 7)
    with pytest.raises(InputError, match="neither a text nor a list"):
        load_tokenizer(tmp_path)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory_with(tmp_path))
    assert tokenizer.chat_template is None
    with pytest.raises(InputError, match=r"no chat template; .*CHAT_TEMPLATE"):
        tokenizer.apply_chat_template(TALK)
    text = tokenizer.apply_chat_template(TALK[1:2], chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text.startswith("<s><|user|>\n Grüße") and text.endswith("</s>\n<|assistant|>\n")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "Be  brief."


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "give one of them"),
        ({"continue_final_message": "thinking"}, "has no 'thinking'"),
        ({"tools": [print]}, "JSON schemas"),
        ({"tools": [3]}, "JSON schemas"),
        ({"documents": ["a"]}, "JSON schemas"),
        ({"return_tensors": "np"}, "no return_tensors here"),
        ({"truncation": True}, "no truncation here"),
    ],
)
def test_options_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    tokenizer = load_tokenizer(directory_with(tmp_path, "{{ messages[0].content }}"))
    with pytest.raises(InputError, match=reason):
        tokenizer.apply_chat_template(TALK, **options)


BOMB = "{% for i in range(99999) %}"
HOSTILE = {
    "an endless loop": BOMB * 3 + "{% endfor %}" * 3,
    "loops in a macro": "{% macro f() %}" + BOMB * 2 + "{% endfor %}" * 2 + "{% endmacro %}"
    "{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop with a condition": BOMB
    + "{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "a huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a long text": BOMB + "{{ 'x' * 1000 }}{% endfor %}",
    "a product": "{{ 'x' * 10 ** 12 }}",
    "a list": "{{ [1] * 10 ** 12 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a text that doubles": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a text that doubles by ~": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a block that doubles": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "a macro that doubles": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = f(ns.x) %}{% endfor %}",
    "a join that doubles": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "a format that doubles": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "padding": "{{ 'x'.ljust(10 ** 12) }}",
    "padding by a filter": "{{ 'x' | center(10 ** 12) }}",
    "indentation": "{{ [1] | tojson(indent=10 ** 12) }}",
    "replacement": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "a translation": "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "a format's width": "{{ '{:1000000000}'.format(1) }}",
    "a format with a width": "{{ '%*d' % (1000000000, 1) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "an attribute": "{{ messages.__class__.__mro__ }}",
    "a change": "{{ messages.append(1) }}",
    "the check itself": "{% set check_time = 1 %}" + BOMB * 3 + "{% endfor %}" * 3,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(InputError, match="chat template can't be used") as caught:
        render_chat(HOSTILE[name], TALK, bos_token="", eos_token="")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_failing_template_after_a_slow_one_has_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(InputError, match=r"more than 0\.2 s"):
            render_chat(HOSTILE["an endless loop"], TALK)
        assert render_chat("{% for m in messages %}{{ m.role }} {% endfor %}", TALK).startswith(
            "sy"
        )
