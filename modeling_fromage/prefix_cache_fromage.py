"""Keys and values of conversations so far, so that their next turns need not run the whole text anew.

Axes: B rows of text, L tokens, H heads, d a head's width.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .backbones_fromage import attention_window
from .frozen_lm_fromage import FrozenLM

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 28  # of keys and values
_MAX_FEATURES = 256  # images whose pooled features are kept, some kilobytes each
_MAX_ENTRIES = 512  # each is compared with each prompt
_PEFT_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # of PEFT's layers
KeysAndValues = tuple[torch.Tensor, torch.Tensor]
Layers = list[KeysAndValues | None]  # (H, T, d) or (B, H, L, d) each; `None` where a layer borrows another's


@dataclass
class _Entry:
    tokens: torch.Tensor  # (T,), see `identities`
    prompt_length: int  # of these
    layers: Layers
    num_bytes: int


class PrefixCache:
    """What the language model computed for texts that are likely to come back longer: the turns of a chat.

    Only what attention computes is kept, and only where the language model goes on from it as from a whole text, which
    [`FrozenLM.takes`] has tried. Other models, contexts beyond an attention window, and beams start over each time.
    What was kept is dropped when the model changes: its weights, or its PEFT adapters.

    Args:
        max_bytes (`int`, defaults to 256 MiB): Of keys and values; what was not used for longest goes first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._state: Any = None
        self._version = 0  # of the model
        self._count = 0
        self._has_told = False
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:  # a copy starts empty: the lock cannot be copied, and need not
        return type(self), (self.max_bytes,)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._features.clear()

    def check_model(self, model: PreTrainedModel) -> int:
        """Forget everything if `model` is not what it was; returns the number of what it is now.

        The other methods take this number, and know nothing of a model that has changed since.
        """
        state = _state_of(model)
        with self._lock:
            if state != self._state:
                self.clear()
                self._state, self._version = state, self._version + 1
            return self._version

    # ---- images ----------------------------------------------------------------------------------------------------

    def find_features(self, version: int, digest: bytes) -> torch.Tensor | None:
        """Pooled features (vision width,) of the image with this digest."""
        with self._lock:
            if version != self._version:
                return None
            if digest in self._features:
                self._features.move_to_end(digest)
            return self._features.get(digest)

    def keep_features(self, version: int, digest: bytes, features: torch.Tensor) -> None:
        with self._lock:
            if version != self._version:
                return
            self._features[digest] = features.clone()  # not a view that holds a batch in memory
            while len(self._features) > _MAX_FEATURES:
                self._features.popitem(last=False)

    # ---- keys and values -------------------------------------------------------------------------------------------

    def prefix_of(self, version: int, lm: FrozenLM, rows: Sequence[torch.Tensor], new_tokens: int) -> Cache | None:
        """What is known of the first columns of a batch that is padded on the left, all columns but the last at most.

        Args:
            lm: The language model.
            rows: The [`identities`] of each row's tokens.
            new_tokens (`int`): How many will be generated.

        Returns:
            A cache of these columns, or `None` where nothing is known.
        """
        width = max(map(len, rows))
        if not goes_on(lm, width + new_tokens):
            return None
        with self._lock:
            if version != self._version:
                return None
            found = [self._longest(row) for row in rows]
        # A row's known tokens stand behind its padding. What all rows know, or have padding in, need not run.
        starts = [width - len(row) for row in rows]
        columns = min(start + length for start, (_, length) in zip(starts, found, strict=True))
        known = [(entry, columns - start) for start, (entry, _) in zip(starts, found, strict=True)]
        return _join(lm, known, columns) if any(length > 0 for _, length in known) else None

    def keep(
        self,
        version: int,
        lm: FrozenLM,
        rows: Sequence[torch.Tensor | None],
        starts: Sequence[int],
        width: int,
        cache: Any,
    ) -> None:
        """Keep what a generation has computed, in the place of what it went on from.

        Args:
            rows: The [`identities`] of each row's tokens, those that were generated among them; `None` keeps nothing.
            starts: The columns where they begin, behind the padding.
            width (`int`): Columns of the prompts.
            cache: The cache after it.
        """
        if not is_plain(cache) or not goes_on(lm, cache.get_seq_length()):
            return
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if row is None:
                continue
            tokens = row[: cache.get_seq_length() - start]
            layers = _cut(cache, number, start, start + len(tokens))
            num_bytes = sum(2 * each[0].nbytes for each in layers if each is not None)
            if num_bytes > self.max_bytes:
                self._tell_of_room(len(tokens), num_bytes)
                continue
            with self._lock:
                if version != self._version:
                    return
                # An answer that comes back as text may be of other tokens; the prompt before it is not.
                gone = [key for key, old in self._entries.items() if _begins(tokens, old.tokens[: old.prompt_length])]
                for key in gone:
                    del self._entries[key]
                self._entries[self._count] = _Entry(tokens.clone(), width - start, layers, num_bytes)
                self._count += 1
                while self.num_bytes > self.max_bytes or len(self._entries) > _MAX_ENTRIES:
                    self._entries.popitem(last=False)

    def _tell_of_room(self, tokens: int, num_bytes: int) -> None:
        """Say once that a conversation alone is more than is kept, unless nothing is to be."""
        if self.max_bytes and not self._has_told:
            self._has_told = True
            logger.warning(
                "The keys and values of a conversation of %d tokens take %.3g MB, and %.3g MB are kept, so its turns "
                "read again what does not fit. Give more: PrefixCache(max_bytes=...).",
                tokens,
                num_bytes / 1e6,
                self.max_bytes / 1e6,
            )

    def _longest(self, row: torch.Tensor) -> tuple[_Entry | None, int]:
        """The entry that begins most like `row`, and how many tokens of it are alike, not counting the last of `row`,
        which has to run for the first logits."""
        lengths = {key: _common_length(entry.tokens, row[:-1]) for key, entry in self._entries.items()}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or not lengths[best]:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], lengths[best]


def identities(input_ids: Sequence[int], image_token_id: int, digests: Sequence[bytes], k: int) -> torch.Tensor:
    """Tokens (T,), with what each image token stands for in its place: a negative number of image and position.

    Args:
        digests: Of the images, in order.
        k (`int`): Tokens of an image.
    """
    tokens = torch.tensor(input_ids, dtype=torch.long)
    numbers = [-1 - (int.from_bytes(digest[:7], "big") << 6) - j % 64 for digest in digests for j in range(k)]
    tokens[tokens == image_token_id] = torch.tensor(numbers, dtype=torch.long)
    return tokens


def digest_of(pixel_values: torch.Tensor) -> bytes:
    """A digest of one image's pixels (C, height, width), as the encoder gets them."""
    pixels = pixel_values.detach().cpu().contiguous()
    return hashlib.blake2b(pixels.view(torch.uint8).numpy().tobytes() + str(pixels.shape).encode()).digest()


def goes_on(lm: FrozenLM, length: int) -> bool:
    """Whether texts of `length` tokens can go on from what is known of their beginnings."""
    longest = min(attention_window(lm.config.text_config), lm.rope_switch, lm.longest)
    return length < longest and not lm.traits.is_sharded and lm.takes("several tokens behind a cache")


def is_plain(cache: Any) -> bool:
    """Whether a cache is keys and values of all tokens, and nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)  # the latter up to its window, see `goes_on`
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def selected(lm: FrozenLM, cache: Any, rows: torch.Tensor, columns: int) -> DynamicCache:
    """The first `columns` of some rows of a plain cache, which stays as it is."""
    return _filled(
        lm,
        [
            (layer.keys[rows, :, :columns], layer.values[rows, :, :columns]) if layer.is_initialized else None
            for layer in cache.layers
        ],
    )


def _filled(lm: FrozenLM, layers: Layers) -> DynamicCache:
    """A cache of keys and values (B, H, L, d)."""
    cache = DynamicCache(config=lm.decoder.config)
    for number, each in enumerate(layers):
        if each is not None:
            cache.update(*each, number)
    return cache


def _join(lm: FrozenLM, known: Sequence[tuple[_Entry | None, int]], columns: int) -> DynamicCache:
    """The first `columns` of a batch, of which each row knows the last ones: zeros stand in its padding's place."""
    rows = [(row, entry, length) for row, (entry, length) in enumerate(known) if entry is not None and length > 0]
    layers: Layers = []
    for number, first in enumerate(rows[0][1].layers):
        if first is None:
            layers.append(None)
            continue
        keys, values = (each.new_zeros(len(known), each.shape[0], columns, each.shape[2]) for each in first)
        for row, entry, length in rows:
            own_keys, own_values = entry.layers[number] or first
            keys[row, :, columns - length :] = own_keys[:, :length]
            values[row, :, columns - length :] = own_values[:, :length]
        layers.append((keys, values))
    return _filled(lm, layers)


def _cut(cache: Any, row: int, start: int, end: int) -> Layers:
    """Copies of a row's keys and values."""
    return [
        (layer.keys[row, :, start:end].clone(), layer.values[row, :, start:end].clone())
        if layer.is_initialized
        else None
        for layer in cache.layers
    ]


def _common_length(a: torch.Tensor, b: torch.Tensor) -> int:
    n = min(len(a), len(b))
    differs = (a[:n] != b[:n]).nonzero()
    return int(differs[0]) if len(differs) else n


def _begins(longer: torch.Tensor, tokens: torch.Tensor) -> bool:
    return _common_length(longer, tokens) == len(tokens)


def _state_of(model: PreTrainedModel) -> Any:
    """What tells whether a model still computes what it did: its tensors, where they are, how often they were changed,
    one number of each, as PEFT merges behind the counter's back, the state of PEFT's layers, and autocast."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [
        (id(each), -1 if each.is_inference() else each._version, each.dtype, str(each.device)) for each in tensors
    ]
    ordinary = [each for each in tensors if type(each) in (torch.Tensor, nn.Parameter) and not each.is_meta]
    numbers = [each.detach().flatten()[each.numel() // 2].float().cpu() for each in ordinary if each.numel()]
    peft = [str(getattr(module, name)) for module in model.modules() for name in _PEFT_STATE if hasattr(module, name)]
    attention = model.config.text_config._attn_implementation
    kind = model.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return versions, torch.stack(numbers).tolist(), peft, attention, autocast


__all__ = ["PrefixCache"]
