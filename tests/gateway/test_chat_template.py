from __future__ import annotations

import pytest

from baton.errors import InvalidRequest, ModelError
from gateway.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages=HELLO, **kwargs) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **kwargs)


def test_special_tokens_messages_and_arguments_are_visible():
    source = "{{ bos_token }}{{ messages[0].content }}{{ mood }}{{ add_generation_prompt }}"
    assert render(source, template_kwargs={"mood": "!"}) == "<s>hello!True"


def test_blocks_are_trimmed_as_hugging_face_templates_expect():
    source = "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n"
    assert render(source + "{% endfor %}") == "user\n"


def test_loop_controls_tojson_and_generation_blocks_work():
    source = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% break %}{% endfor %}"
    )
    assert render(source, HELLO * 2) == '{"role": "user", "content": "hello"}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined.attribute }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_callers_error(source):
    with pytest.raises(InvalidRequest, match="chat"):
        render(source)


def test_output_is_bounded():
    source = "{% for i in range(10000) %}0123456789{% endfor %}"
    with pytest.raises(InvalidRequest, match="over 1000 characters"):
        render(source, max_chars=1000)


def test_endless_rendering_is_cut(monkeypatch):
    monkeypatch.setattr("gateway.chat_template.MAX_RENDER_SECONDS", 0.05)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %} {% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="too long"):
        render(loop, max_chars=10**9)


def test_callers_cannot_replace_what_the_server_sets():
    with pytest.raises(InvalidRequest, match=r"bos_token, messages"):
        render("", template_kwargs={"bos_token": "x", "messages": []})


def test_a_broken_template_is_refused_at_load():
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% for %}", {})
