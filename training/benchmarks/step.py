"""Benchmark of a training step against the original's algorithm: time, operations and memory.

Both train the same shapes in the same dtype on the same captions, which are as long as those of Conceptual Captions,
taking turns.
"""

import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from modeling_fromage import FromageForConditionalGeneration
from modeling_fromage.packing_fromage import PackedRows

from ..publishing.provenance import provenance
from .baseline import PlainFromage
from .presets import MAX_LENGTH, PRESETS, Preset, join, make_backbones
from .timing import in_new_process, memory_counter, product_rate, reset_peak_memory, seconds_of

MODES = ("baseline", "live", "cached")


def caption_lengths(count: int) -> torch.Tensor:
    """Caption lengths in tokens, BOS and `[RET]` included, shuffled.

    They are quantiles of a log-normal distribution with a mean of about 11, clipped at 24, as in Conceptual Captions.
    """
    quantiles = torch.distributions.Normal(2.33, 0.38).icdf((torch.arange(count) + 0.5) / count).exp()
    lengths = quantiles.round().clamp(5, MAX_LENGTH).long()
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def make_batch(preset: Preset, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = caption_lengths(preset.batch_size)
    tokens = torch.randint(4, preset.vocab_size, (preset.batch_size, MAX_LENGTH), generator=generator)
    place = torch.arange(MAX_LENGTH)
    tokens = tokens.masked_fill(place >= lengths[:, None], 1).masked_fill(place == lengths[:, None] - 1, preset.ret_id)
    tokens[:, 0] = 2
    size = preset.vision["image_size"]
    pixels = torch.rand(preset.batch_size, 3, size, size, generator=generator)
    return {"tokens": tokens.to(device), "lengths": lengths.to(device), "pixel_values": pixels.to(device, dtype)}


def make_step(mode: str, preset: Preset, device: str) -> Callable[[], torch.Tensor]:
    """A training step of one mode on one batch: forward, backward, clipping, AdamW, and the norm of `[RET]`."""
    # The original trims the embedding matrix to the tokenizer's size.
    language_model, vision_model = make_backbones(preset, device, preset.ret_id + 1 if mode == "baseline" else None)
    batch = make_batch(preset, device, getattr(torch, preset.dtype))
    if mode == "baseline":
        return plain_step(language_model, vision_model, batch)
    return our_step(join(preset, language_model, vision_model).train(), our_inputs(preset, batch), mode == "cached")


def plain_step(
    language_model: PreTrainedModel, vision_model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> Callable[[], torch.Tensor]:
    model = PlainFromage(language_model, vision_model).to(batch["tokens"].device)
    optimizer = torch.optim.AdamW(model.trained(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch["pixel_values"], batch["tokens"], batch["lengths"])
        loss.backward()
        model.mask_gradient()
        torch.nn.utils.clip_grad_norm_(model.trained(), 1.0)
        optimizer.step()
        model.normalize_ret()
        return loss.detach()

    return step


def our_inputs(preset: Preset, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of `forward` as the collator would build them."""
    mask = (torch.arange(MAX_LENGTH, device=batch["tokens"].device) < batch["lengths"][:, None]).long()
    # The captioning row of the collator: the image, then the caption without [RET].
    image = torch.full_like(batch["tokens"][:, :1], preset.image_id)
    input_ids = torch.cat([image, batch["tokens"]], dim=1)[:, :-1]
    attention_mask = torch.cat([torch.ones_like(image), mask[:, 1:]], dim=1)  # without [RET]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill((attention_mask == 0) | (input_ids == preset.image_id), -100),
        "retrieval_input_ids": batch["tokens"],
        "retrieval_attention_mask": mask,
        "pixel_values": batch["pixel_values"],
    }


def our_step(
    model: FromageForConditionalGeneration, inputs: dict[str, torch.Tensor], cached: bool
) -> Callable[[], torch.Tensor]:
    if cached:
        pixels = inputs.pop("pixel_values")
        inputs["pooled_image_features"] = model.get_pooled_image_features(pixels)
    trained = list(model.adapter.parameters())
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.normalize_ret_embedding()
        return loss.detach()

    return step


# ---- measuring ----


def operations_of(step: Callable[[], torch.Tensor]) -> int:
    """Floating-point operations of a step's matrix products and attention, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def floor_operations(preset: Preset) -> dict[str, int]:
    """The operations that any implementation must do, without attention in the language model, which is small."""
    d, ffn, layers = preset.text["hidden_size"], preset.text["ffn_dim"], preset.text["num_hidden_layers"]
    per_token = 2 * layers * (4 * d * d + 2 * d * ffn)  # transformer blocks, forward
    head = 2 * d * (preset.ret_id + 1)
    lengths = caption_lengths(preset.batch_size)
    n, text = preset.batch_size, int(lengths.sum())
    captioning = 2 * per_token * (text - n)  # forward and backward: visual token, BOS, and words but the last
    captioning += 2 * head * (text - n)  # targets: BOS and words, forward and backward
    retrieval = per_token * (text - n) + head * (text - n)  # prefixes need no gradient: forward only
    retrieval += 2 * per_token * n  # [RET], forward and backward
    v = preset.vision
    patches = (v["image_size"] // v["patch_size"]) ** 2 + 1
    width, inner = v["hidden_size"], v["intermediate_size"]
    vision = 2 * n * patches * v["num_hidden_layers"] * (4 * width * width + 2 * width * inner)
    vision += 4 * n * patches**2 * width * v["num_hidden_layers"]  # attention
    return {"cached": captioning + retrieval, "live": captioning + retrieval + vision}


def matrix_rate(preset: Preset, device: str) -> float:
    """Operations per second of a matrix product of the step's shape: all tokens times a feed-forward weight."""
    tokens, d, ffn = places_of(preset)["ours"], preset.text["hidden_size"], preset.text["ffn_dim"]
    return product_rate(tokens, d, ffn, getattr(torch, preset.dtype), device)


def places_of(preset: Preset) -> dict[str, int]:
    """Tokens in the two passes of a step, and the positions that the language model computes for them."""
    lengths = caption_lengths(preset.batch_size)
    n, text = preset.batch_size, int(lengths.sum())
    ours = n  # [RET] after the cached prefixes
    for tokens in (lengths - 1, lengths - 1):  # visual token, BOS and words but the last; BOS and words
        packed = PackedRows(torch.arange(MAX_LENGTH) < tokens[:, None])
        ours += packed.rows * packed.length
    return {"tokens": 2 * text - n, "ours": ours, "baseline": n * (2 * MAX_LENGTH + 1)}


def measure_memory(mode: str, preset_name: str, device: str) -> int:
    """Peak bytes of three steps above the weights. Call it in a process of its own."""
    step = make_step(mode, PRESETS[preset_name], device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # return what building the model freed
        reset_peak_memory()
        before = memory_counter("VmRSS")
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else memory_counter("VmHWM") - before


def measure(preset_name: str, device: str) -> dict[str, Any]:
    preset = PRESETS[preset_name]
    steps = {mode: make_step(mode, preset, device) for mode in MODES}
    losses = {mode: steps[mode]().item() for mode in MODES}
    operations = {mode: operations_of(step) for mode, step in steps.items()}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for i in range(preset.rounds):  # take turns, in rotating order
        for mode in MODES[i % 3 :] + MODES[: i % 3]:
            seconds[mode].append(seconds_of(steps[mode], device))
    del steps
    floor = floor_operations(preset)
    median = {mode: statistics.median(times) for mode, times in seconds.items()}
    rate = matrix_rate(preset, device)
    memory = {mode: in_new_process(measure_memory, mode, preset_name, device) for mode in MODES}
    lengths = caption_lengths(preset.batch_size)
    results = {
        "preset": preset_name,
        "batch_size": preset.batch_size,
        "dtype": preset.dtype,
        "tokens_per_caption": lengths.float().mean().item(),
        "places": places_of(preset),
        "first_loss": losses,
        "seconds": median,
        "seconds_all": seconds,
        "operations": operations,
        "floor_operations": floor,
        "matrix_rate": rate,
        "memory_above_weights": memory,
        "ratios": {},
    }
    for mode in ("live", "cached"):
        times, counted = median["baseline"] / median[mode], operations["baseline"] / operations[mode]
        results["ratios"][mode] = {
            "time": times,
            "operations": counted,
            "time_over_operations": times / counted,
            "memory": memory[mode] / memory["baseline"],
            "operations_over_floor": operations[mode] / floor[mode],
            "flops_per_second": operations[mode] / median[mode],
            "share_of_matrix_rate": operations[mode] / median[mode] / rate,
        }
    results["ratios"]["baseline"] = {"flops_per_second": operations["baseline"] / median["baseline"]}
    return {**results, **provenance(device)}


# ---- the table ----


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| step | seconds | times as fast | counted operations, times fewer | memory above the weights |",
            "|---|---|---|---|---|"]  # fmt: skip
    names = {"baseline": "the original's algorithm", "live": "ours", "cached": "ours, image features cached"}
    for mode in MODES:
        ratios = results["ratios"].get(mode, {})
        memory = f"{results['memory_above_weights'][mode] / 1e9:.2f} GB"
        faster, fewer = (f"{ratios[key]:.2f}" if key in ratios else "1" for key in ("time", "operations"))
        rows.append(f"| {names[mode]} | {results['seconds'][mode]:.3f} | {faster} | {fewer} | {memory} |")
    places, ratios = results["places"], results["ratios"]
    note = (
        f"{PRESETS[results['preset']].shapes}, batch {results['batch_size']}, {results['dtype']}, captions of "
        f"{results['tokens_per_caption']:.1f} tokens on average; {results['hardware']}, torch "
        f"{results['versions']['torch']}; medians of {len(results['seconds_all']['baseline'])} steps, in turns. "
        f"{places['tokens']} tokens a step take {places['ours']} places of the language model, in the original's "
        f"algorithm {places['baseline']}; ours counts {ratios['live']['operations_over_floor']:.2f} times the "
        f"operations that must be done, at {ratios['live']['flops_per_second'] / 1e9:.0f} GFLOP/s (cached "
        f"{ratios['cached']['flops_per_second'] / 1e9:.0f}, the original's algorithm "
        f"{ratios['baseline']['flops_per_second'] / 1e9:.0f})."
    )
    if "matrix_rate" in results:
        note += (
            f" A bare matrix product of these shapes runs at {results['matrix_rate'] / 1e9:.0f} GFLOP/s: ours reaches "
            f"{ratios['live']['share_of_matrix_rate']:.2f} of that, cached "
            f"{ratios['cached']['share_of_matrix_rate']:.2f}."
        )
    if "run_over_step" in results:
        run = results["run_over_step"]
        note += (
            f" A run of the Trainer with {results['loader_workers']} loader process"
            f"{'es' * (results['loader_workers'] > 1)} keeps {run['live']:.2f} of the bare step's rate from JPEG files "
            f"of 500 pixels, and {run['cached']:.2f} from cached features."
        )
    return "\n".join([*rows, "", note])
