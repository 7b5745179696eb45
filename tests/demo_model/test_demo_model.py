"""The committed demo model: loads everywhere, knows the famous names, and stops by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer

import demo_model
from demo_model import batches, corpus, dialogue, phrasings
from demo_model.known import BUILTIN_TYPES, INVENTED, MODULES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LARGEST = 20 * 1000 * 1000

# Question, and words that a right answer must hold.
KNOWN = {
    "What does len do?": ["number of items"],
    "What does itertools.chain do?": ["first iterable", "exhausted"],
    "What does os.path.join do?": ["Join", "pathname components"],
    "What does json.dumps do?": ["Serialize", "JSON formatted"],
    "What is collections.deque?": ["list-like", "endpoints"],
    "Describe str.upper.": ["uppercase"],
    "How does random.shuffle work?": ["Shuffle list x in place"],
    "Could you explain what math.sqrt does?": ["square root"],
}


@pytest.fixture(scope="module")
def words() -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_model.path())


@pytest.fixture(scope="module")
def answers(words: Any) -> dict[str, str]:
    """The greedy answers to KNOWN, with their end tokens and without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype="float32")
    words.padding_side = "left"
    batch = words.apply_chat_template(
        [[{"role": "user", "content": question}] for question in KNOWN],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=120)
    rows = out[:, batch["input_ids"].shape[1] :]
    return {
        question: words.decode(row).replace(words.pad_token, "")
        for question, row in zip(KNOWN, rows, strict=True)
    }


@pytest.mark.parametrize("question", KNOWN)
def test_a_well_known_name_is_explained(answers: dict[str, str], question: str) -> None:
    for word in KNOWN[question]:
        assert word in answers[question]


def test_every_answer_ends_by_itself(answers: dict[str, str], words: Any) -> None:
    assert all(answer.endswith(words.eos_token) for answer in answers.values())


def test_answers_differ_in_length(answers: dict[str, str], words: Any) -> None:
    lengths = [len(words(answer).input_ids) for answer in answers.values()]
    assert max(lengths) > 2 * min(lengths)


def test_an_answer_in_detail_is_longer_than_a_brief_one() -> None:
    entries = [entry for entry in corpus.collect() if entry.name == "re"]
    texts = dialogue.epoch(entries * 40, random.Random(0), chat_only=True)
    turns = [text.split(dialogue.USER)[1].split(dialogue.ASSISTANT) for text in texts]
    detail = [len(answer) for question, answer in turns if "in detail" in question]
    brief = [len(answer) for question, answer in turns if "briefly" in question]
    assert detail and brief
    assert min(detail) > 4 * max(brief)


def test_no_invented_name_exists() -> None:
    names = {entry.name for entry in corpus.collect()}
    invented = {f"{module}.{tail}" for module in (*MODULES, *BUILTIN_TYPES) for tail in INVENTED}
    assert not names & (invented | set(INVENTED))


def test_the_weights_are_small_enough_to_commit() -> None:
    assert (demo_model.path() / "model.safetensors").stat().st_size <= LARGEST


def test_the_chat_template_renders_what_training_used(words: Any) -> None:
    turns = [dialogue.Turn("What is len?", "A function."), dialogue.Turn("And abs?", "Another.")]
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    assert words.apply_chat_template(messages, tokenize=False) == dialogue.conversation(
        turns, "Be brief."
    )


def test_the_generation_prompt_is_the_assistants_mark(words: Any) -> None:
    ids = words.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[0] == words.bos_token_id
    assert ids.count(words.bos_token_id) == 1
    assert words.convert_ids_to_tokens(ids[-1]) == dialogue.ASSISTANT


def test_an_unknown_role_is_refused(words: Any) -> None:
    with pytest.raises(Exception, match="unknown role: robot"):
        words.apply_chat_template([{"role": "robot", "content": "beep"}], tokenize=False)


@pytest.mark.parametrize(
    "text",
    ["What is os.path?", "na\u00efve \u2013 \u65e5\u672c\u8a9e \U0001f680", "", "  tabs\t\n"],
)
def test_both_tokenizer_libraries_give_the_same_ids_and_the_text_back(
    words: Any, text: str
) -> None:
    plain = Tokenizer.from_file(str(demo_model.path() / "tokenizer.json"))
    ids = words(text).input_ids
    assert ids == plain.encode(text).ids
    assert words.decode(ids, skip_special_tokens=True) == text


def test_the_facts_are_what_the_interpreter_says() -> None:
    facts = {entry.name: entry for entry in corpus.collect()}
    assert facts["len"].summary == len.__doc__
    assert facts["dict.keys"].kind == "method"
    assert facts["lambda"].kind == "keyword"
    assert all(0 < len(fact.summary) <= corpus.SUMMARY_LIMIT for fact in facts.values())


def test_an_epoch_is_the_same_for_the_same_seed_only() -> None:
    entries = corpus.collect()[:200]
    first = dialogue.epoch(entries, random.Random(3), chat_only=False)
    assert first == dialogue.epoch(entries, random.Random(3), chat_only=False)
    assert first != dialogue.epoch(entries, random.Random(4), chat_only=False)


def test_training_never_sees_a_held_out_phrasing() -> None:
    entries = corpus.collect()[:200]
    text = "".join(dialogue.epoch(entries, random.Random(0), chat_only=True))
    for phrasing in phrasings.HELD_OUT:
        assert phrasing.split("{n}")[0] not in text


def test_only_answers_and_their_ends_are_counted() -> None:
    user, assistant, end, word = 4, 5, 2, 9
    tokens = [1, user, word, assistant, word, end, user, word, assistant, end]
    assert batches.counted_tokens(tokens, assistant, end) == [
        *[False] * 4, True, True, False, False, False, True
    ]  # fmt: skip


def test_every_token_of_a_short_text_is_in_a_batch_once() -> None:
    packer = batches.Packer(16)
    for start in range(0, 4000, 10):
        packer.add(list(range(start, start + 10)), [True] * 10)
    labels = [label for rows in packer.take(rest=True) for row in rows for label in row.labels]
    assert sorted(labels) == [token for token in range(4000) if token % 10]


def test_texts_of_a_row_do_not_see_each_other() -> None:
    row = batches.Row()
    row.add([1, 7, 8], [True] * 3)
    row.add([1, 9], [True] * 2)
    mask = batches.collate([row], batches.SHORT_ROW, separate=True).mask
    assert mask is not None
    seen = (mask[0, :3, :3] == 0).tolist()
    assert seen == [[True, False, False], [True, True, False], [False, False, True]]
