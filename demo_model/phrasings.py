"""The ways to ask: `{n}` stands for a name, `{k}` for its kind, `{d}` for what it does."""

from __future__ import annotations

WHAT = (
    "What does {n} do?",
    "What does {n}() do?",
    "What does `{n}` do?",
    "What does Python's {n} do?",
    "What does the {k} {n} do?",
    "what does {n} do",
    "What is {n}?",
    "What is `{n}`?",
    "What is the {n} {k}?",
    "what is {n}",
    "What is {n} for?",
    "What is {n} used for?",
    "When would I use {n}?",
    "Describe {n}.",
    "Explain {n}.",
    "Explain what {n} does.",
    "Please explain {n}.",
    "Tell me about {n}.",
    "tell me about {n}",
    "How does {n} work?",
    "how to use {n}",
    "I want to know what {n} does.",
    "Can you tell me what {n} does?",
    "And {n}?",
    "What about {n}?",
    "{n}",
    "{n}?",
    "{n}()",
)
BRIEF = ("In one sentence, what does {n} do?", "Describe {n} briefly.", "{n} in short?")
DETAIL = (
    "Explain {n} in detail.",
    "Describe {n} in detail.",
    "What does the documentation of {n} say?",
    "help({n})",
)
EVERYTHING = ("Tell me everything about {n}.", "Write a long text about {n}.")
SIGNATURE = (
    "What is the signature of {n}?",
    "Which arguments does {n} take?",
    "How do I call {n}?",
)
KIND = ("Is {n} a function or a class?", "What kind of thing is {n}?")
MEMBERS = ("What is in {n}?", "List the names in {n}.", "What does {n} contain?")
REVERSE = ("Which {k} does this: {d}", "What is the name of the {k} that does this: {d}")

TASK = ("How do I {t}?", "How can I {t} in Python?", "how to {t}", "I want to {t}.")

# Phrasings that training never sees: the held-out loss is measured on them.
HELD_OUT = ("Could you explain what {n} does?", "What can you tell me about {n}?")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "Answer from the documentation of Python's standard library.",
)

_GREETING = "Hello! Ask me about a name from Python's standard library."
_ABOUT = (
    "I am a very small language model. I know what the documentation of Python's standard library "
    "says, and little else."
)
_ABILITY = (
    "I answer questions about the names in Python's standard library, such as "
    '"What does itertools.chain do?".'
)
_BEYOND = (
    "I do not know. I am a very small model that has only read the documentation of Python's "
    "standard library."
)

SMALL_TALK = (
    *((words, _GREETING) for words in ("Hello", "Hi", "Hello!", "Hi there!", "hey", "hello")),
    *((words, _GREETING) for words in ("Good morning", "How are you?", "Hello, how are you?")),
    *((words, _ABOUT) for words in ("Who are you?", "What are you?", "What is your name?")),
    *((words, _ABOUT) for words in ("Tell me about yourself.", "Are you a language model?")),
    *((words, _ABILITY) for words in ("What can you do?", "Help", "What do you know?", "help me")),
    *((words, "You are welcome.") for words in ("Thanks", "Thank you!", "thank you", "thanks!")),
    *((words, "Goodbye!") for words in ("Goodbye", "Bye", "bye!")),
    (
        "What is Python?",
        "Python is a programming language. Ask me about a name from its standard library.",
    ),
    *(
        (words, _BEYOND)
        for words in (
            "What is the capital of France?",
            "What is the weather like today?",
            "Tell me a joke.",
            "Write a poem.",
            "Write a poem about the sea.",
            "Write a story about a dragon.",
            "Tell me a story.",
            "Who wrote Hamlet?",
            "Who was Albert Einstein?",
            "Who is the president?",
            "What is 2 + 2?",
            "What is two plus two?",
            "How old is the Earth?",
            "How far away is the Moon?",
            "How do I bake a cake?",
            "How do I cook rice?",
            "What should I eat today?",
            "Translate good morning into French.",
            "What is the meaning of life?",
            "Why is the sky blue?",
            "Give me a recipe for soup.",
            "Which team won the game?",
            "What happened in 1969?",
            "What is the largest animal?",
            "Explain quantum physics.",
            "Write a program that prints the primes.",
            "Summarise this article.",
            "Do you like music?",
            "What time is it?",
            "Is it going to rain?",
        )
    ),
)
