"""The demo model's tokenizer: byte-level BPE trained on its own text, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo_model.dialogue import ASSISTANT, BOS, END, PAD, SPECIAL_TOKENS, SYSTEM, USER

VOCABULARY = 4096

CHAT_TEMPLATE = f"""\
{{{{- bos_token }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'system' %}}
        {{{{- '{SYSTEM}' + message.content }}}}
    {{%- elif message.role == 'user' %}}
        {{{{- '{USER}' + message.content }}}}
    {{%- elif message.role == 'assistant' %}}
        {{{{- '{ASSISTANT}' + message.content + eos_token }}}}
    {{%- else %}}
        {{{{- raise_exception('unknown role: ' + message.role) }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '{ASSISTANT}' }}}}
{{%- endif %}}
"""


def train(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from `texts`; the special tokens take the first ids, in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the tokenizer as transformers reads it, the chat template in both of its places."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    marks = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **marks,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")
