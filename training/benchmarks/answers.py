"""Benchmark of generation and candidate scoring against the original's algorithm.

The prompt has the size of the paper's VIST prompts: four images and five captions. Both sides continue it greedily in
the same dtype, taking turns; the time includes encoding the images. The original takes one prompt at a time. Scoring
has the size of VisDial: an image, ten rounds of dialogue, and 100 answers. Ranking scores the answers of all ten
rounds, by the authors' protocol.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..publishing.provenance import provenance
from .baseline import PlainFromage
from .presets import PRESETS, Preset, join, make_backbones
from .timing import seconds_of

IMAGES, PROMPT_TOKENS, DIALOGUE_TOKENS, CANDIDATES, BATCH, ROUNDS = 4, 56, 120, 100, 8, 10
RANKING = f"{ROUNDS} x {CANDIDATES} answers"


class Sides:
    """Our model and the baseline with the same weights, and the inputs of both."""

    def __init__(self, preset: Preset, device: str):
        self.preset = preset
        language_model, vision_model = make_backbones(preset, device)
        self.model = join(preset, language_model, vision_model)
        trimmed, _ = make_backbones(preset, device, preset.ret_id + 1)
        weights = language_model.state_dict()
        trimmed.load_state_dict({k: v[: preset.ret_id + 1] if len(v) == preset.rows else v for k, v in weights.items()})
        self.plain = PlainFromage(trimmed, vision_model).to(device)
        adapter = self.model.adapter
        self.plain.visual_embeddings.load_state_dict(adapter.multi_modal_projector.state_dict())
        self.plain.text_fc.load_state_dict(adapter.text_projection[0].state_dict())
        with torch.no_grad():
            self.plain.embeddings.weight[preset.ret_id] = adapter.ret_embedding.weight[0]
        generator = torch.Generator().manual_seed(0)
        size = preset.vision["image_size"]
        pixels = torch.rand(IMAGES, 3, size, size, generator=generator)
        self.pixels = pixels.to(device, getattr(torch, preset.dtype))
        self.tokens = torch.randint(4, preset.vocab_size, (1, PROMPT_TOKENS), generator=generator).to(device)
        self.dialogue = torch.randint(4, preset.vocab_size, (1, DIALOGUE_TOKENS), generator=generator).to(device)
        lengths = torch.arange(CANDIDATES) % 8 + 2  # BOS and an answer of one to eight tokens
        self.candidates = [
            torch.randint(4, preset.vocab_size, (int(n),), generator=generator).to(device) for n in lengths
        ]

    def ids(self, tokens: torch.Tensor, images: int) -> torch.Tensor:
        image = tokens.new_full((1, 1), self.preset.image_id)
        return torch.cat([part for piece in tokens.tensor_split(images, dim=1) for part in (image, piece)], dim=1)

    def plain_generation(self, count: int) -> torch.Tensor:
        return self.plain.generate(self.plain.prompt(self.pixels, self.tokens), count)

    def our_generation(self, count: int, batch: int = 1) -> torch.Tensor:
        ids = self.ids(self.tokens, IMAGES).repeat(batch, 1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.pixels.repeat(batch, 1, 1, 1),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=self.preset.image_id,  # never generated: both sides write `count` tokens
            pad_token_id=1,
            return_dict_in_generate=True,
        )
        return output.sequences[:, ids.shape[1] :]

    def plain_scores(self, batch_size: int) -> torch.Tensor:
        return self.plain.score(self.plain.prompt(self.pixels[:1], self.dialogue), self.candidates, batch_size)

    def our_scores(self) -> torch.Tensor:
        ids = self.ids(self.dialogue, 1)
        return self.model.score_candidates(ids, None, *self._padded_candidates(), pixel_values=self.pixels[:1])[0]

    def _padded_candidates(self) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence(self.candidates, batch_first=True, padding_value=-1)
        return padded.clamp(min=0), (padded >= 0).long()

    def _dialogues(self) -> list[torch.Tensor]:
        """The dialogue up to each round's question."""
        return [self.dialogue[:, : DIALOGUE_TOKENS * i // ROUNDS] for i in range(1, ROUNDS + 1)]

    def plain_ranking(self) -> torch.Tensor:
        """Scores (rounds, candidates); the dialogue is encoded again for every answer."""
        rows = [
            self.plain.score(self.plain.prompt(self.pixels[:1], dialogue), self.candidates, 20, shift=False)
            for dialogue in self._dialogues()
        ]
        return torch.stack(rows)

    def our_ranking(self) -> torch.Tensor:
        """Scores (rounds, candidates) as in `training.evaluation.answers`: the image once, all rounds in a batch."""
        pooled = self.model.get_pooled_image_features(self.pixels[:1])
        rows = [self.ids(dialogue, 1)[0].flip(0) for dialogue in self._dialogues()]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).flip(1)
        return self.model.score_candidates(
            ids.clamp(min=0),
            (ids >= 0).long(),
            *self._padded_candidates(),
            pooled_image_features=pooled.expand(ROUNDS, -1),
            shift=False,
        )


def seconds_in_turns(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def measure(preset_name: str, device: str, rounds: int) -> dict[str, Any]:
    lengths = (8, 16) if preset_name == "tiny" else (32, 128)
    sides = Sides(PRESETS[preset_name], device)
    same = sides.plain_generation(lengths[0]).equal(sides.our_generation(lengths[0]))
    difference = (sides.plain_scores(20) - sides.our_scores()).abs().max().item()
    plain_ranking, our_ranking = sides.plain_ranking(), sides.our_ranking()
    same_ranks = plain_ranking.argsort(dim=-1).equal(our_ranking.argsort(dim=-1))
    ranking_difference = (plain_ranking - our_ranking).abs().max().item()
    seconds = {}
    for length in lengths:
        runs = {
            "plain": lambda length=length: sides.plain_generation(length),
            "ours": lambda length=length: sides.our_generation(length),
            "ours, batched": lambda length=length: sides.our_generation(length, BATCH),
        }
        seconds[f"{length} tokens"] = seconds_in_turns(runs, rounds, device)
    runs = {f"plain, {size} at a time": lambda size=size: sides.plain_scores(size) for size in (1, 20)}
    seconds["scoring"] = seconds_in_turns({**runs, "ours": sides.our_scores}, min(rounds, 3), device)
    runs = {"plain": sides.plain_ranking, "ours": sides.our_ranking}
    seconds["ranking"] = seconds_in_turns(runs, min(rounds, 3), device)
    median = {
        part: {name: statistics.median(times) for name, times in sides_.items()} for part, sides_ in seconds.items()
    }
    ratios = {}
    for length in lengths:
        part = median[f"{length} tokens"]
        ratios[f"{length} tokens"] = part["plain"] / part["ours"]
        ratios[f"{length} tokens, batch {BATCH}"] = BATCH * part["plain"] / part["ours, batched"]
    plain = min(seconds for name, seconds in median["scoring"].items() if name != "ours")
    ratios[f"{CANDIDATES} candidates"] = plain / median["scoring"]["ours"]
    ratios[RANKING] = median["ranking"]["plain"] / median["ranking"]["ours"]
    return {
        "preset": preset_name,
        "dtype": PRESETS[preset_name].dtype,
        "prompt": {"images": IMAGES, "tokens": PROMPT_TOKENS, "dialogue_tokens": DIALOGUE_TOKENS},
        "same_tokens": same,
        "largest_score_difference": difference,
        "same_ranks": same_ranks,
        "largest_ranking_difference": ranking_difference,
        "seconds": median,
        "seconds_all": seconds,
        "ratios": ratios,
        **provenance(device),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| | the original's algorithm | ours | times as fast |", "|---|---|---|---|"]
    for part, ratio in results["ratios"].items():
        if "candidates" in part:
            medians = results["seconds"]["scoring"]
            plain = min(seconds for name, seconds in medians.items() if name != "ours")
            ours, name = medians["ours"], f"score {part}"
        elif part == RANKING:
            plain, ours, name = *results["seconds"]["ranking"].values(), f"rank {part} (VisDial)"
        else:
            medians, is_batch = results["seconds"][part.partition(",")[0]], "batch" in part
            plain = medians["plain"] * (BATCH if is_batch else 1)
            ours, name = medians["ours, batched" if is_batch else "ours"], f"write {part}"
        rows.append(f"| {name} | {plain:.2f} s | {ours:.2f} s | {ratio:.1f} |")
    prompt = results["prompt"]
    note = (
        f"The same shapes, {results['dtype']}, {results['hardware']}; medians of "
        f"{len(results['seconds_all']['scoring']['ours'])} runs, in turns. A prompt has {prompt['images']} images and "
        f"{prompt['tokens']} tokens, a dialogue to be answered {prompt['dialogue_tokens']}; the original's algorithm "
        f"takes one prompt at a time, scores with the faster of 1 and 20 answers at a time, and ranks with 20. Both "
        f"write the same tokens and rank alike."
    )
    return "\n".join([*rows, "", note])
