"""Benchmark of a chat: each turn goes on from what the turns before have computed, or starts over.

Ten turns, an image in every other of the first seven, greedy answers. Starting over, ours encodes the images and reads
the whole conversation once a turn. The original's algorithm does so for each token that it writes.
"""

import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_fromage import FromageChat, FromagePipeline, FromageProcessor
from modeling_fromage.prefix_cache_fromage import PrefixCache

from ..publishing.provenance import provenance
from .answers import Sides
from .presets import PRESETS
from .run import make_processor
from .timing import seconds_of

TURNS, WORDS, ANSWER_TOKENS = 10, 60, 16
WITH_IMAGE = (0, 2, 4, 6)
_LETTERS = "abcefghijklmnpqstuvxyz"  # of answers: each is one token, written and read
Turn = list[Any]


class OnlyLetters(LogitsProcessor):
    """Lets a model with random weights write what its tokenizer reads as the same tokens."""

    def __init__(self, processor: FromageProcessor):
        tokenizer: Any = processor.tokenizer
        self.letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(_LETTERS)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_copy(1, self.letters, scores[:, self.letters])


def make_turns(image_size: int, words: int) -> list[Turn]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)) for _ in WITH_IMAGE]
    texts = [" ".join(["word"] * (words + number)) for number in range(TURNS)]
    return [[images.pop(), text] if number in WITH_IMAGE else [text] for number, text in enumerate(texts)]


def talk(pipe: FromagePipeline, turns: list[Turn], device: str) -> tuple[list[float], list[str]]:
    """Seconds of each turn of a conversation, and its answers."""
    chat, seconds = FromageChat(pipe), []
    for turn in turns:
        seconds.append(seconds_of(partial(chat.send, *turn), device))
    return seconds, [str(message["content"]) for message in chat.messages if message["role"] == "assistant"]


def measure(preset_name: str, device: str, rounds: int, words: int = WORDS) -> dict[str, Any]:
    preset = PRESETS[preset_name]
    sides = Sides(preset, device)
    processor = make_processor(preset)
    options: dict[str, Any] = {
        "max_new_tokens": ANSWER_TOKENS, "max_num_rets": 0, "eos_token_id": preset.image_id, "stop_strings": [],
        "logits_processor": LogitsProcessorList([OnlyLetters(processor)]),
    }  # fmt: skip
    pipes = {
        name: FromagePipeline(model=sides.model, processor=processor, prefix_cache=cache, **options)
        for name, cache in {"goes on": PrefixCache(), "starts over": PrefixCache(max_bytes=0)}.items()
    }
    turns = make_turns(preset.vision["image_size"], words)
    seconds: dict[str, list[list[float]]] = {name: [] for name in pipes}
    answers = {}
    talk(pipes["goes on"], turns[:2], device)  # what is tried once is tried now
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.prefix_cache.clear()
            spent, answers[name] = talk(pipe, turns, device)
            seconds[name].append(spent)
    median = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in seconds.items()}
    median["original"] = [_original(sides, number, words, device) for number in range(TURNS)]
    last = {name: each[-1] for name, each in median.items()}
    return {
        "preset": preset_name,
        "dtype": preset.dtype,
        "turns": TURNS,
        "images": len(WITH_IMAGE),
        "words_a_turn": words,
        "answer_tokens": ANSWER_TOKENS,
        "same_answers": answers["goes on"] == answers["starts over"],
        "seconds": median,
        "seconds_all": seconds,
        "ratios": {
            "turn ten": last["starts over"] / last["goes on"],
            "all turns": sum(median["starts over"]) / sum(median["goes on"]),
            "turn ten, original": last["original"] / last["goes on"],
            "all turns, original": sum(median["original"]) / sum(median["goes on"]),
        },
        **provenance(device),
    }


def _original(sides: Sides, number: int, words: int, device: str) -> float:
    """Seconds that the original's algorithm takes for a turn of as many tokens and images."""
    images = sum(turn <= number for turn in WITH_IMAGE)
    tokens = (number + 1) * words + number * ANSWER_TOKENS
    ids = torch.randint(4, sides.preset.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    pixels, ids = sides.pixels[:images], ids.to(device)
    return seconds_of(lambda: sides.plain.generate(sides.plain.prompt(pixels, ids), ANSWER_TOKENS), device)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| | the original's algorithm | starts over | goes on | times as fast |", "|---|---|---|---|---|"]
    seconds, ratios = results["seconds"], results["ratios"]
    for name, total in {"turn ten": lambda each: each[-1], "all turns": sum}.items():
        cells = [f"{total(seconds[side]):.2f} s" for side in ("original", "starts over", "goes on")]
        rows.append(f"| {name} | {' | '.join(cells)} | {ratios[f'{name}, original']:.1f} and {ratios[name]:.1f} |")
    rounds = len(results["seconds_all"]["goes on"])
    note = (
        f"{results['turns']} turns of {results['words_a_turn']} words and {results['answer_tokens']} tokens of answer, "
        f"{results['images']} images; {results['dtype']}, {results['hardware']}; medians of {rounds} conversations, in "
        "turns, of the original's algorithm one. "
        + ("Both of ours write the same answers." if results["same_answers"] else "Their answers differ.")
    )
    return "\n".join([*rows, "", note])
