"""Small tokenizers of every kind, and a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it?",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "敏捷的棕色狐狸跳过懒狗。",
    "def run(x: int) -> int:\n    return x + 1\n",
    "naïve café — “quotes” … emoji 🙂 👩‍👩‍👧 é ñ ü",
] * 4

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<|{{ message.role }}|>{{ message.content }}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: SentencePiece with bytes for what is not in the vocabulary."""
    words = ["▁the", "▁a", "▁", "s", "t", "h", "e", "a", "l", "o", "w", "r", "d", ".", "é"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in words:
        vocab.setdefault(word, len(vocab))
    for pair in ["th", "the", "▁t", "▁th"]:
        vocab.setdefault(pair, len(vocab))
    merges = [("t", "h"), ("▁", "a"), ("▁", "th")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "word-piece": word_piece,
}


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """One tokenizer of each kind."""
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a gateway reads of a model: no weights."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    byte_level().save(str(directory / "tokenizer.json"))
    files = {
        "config.json": {
            "model_type": "llama",
            "vocab_size": 400,
            "max_position_embeddings": 256,
            "eos_token_id": 1,
            "dtype": "float32",
        },
        "generation_config.json": {"eos_token_id": [1], "repetition_penalty": 1.1},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory
