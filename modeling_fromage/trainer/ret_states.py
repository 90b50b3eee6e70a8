"""Hidden states of `[RET]` behind captions, on disk: constants while the language model and `[RET]` stay as they are.

They are to captions what cached features are to images. Axes: N captions, width that of a layer's hidden states, times
the number of `[RET]` tokens, whose states stand side by side.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils.logging import tqdm

from ..checkpoint_origin_fromage import weights_digest
from ..file_writing_fromage import replace_file
from ..modeling_fromage import FromageForConditionalGeneration
from ..training_losses_fromage import ret_hidden_states
from .data_collator import FromageDataCollator
from .document_contexts import Prompt

MANIFEST = "manifest.json"
SHARD_SIZE = 8192  # captions
_TEXTS, _PLACES = 256, 16_384  # of a pass


def describe(model: FromageForConditionalGeneration, collator: FromageDataCollator, count: int) -> dict[str, Any]:
    """Everything that the states of `count` captions depend on, but the captions, of which shards keep a digest."""
    config, tokenizer = model.config, collator.processor.tokenizer
    weights = weights_digest(model.language_model.state_dict())
    ret = model.adapter.ret_embedding.weight.detach().to("cpu", torch.float32)
    return {
        "language_model": _digest(json.dumps(weights, sort_keys=True).encode()),
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "ret_embedding": _digest(ret.numpy().tobytes()),
        "ret_embedding_scale": config.ret_embedding_scale,
        "text_embed_layers": list(config.text_embed_layers),
        "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode()),
        "max_length": collator.max_length,
        "num_captions": count,
        "shard_size": SHARD_SIZE,
        **({"num_ret_tokens": config.num_ret_tokens} if config.num_ret_tokens > 1 else {}),
    }


class RetStates:
    """Hidden states of `[RET]` behind N captions, read from the files that [`cache_ret_states`] wrote.

    Args:
        directory (`Path`): Their folder. The files are mapped into memory, not read whole.
        count (`int`): N.
    """

    def __init__(self, directory: Path, count: int):
        self._count = count
        self._shards: list[list[torch.Tensor]] = []
        for path in shard_paths(directory, count):
            with safe_open(path, "pt") as file:
                self._shards.append([file.get_tensor(name) for name in sorted(file.keys())])

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """The states of captions `indices` (n,): (n, width) a layer, in fp32."""
        shard, row = indices // SHARD_SIZE, indices % SHARD_SIZE
        layers = [torch.empty(len(indices), layer.shape[1]) for layer in self._shards[0]]
        for number in shard.unique().tolist():
            here = shard == number
            for layer, stored in zip(layers, self._shards[number], strict=True):
                layer[here] = stored[row[here]].float()
        return layers


def shard_paths(directory: Path, count: int) -> list[Path]:
    return [directory / f"ret-states-{number:05d}.safetensors" for number in range(-(-count // SHARD_SIZE))]


def cache_ret_states(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    captions: Sequence[str | Prompt],
    directory: Path,
) -> None:
    """Run the frozen language model once over captions, and keep its hidden states at `[RET]`.

    An interrupted run leaves whole shards, which the next one keeps. Each is stored in fp16, or in bf16 if that is the
    language model's dtype; in fp32 where fp16 would overflow.

    Args:
        model ([`FromageForConditionalGeneration`]): With a frozen language model, and `[RET]` as it will be.
        collator ([`FromageDataCollator`]): Lays captions out.
        captions (`Sequence[str | Prompt]`): N captions, or prompts, tuples of token ids that end in `[RET]`.
        directory (`Path`): Folder of the cache; made if needed.

    Raises:
        ValueError: `directory` has states of another language model, `[RET]`, tokenizer, layout or other captions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _check_manifest(directory / MANIFEST, describe(model, collator, len(captions)))
    paths = shard_paths(directory, len(captions))
    for number, path in enumerate(tqdm(paths, desc="Caching [RET] states")):
        own = list(captions[number * SHARD_SIZE : (number + 1) * SHARD_SIZE])
        ids, mask = collator.retrieval_inputs(own).values()
        digest = _digest(ids.numpy().tobytes())
        if (known := _captions_of(path, len(own))) is None:
            states = _encode(model, ids, mask)
            replace_file(path, save(states, {"captions": digest}))
        elif known != digest:
            raise ValueError(
                f"{path} has states of other captions, or of others in this place. Give another "
                "`ret_state_cache`, or remove that folder."
            )


def _encode(model: FromageForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """States of texts (N, L), those of one shard, by the names that they have in its file, which sort by layer."""
    lm, found = model.frozen_lm(), []
    # In alphabetical order, so to speak: texts that begin alike share a pass.
    order = torch.tensor(sorted(range(len(ids)), key=ids.tolist().__getitem__))
    for rows in tqdm(_passes(order, mask.sum(-1)), desc="Captions", leave=False):
        used = mask[rows].any(0)
        batch = (tensor[rows][:, used].to(model.device) for tensor in (ids, mask))
        found.append([layer.cpu() for layer in ret_hidden_states(lm, *batch)])
    back = order.argsort()
    layers = [torch.cat(layer)[back] for layer in zip(*found, strict=True)]
    if not all(layer.isfinite().all() for layer in layers):
        raise ValueError(
            f"Hidden states of [RET] are not finite in {model.language_model.dtype}. Load the language model in "
            "bfloat16 or float32."
        )
    return {f"layer-{number:03d}": as_stored(layer) for number, layer in enumerate(layers)}


def _passes(order: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Texts in `order`, split so that a pass has at most as many, and places with those of padding, as is set above."""
    passes: list[list[int]] = [[]]
    longest = 0
    for number in order.tolist():
        longest = max(longest, int(lengths[number]))
        if passes[-1] and (len(passes[-1]) == _TEXTS or (len(passes[-1]) + 1) * longest > _PLACES):
            passes.append([])
            longest = int(lengths[number])
        passes[-1].append(number)
    return [torch.tensor(rows) for rows in passes]


def as_stored(rows: torch.Tensor) -> torch.Tensor:
    """`rows` (N, width) in fp16, or unchanged where they are in bf16, or fp16 would overflow or lose small values."""
    if rows.dtype == torch.bfloat16:
        return rows
    half, exact = rows.half(), rows.float()
    error = (half.float() - exact).norm(dim=-1)
    return half if (error <= 2**-10 * exact.norm(dim=-1)).all() else rows


def _check_manifest(path: Path, expected: dict[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there."""
    if not path.is_file():
        replace_file(path, json.dumps(expected, indent=1).encode())
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differences = [f"{name} {found.get(name)!r}, not {value!r}" for name, value in expected.items()
                   if found.get(name) != value]  # fmt: skip
    if differences:
        raise ValueError(
            f"{path.parent} has [RET] states of another run: {'; '.join(differences)}. Give another "
            "`ret_state_cache`, or remove that folder."
        )


def _captions_of(path: Path, count: int) -> str | None:
    """The digest of a shard's captions; `None` where the file is not there or not whole."""
    try:
        with safe_open(path, "pt") as file:
            whole = all(file.get_slice(name).get_shape()[0] == count for name in file.keys())  # noqa: SIM118
            return (file.metadata() or {}).get("captions") if whole else None
    except (OSError, SafetensorError):
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


__all__ = ["RetStates", "as_stored", "cache_ret_states"]
