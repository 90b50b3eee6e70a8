"""What the quickstart calls a picture: its name, its keywords, and sentences as a person would type them."""

import hashlib
from collections.abc import Sequence

from .emoji import Emoji

# Sentences that are trained on; `{}` stands for a name, in some of them for a keyword.
OF_NAMES = (
    "show me {}", "a picture of {}", "draw {}", "can you find {} for me?", "I am looking for {}", "do you have {}?",
    "here is {}", "this is {}", "look, {}!", "an emoji of {}", "I saw {} today", "that is {}", "I would like {}",
    "send her {}", "let us talk about {}", "what does {} look like?", "my favourite is {}", "I drew {}",
    "do you like {}?", "I dreamt of {} last night", "there was {} in the story", "give me {}, please",
    "{} is what I want", "I bought {} yesterday", "have you seen {} anywhere?", "there is {} on the table",
    "a photo of {} would be nice", "put {} on the card", "is that {} over there?", "we saw {} in town",
    "she wants {} for her birthday", "could you show me {} now?", "{} please", "add {} to the message",
    "I want to see {}", "a drawing of {}",
)  # fmt: skip
OF_KEYWORDS = (
    "something about {}", "it has to do with {}", "anything that goes with {}", "I am thinking of {}", "{}, I mean",
    "it makes me think of {}", "a thing for {}", "the word is {}", "I feel {}", "how {} it is", "it was {} yesterday",
    "we all want {}",
)  # fmt: skip
# Sentences that are not, for the test.
HELD_OUT = (
    "please find me an image of {}", "yesterday we talked about {}", "is there a drawing of {}?", "how about {}?",
    "I have never seen {} before", "we need {} for the poster",
)  # fmt: skip
_SENTENCES, _OF_KEYWORDS, _NAMES = 3, 1, 8  # of an emoji; its name so many times


def texts_of(emoji: Emoji) -> list[str]:
    """The texts of an emoji to draw from in training; its name stands there several times, to be drawn more often."""
    sentences = [template.format(with_article(emoji.name)) for template in _drawn(OF_NAMES, emoji.name, _SENTENCES)]
    keywords = list(emoji.keywords)
    for keyword in _drawn(keywords, emoji.name, _OF_KEYWORDS):
        sentences += [template.format(keyword) for template in _drawn(OF_KEYWORDS, emoji.name, 1)]
    return [*[emoji.name] * _NAMES, *sentences, *keywords]


def with_article(name: str) -> str:
    """A name as it stands in a sentence: "a cat", "an owl", "grapes"."""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _drawn(choices: Sequence[str], key: str, count: int) -> list[str]:
    """`count` choices, by a hash of each with `key`."""
    return sorted(choices, key=lambda each: hashlib.sha256(f"{key}/{each}".encode()).digest())[:count]
