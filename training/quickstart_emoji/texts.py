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
    "I want to see {}", "a drawing of {}", "{} was here", "{} in the garden", "{}, of course", "{} and nothing else",
    "{}? yes please", "{} of my own", "{} by the window", "{} would be perfect", "{} makes me happy",
    "{} for my little brother", "{} again!", "{} or something like it", "{} at the top of the page", "{} is on my mind",
    "{} came up in class today", "I love {}", "I have {} at home", "I need {}", "I remember {} from my childhood",
    "I can see {} from here", "I would rather have {} than anything else", "I think {} would look good here",
    "I got {} as a present", "I found {} under the bed", "I told him about {} and he laughed", "I will take {}",
    "I lost {} last week", "I learned the word for {} in Spanish", "I took a photo of {} with my phone",
    "I cannot stop looking at {}", "who has {}?", "where is {}?", "where did you get {}?", "why is {} in the picture?",
    "when did you last see {}?", "what colour is {}?", "what about {} instead?", "which one is {}?", "can I have {}?",
    "can you draw {} for us?", "could we use {} in the logo?", "did you notice {} on the left?", "would {} work?",
    "are you sure that is {}?", "is it {} or not?", "have we got {} already?", "should I bring {} to the party?",
    "does {} cost a lot?", "reply with {}", "use {} as the icon", "look for {} in the list", "find {}",
    "choose {} from the menu", "tell me more about {}", "think of {}", "imagine {} in the middle of a field",
    "paint {} on the wall", "replace it with {}", "end the sentence with {}", "start with {} and go on from there",
    "say it with {}", "post {} under the photo", "search for {} please", "get me {} quickly", "print {} twice",
    "guess what: {}", "the story is about {}", "the first thing I saw was {}", "the answer is {}, I believe",
    "the sign shows {}", "the children were playing with {} all day", "the shop sells {} on Mondays",
    "the page begins with {}", "the best thing about the trip was {}", "the picture on the right shows {}",
    "the film opens with {} on screen", "my sister wants {}", "my grandmother used to have {}",
    "my new wallpaper has {} on it", "my son is afraid of {}", "our teacher explained {} to us",
    "our team has {} as its mascot", "we are looking for {}", "we laughed about {}",
    "we talked about {} for hours and could not stop", "we keep {} in the kitchen", "we passed {} on our way home",
    "he sent me {} this morning", "he pointed at {}", "he was holding {} in his hand", "she drew {} on the envelope",
    "she said it looked like {}", "she dressed up as {} for the carnival", "they put {} in the window",
    "they sell {} here", "they named the boat after {}", "you forgot {}", "you could add {} here",
    "it looks like {} to me", "it reminds me of {}", "it must be {}", "it is just {}, nothing more",
    "it started with {}", "there is {} in my dream every night", "there are many kinds of {}", "here comes {}",
    "here you can see {} up close", "this one is called {}", "this story has {} in it", "this is what {} looks like",
    "that was {} back there", "that looks like {} from far away", "oh, {}!", "wow, {}", "hey, is that {}?",
    "yes, {} it is", "no, I said {}", "ok, {} then", "maybe {} next time", "nothing beats {}", "not {} again",
    "one more: {}", "a sticker with {} on it", "a card with {} for her", "a story about {} and its friends",
    "a small drawing of {} in the corner", "an old photograph of {} on the shelf", "some people like {}",
    "everyone knows {}", "everybody was looking at {}", "someone left {} on the bench", "most of all I miss {}",
    "today's word is {}", "next to the door there was {}", "in the evening we saw {} again",
    "at the zoo or in a book, {} is easy to spot", "for breakfast there was {}",
    "with {} on the cover it would sell better", "let me see {}", "let's pick {} for the title",
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
_SENTENCES, _OF_KEYWORDS, _NAMES = 5, 1, 6  # of an emoji; its name so many times


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
