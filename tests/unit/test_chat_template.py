from __future__ import annotations

import json
import resource
import signal

import pytest

from toolchain.base import chat_template
from toolchain.base.chat_template import PLAIN_STOPS, ChatTemplate, Message
from toolchain.base.errors import ArtifactError

TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <you>"},
]


def rendered(source: str | None, messages: list[Message] = TALK) -> str:
    return ChatTemplate(source=source, bos_token="<s>", eos_token="</s>").render(messages)


def test_template_sees_messages_tokens_and_the_generation_prompt() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt and tools is none %}<|assistant|>{% endif %}"
    )
    assert rendered(source) == "<s><|user|>Hi <you></s>\n<|assistant|>"


def test_tojson_escapes_no_html() -> None:
    assert json.loads(rendered("{{ messages | tojson }}")) == TALK
    assert "<you>" in rendered("{{ messages | tojson }}")


def test_generation_block_is_its_content() -> None:
    assert rendered("a{% generation %}b{% endgeneration %}c") == "abc"


def test_date_is_there() -> None:
    assert rendered("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__['json'].dumps(1) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_sandbox_cannot_be_left(source: str) -> None:
    with pytest.raises(ArtifactError, match="chat template cannot be used") as caught:
        rendered(source)
    assert caught.value.evidence
    assert caught.value.hint


@pytest.mark.parametrize("source", ["{{ 9 ** 9 ** 9 }}", "{{ 'x' * 10 ** 12 }}", "{{ [0] * 2147483648 }}"])
def test_enormous_products_are_refused_at_once(source: str) -> None:
    with pytest.raises(ArtifactError):
        rendered(source)


def test_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGALRM)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ArtifactError) as caught:
        rendered(loop)
    assert "was not done" in caught.value.evidence
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_template_that_eats_memory_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_BYTES", 64 * 2**20)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    doubling = "{% set n = namespace(x='0123456789') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    with pytest.raises(ArtifactError) as caught:
        rendered(doubling)
    assert "MiB" in caught.value.evidence
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_syntax_error_names_its_line() -> None:
    with pytest.raises(ArtifactError) as caught:
        rendered("ok\n{% if %}")
    assert "line 2" in caught.value.evidence


def test_system_text_goes_to_the_user_where_the_role_is_refused() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert rendered(source) == "Be brief.\n\nHi <you>"


def test_failure_tells_the_templates_own_words() -> None:
    with pytest.raises(ArtifactError) as caught:
        rendered("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in caught.value.evidence


def test_enormous_source_is_not_compiled() -> None:
    with pytest.raises(ArtifactError):
        rendered("x" * (chat_template.MAX_SOURCE_CHARS + 1))


def test_without_a_template_a_plain_dialogue_is_written() -> None:
    assert rendered(None) == "Be brief.\nUser: Hi <you>\nAssistant:"
    assert PLAIN_STOPS == ("\nUser:",)
