"""Templates render as `transformers` renders them, and can neither run code nor run away."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import models

from tgi_gateway.errors import ModelError, TemplateError
from tgi_gateway.prompt.chat_template import ChatTemplate, Limits

SPECIAL: dict[str, str | list[str]] = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.content is string %}{{ message.content | trim }}{% endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LLAMA3_TOOLS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- set ns = namespace(system='', first=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}
{% if tools is not none %}
Functions you may call:

{% for tool in tools %}
{{ tool | tojson(indent=4) }}

{% endfor %}
{% endif %}
{{ ns.system }}<|eot_id|>
{%- macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') ~ '{"name": "' ~ call.name ~ '", "parameters": ' }}
        {{- (call.arguments | tojson) ~ '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- header('ipython') }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson(separators=(',', ':'), sort_keys=true) }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- header(message.role) + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{- " " + message["content"] + eos_token}}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

QWEN_LIKE = """{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}
{{- "\\n" }}{{- tool | tojson }}
{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
{%- if message.role == 'tool' and loop.previtem is defined %}{% continue %}{% endif %}
{{ loop.index0 }}: {{ message.role }} {{ message.content.split('</think>')[-1].lstrip('\\n') }}
{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% for key, value in {'b': 1, 'a': '<é>'} | dictsort %}{{ key }}={{ value | tojson }};{% endfor %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & here, où 日",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PLAIN = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hi <b>'you'</b> & \U0001f600"},
    {"role": "assistant", "content": "<think>hm</think>\nHello"},
    {"role": "user", "content": "Bye"},
]
CALLING = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "content": "12 °C"},
]


def ours(template: str, **limits: Any) -> ChatTemplate:
    return ChatTemplate({"default": template}, SPECIAL, Limits(**limits))


def outcome(render: Callable[[], str]) -> str:
    """The text, or the words of the refusal."""
    try:
        return render()
    except (jinja2.TemplateError, TemplateError) as error:
        return f"refused: {str(error).removeprefix(TemplateError.prefix)}"


def reference(template: str | dict[str, str]) -> Any:
    library = Library(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    build: Any = transformers.PreTrainedTokenizerFast
    return build(tokenizer_object=library, chat_template=template, **SPECIAL)


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3_TOOLS, MISTRAL, QWEN_LIKE], ids=["chatml", "llama3", "mistral", "qwen"]
)
@pytest.mark.parametrize("messages", [PLAIN, PLAIN[1:], CALLING], ids=["plain", "no_system", "calling"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no_tools", "tools"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no_prompt"])
def test_it_renders_as_transformers_does(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    arguments = {"enable_thinking": False, "date_string": "1 May 2026"}
    theirs = outcome(
        lambda: reference(template).apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **arguments
        )
    )
    assert outcome(lambda: ours(template).render(messages, tools, prompt, arguments)) == theirs


@pytest.mark.parametrize("arguments", ["", "indent=2", "separators=(',', ':')", "sort_keys=true", "ensure_ascii=true"])
def test_tojson_is_that_of_transformers(arguments: str) -> None:
    template = "{{ messages[0] | tojson(" + arguments + ") }}"
    messages = [{"role": "user", "content": "<a href='x'>&\U0001f600\u2028", "b": 1.5, "a": None, "list": [1, True]}]
    theirs = reference(template).apply_chat_template(messages, tokenize=False)
    assert ours(template).render(messages) == theirs


def test_the_tool_template_is_chosen_when_tools_are_given() -> None:
    named = {"default": "plain", "tool_use": "tools", "rag": "rag"}
    both = ChatTemplate(named, SPECIAL)
    for tools in (None, [TOOL]):
        theirs = reference(named).apply_chat_template(PLAIN, tools=tools, tokenize=False)
        assert both.render(PLAIN, tools) == theirs


def test_a_single_template_of_another_name_is_used() -> None:
    assert ChatTemplate({"chat": "x"}, {}).render(PLAIN) == "x"
    with pytest.raises(TemplateError, match="none named `default`"):
        ChatTemplate({"a": "x", "b": "y"}, {}).render(PLAIN)


def test_strftime_now_tells_the_date() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    shown = ours("{{ strftime_now('%Y-%m-%d') }}").render(PLAIN)
    assert shown in {before, datetime.now().strftime("%Y-%m-%d")}


def test_the_template_refuses_in_its_own_words() -> None:
    with pytest.raises(TemplateError) as refused:
        ours("{{ raise_exception('Only user and assistant roles are supported!') }}").render(PLAIN)
    assert str(refused.value) == "Template error: Only user and assistant roles are supported!"


def test_an_undefined_value_is_named() -> None:
    with pytest.raises(TemplateError, match="'dict object' has no attribute 'name'"):
        ours("{{ messages[0].name.first }}").render(PLAIN)


def test_a_broken_template_is_told_at_every_rendering_and_at_start(caplog: pytest.LogCaptureFixture) -> None:
    broken = ours("a\n{% for x in %}")
    assert "line 2" in caplog.text
    for _ in range(2):
        with pytest.raises(TemplateError, match=r"template is invalid: .* \(line 2\)"):
            broken.render(PLAIN)


@pytest.mark.parametrize(
    "template",
    [
        "a\n{{ messages[0].content + 1 }}",
        "\n{{ 1 / 0 }}",
        "\n{{ messages | map('int') | sum | foo }}",
        "\n{{ {}|tojson(indent=[]) }}",
    ],
)
def test_python_errors_stay_inside(template: str) -> None:
    with pytest.raises(TemplateError) as refused:
        ours(template).render(PLAIN)
    assert "line 2" in str(refused.value)
    for internal in ("Traceback", "str object", "NoneType", "concatenate", "division", "File"):
        assert internal not in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''|attr('__class__') }}x{{ ''|attr('__class__').mro() }}",
        "{{ '{0.__class__}'.format('') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_code_and_files_are_out_of_reach(template: str) -> None:
    messages = [dict(message) for message in PLAIN]
    assert outcome(lambda: ours(template).render(messages)).startswith("refused: ") or not ours(template).render(
        messages
    )
    assert messages == PLAIN


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}y{% endfor %}{% endfor %}{% endset %}",
        "{% set tick, environment = 1, 1 %}{% for a in range(999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for a in 'ab' %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    ],
    ids=["loops", "in_a_set_block", "shadowed_names", "macros"],
)
def test_an_endless_template_is_ended(template: str) -> None:
    with pytest.raises(TemplateError, match=r"longer than 0.05 seconds|cannot be applied"):
        ours(template, seconds=0.05).render(PLAIN)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ range(1000000000) | list }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\\ny' | indent(1000000000) }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%-*d' | format(1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
    ],
)
def test_what_would_fill_the_memory_is_not_begun(template: str) -> None:
    with pytest.raises(TemplateError, match=r"at once|repeats a text|raise to a power|cannot be applied"):
        ours(template).render(PLAIN)


def test_a_prompt_that_grows_without_end_is_ended() -> None:
    with pytest.raises(TemplateError, match="wrote more than 10000 characters"):
        ours("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}", output_characters=10_000).render(PLAIN)


def test_long_numbers_in_a_message_are_no_sizes() -> None:
    template = ours(
        "{{ '%s: %s %d' % (messages[0].role, messages[0].content, 1700000000) }}"
        "{{ '{}: {:.3f}'.format(1700000000, 1.5) }}{{ messages[0].content | indent(2) }}"
        "{{ messages[0].content | center(30) }}{{ '%s' | format(messages[0].content) }}"
    )
    content = "call :12345678901 %12345678901d"
    assert template.render([{"role": "user", "content": content}]).count(content) == 4


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token"]
)
def test_template_arguments_cannot_replace_what_the_gateway_sets(name: str) -> None:
    with pytest.raises(TemplateError, match=f"may not set `{name}`"):
        ours("x").render(PLAIN, template_kwargs={name: "x"})


def test_template_arguments_do_not_outlive_their_request() -> None:
    template = ours("{{ enable_thinking is defined }}{% set enable_thinking = 3 %}")
    assert [template.render(PLAIN, template_kwargs={"enable_thinking": True}), template.render(PLAIN)] == [
        "True",
        "False",
    ]


def test_variables_tell_whether_the_template_knows_tools() -> None:
    assert "tools" in ours(LLAMA3_TOOLS).variables()
    assert "tools" not in ours(MISTRAL).variables()


def test_one_template_renders_in_many_threads() -> None:
    template = ours(CHATML)
    wanted = [template.render([{"role": "user", "content": str(n)}]) for n in range(8)]
    found: list[list[str]] = [[] for _ in wanted]

    def work(n: int) -> None:
        for _ in range(50):
            found[n].append(template.render([{"role": "user", "content": str(n)}]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[text] * 50 for text in wanted]


def write(folder: Path, **files: object) -> None:
    for name, value in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def rendered(folder: Path, tools: Sequence[dict[str, Any]] | None = None, config: Path | None = None) -> str:
    template = ChatTemplate.from_folder(folder, config)
    assert template is not None
    return template.render(PLAIN, tools)


def test_a_folder_without_template_has_none(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_json={"bos_token": "<s>"})
    assert ChatTemplate.from_folder(tmp_path) is None


def test_special_tokens_come_from_the_tokenizer_config(tmp_path: Path) -> None:
    described = {"content": "<s>", "special": True}
    write(
        tmp_path,
        tokenizer_config_json={
            "bos_token": described,
            "eos_token": "</s>",
            "chat_template": "{{bos_token}}{{eos_token}}",
        },
    )
    assert rendered(tmp_path) == "<s></s>"


def test_every_source_of_a_template_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path, processor_config_json={"chat_template": "processor"})
    assert rendered(tmp_path) == "processor"
    write(tmp_path, tokenizer_config_json={"chat_template": "config"})
    assert rendered(tmp_path) == "config"
    write(tmp_path, chat_template_json={"chat_template": "chat_template.json"})
    assert rendered(tmp_path) == "chat_template.json"
    write(tmp_path, chat_template_jinja="jinja")
    assert rendered(tmp_path) == "jinja"
    write(tmp_path, additional_chat_templates__tool_use_jinja="jinja tools")
    assert rendered(tmp_path) == "jinja"
    assert rendered(tmp_path, [TOOL]) == "jinja tools"
    write(tmp_path, mine_json={"chat_template": "mine"})
    assert rendered(tmp_path, config=tmp_path / "mine.json") == "mine"


def test_a_list_of_named_templates_is_read(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, tokenizer_config_json={"chat_template": named})
    assert (rendered(tmp_path), rendered(tmp_path, [TOOL])) == ("plain", "tools")


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": [1]}', '{"chat_template": [{"name": "default"}]}'])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path, tokenizer_config_json=content)
    with pytest.raises(ModelError, match=r"tokenizer_config|chat_template"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        ChatTemplate.from_folder(tmp_path)
