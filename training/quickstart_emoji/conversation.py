"""A short conversation with the quickstart's model, loaded as a user would load it."""

from pathlib import Path
from typing import Any

import torch

from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromagePipeline, FromageProcessor

from .data import Split


def load_pipeline(output: Path, image_root: Path, dtype: torch.dtype) -> FromagePipeline:
    """The saved model, processor and image index in `output` as a pipeline."""
    return FromagePipeline(
        model=FromageForConditionalGeneration.from_pretrained(output / "model", dtype=dtype),
        processor=FromageProcessor.from_pretrained(output / "model"),
        index=FromageImageIndex.from_pretrained(output / "index", image_root=image_root),
    )


def converse(pipe: FromagePipeline, held_out: Split, prompts: list[str]) -> list[dict[str, Any]]:
    """The model describes two held-out images, then answers each prompt with an image."""
    turns: list[dict[str, Any]] = []
    shown: list[str] = []
    for i in (0, len(held_out.images) // 2):
        turns.append({"role": "user", "image": held_out.images[i], "text": f"{pipe.processor.caption_prefix} ..."})
        said = pipe(Path(held_out.images[i]), max_new_tokens=16, max_num_rets=0, eos_token_id=None)
        text = " ".join(segment["text"] for segment in said)
        turns.append({"role": "model", "text": text, "truth": held_out.captions[i]})
        shown.append(held_out.images[i])
    for prompt in prompts:
        turns.append({"role": "user", "text": prompt})
        turns.append(answer(pipe, prompt, shown))
        shown += [turns[-1]["image"]] if "image" in turns[-1] else []
    return turns


def answer(pipe: FromagePipeline, prompt: str, shown: list[str]) -> dict[str, Any]:
    """Continue `prompt` up to the image of the first `[RET]`, with the smallest bias that brings one."""
    for ret_bias in (0.0, 2.0, 4.0, 8.0):
        segments = pipe(
            prompt,
            max_new_tokens=8,
            ret_bias=ret_bias,
            eos_token_id=pipe.processor.ret_token_id,
            stop_strings=None,
            exclude_ids=shown,
        )
        text = " ".join(segment["text"] for segment in segments if segment["type"] == "text")
        turn = {"role": "model", "text": text, "ret_bias": ret_bias}
        if segments and segments[-1]["type"] == "image":
            found = segments[-1]
            caption = found["metadata"]["caption"]
            return {**turn, "image": found["id"], "score": found["score"], "image_caption": caption}
    return turn
