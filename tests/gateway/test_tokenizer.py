from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from baton.errors import ModelError
from gateway.model_files import load_facts
from gateway.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    "  two spaces",
    "Быстрая лиса 🙂👩‍👩‍👧",
    "<s>marks</s> in text",
    "敏捷的棕色\n\n\tx",
    "a" * 40_000,
]


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return Tokenizer.load(model_directory)


async def test_ids_equal_those_of_transformers(model_directory, tokenizer):
    theirs = AutoTokenizer.from_pretrained(model_directory)
    for text in TEXTS:
        assert await tokenizer.encode_async(text) == theirs(text).input_ids
        bare = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == bare


def test_rendered_chat_equals_that_of_transformers(model_directory, tokenizer):
    theirs = AutoTokenizer.from_pretrained(model_directory)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  ¿Qué?\n"},
        {"role": "assistant", "content": "Nada."},
    ]
    for generation in (True, False):
        text = tokenizer.template.render(chat, add_generation_prompt=generation)
        expected = theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation
        )
        assert text == expected


@pytest.mark.parametrize("marks", [(True, False), (False, True), (True, True), (False, False)])
def test_marks_and_added_tokens_are_those_of_transformers(tmp_path, model_directory, marks):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"add_bos_token": marks[0], "add_eos_token": marks[1], "pad_token": "<pad>"}
    path.write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("hello <pad>", "<s>x"):
        assert ours.encode(text) == theirs(text).input_ids


def test_token_bytes_join_to_the_encoded_text(backends):
    text = "the café 🙂 狐"
    for kind in ("byte-level", "byte-fallback"):
        tokenizer = Tokenizer(backends[kind])
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text
        assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template"),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path, model_directory, name, content, message):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(directory)


def test_facts_are_read_from_the_configuration(model_directory):
    facts = load_facts(model_directory, "named")
    assert (facts.name, facts.vocab_size, facts.max_context) == ("named", 400, 256)
    assert facts.eos_token_ids == {1}
    assert facts.defaults.temperature == 0.0
    assert facts.defaults.repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "not a Hugging Face model directory"),
        ({}, "vocab_size"),
        ({"vocab_size": 10}, "longest context"),
    ],
)
def test_damaged_configurations_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_facts(tmp_path)


def test_sampling_defaults_apply_only_to_models_that_ask_for_sampling(tmp_path, model_directory):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    for asks in (True, False):
        generation = {"do_sample": asks, **recommended}
        (directory / "generation_config.json").write_text(json.dumps(generation))
        defaults = load_facts(directory).defaults
        expected = (0.6, 0.9, 20) if asks else (0.0, 1.0, 0)
        assert (defaults.temperature, defaults.top_p, defaults.top_k) == expected
