"""Naming the frozen backbones in a checkpoint, where they still are what the files hold that it would name.

A merged LoRA, an edit of `.data` or a training step of one row leaves no trace in `_version`, and may miss any sample.
So the weights are compared with their files, once; later saves compare a digest with that of the weights then.
"""

import copy
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from .backbone_loading_fromage import PARTS, ROLES, backbone_files, is_relative, reload_backbone, without_report
from .configuration_fromage import FromageConfig
from .fingerprint_fromage import check_fingerprint, fingerprint
from .peft_layers_fromage import names_without_peft, own_parameters

if TYPE_CHECKING:
    from .pretrained_fromage import FromagePreTrainedModel

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes that are hashed at a time, so that what is computed of them stays in the cache
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
BESIDE = 2  # folders up from a checkpoint to where backbones still count as lying beside it: RUN/checkpoint-10


def backbone_references(
    model: "FromagePreTrainedModel",
    directory: Path,
    state_dict: dict[str, torch.Tensor],
    required: bool,
    absolute_paths: bool,
) -> dict[str, Any]:
    """The configuration's fields that name a model's backbones in a checkpoint in `directory`; empty: save them too.

    Args:
        state_dict: The model's.
        required: Whether they must be named.
        absolute_paths: Whether folders of this machine are named by their absolute paths.

    Raises:
        ValueError: They are `required`, and a backbone cannot be named.
    """
    fields: dict[str, Any] = {}
    for prefix, role in ROLES.items():
        name = getattr(model.config, f"{prefix}_model_id")
        if name is None:
            if required:
                raise ValueError(
                    f"Cannot save the trained parts alone: it is not known where the {role} came from. Use "
                    "save_backbones=True, or assemble the model with from_vision_text_pretrained."
                )
            return {}
        if problem := difference_from_origin(model, prefix, state_dict):
            if required:
                raise ValueError(f"Cannot save the trained parts alone: the {role} {problem}. Use save_backbones=True.")
            logger.warning("The %s %s: the checkpoint in %s will hold it whole.", role, problem, directory)
            return {}
        if os.path.isdir(name) and absolute_paths:
            name = os.path.abspath(name)
        elif os.path.isdir(name):
            name = os.path.relpath(os.path.realpath(name), os.path.realpath(directory))
            if Path(name).parts[: BESIDE + 1] == (os.pardir,) * (BESIDE + 1) and not required:
                logger.warning(
                    "The %s in %s is on no Hub and does not lie beside %s: the checkpoint will hold it whole. "
                    "save_backbones=False would save a reference to it.",
                    role, getattr(model.config, f"{prefix}_model_id"), directory,
                )  # fmt: skip
                return {}
            name = name if is_relative(name) else os.path.join(os.curdir, name)
        fields[f"{prefix}_model_id"] = name
        if getattr(model.config, f"{prefix}_model_fingerprint") is None:  # taken once; the digest reads whole files
            files = backbone_files(prefix, model.config, model.origins[prefix].loader_kwargs.get("cache_dir"))
            setattr(model.config, f"{prefix}_model_fingerprint", fingerprint(files))
    return fields


def difference_from_origin(
    model: "FromagePreTrainedModel", prefix: str, state_dict: dict[str, torch.Tensor]
) -> str | None:
    """What keeps a checkpoint from naming a backbone: how it differs from what its files hold, in words.

    Args:
        model ([`FromageForConditionalGeneration`]): The model.
        prefix (`"text"` or `"vision"`): The backbone.
        state_dict: The model's. Where it has no weights of the backbone's, only whether that is being trained is asked.

    Raises:
        ValueError: It differs, and its weights are packed by a quantiser that cannot store them.
    """
    problem, backbone = _find_difference(model, prefix, state_dict), getattr(model, PARTS[prefix])
    is_storable = hasattr(backbone, "hf_quantizer") and backbone.hf_quantizer.is_serializable()
    if problem and has_packed_weights(backbone) and not is_storable:
        raise ValueError(
            f"The quantized {ROLES[prefix]} {problem}. It can be saved neither by reference nor whole: change it as it "
            "is without quantization_config, and quantize it when it is loaded."
        )
    return problem


def refuse_local_backbones(model: "FromagePreTrainedModel", compare_weights: bool) -> None:
    """Body of [`FromagePreTrainedModel.refuse_local_backbones`], which documents it."""
    state_dict = names_without_peft(model, model.state_dict()) if compare_weights else {}
    for prefix, role in ROLES.items():
        name = getattr(model.config, f"{prefix}_model_id")
        if name is None or os.path.isdir(name):
            raise ValueError(
                f"The {role} is not on the Hub ({name or 'unknown origin'}), so a repository of the trained parts "
                "could not be loaded elsewhere. Assemble the model from Hub ids, or upload a folder written by "
                "save_pretrained(folder, save_backbones=True) with `hf upload`."
            )
        if problem := difference_from_origin(model, prefix, state_dict):
            raise ValueError(
                f"The {role} {problem}, so a repository of the trained parts would load with another one. Upload a "
                "folder written by save_pretrained(folder, save_backbones=True) with `hf upload`."
            )


def _find_difference(model: "FromagePreTrainedModel", prefix: str, state_dict: dict[str, torch.Tensor]) -> str | None:
    part, config, kwargs = PARTS[prefix], model.config, model.origins[prefix].loader_kwargs
    name, known = (getattr(config, f"{prefix}_model_{field}") for field in ("id", "fingerprint"))
    backbone = getattr(model, part)
    if os.path.isabs(name) and not os.path.isdir(name):
        return f"was loaded from {name}, which is no longer there"
    if trained := sum(parameter.requires_grad for _, parameter in own_parameters(backbone)):
        return f"is being trained: {trained} of its parameters require gradient"
    state = {
        key.removeprefix(f"{part}."): value
        for key, value in state_dict.items()
        if key.startswith(f"{part}.") and value.device.type != "meta"  # offloaded to disk, or never loaded
    }
    if not state or is_deepspeed_zero3_enabled():  # under which from_pretrained would wait for all ranks
        return None
    digest = weights_digest(state)
    try:
        if digest == model.origins[prefix].digest:
            if known:
                check_fingerprint(backbone_files(prefix, config, kwargs.get("cache_dir")), known, ROLES[prefix], name)
            return None
        if hasattr(backbone, "hf_quantizer"):
            return "has other weights than when it was loaded"
        differing = _differing_tensors(prefix, config, state, kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        return None if known == {} else f"cannot be compared with its files ({error})"
    if differing:
        return f"has other weights than {name}, in {len(differing)} tensors ({', '.join(differing[:3])}, ...)"
    model.origins[prefix].digest = digest
    return None


def _differing_tensors(
    prefix: str, config: FromageConfig, state: dict[str, torch.Tensor], kwargs: dict[str, Any]
) -> list[str]:
    """Names of the tensors in `state`, a backbone's state dict, that are not those of the files that `config` names.

    The files are mapped, not read into memory, where they are of safetensors. A tensor may be the file's rounded to its
    dtype, by way of another half precision (`half()` after loading in bfloat16).

    Raises:
        OSError, ValueError: The files are gone, or are others than those that `config` knows the digests of.
    """
    config = copy.deepcopy(config)
    # The files' own: nothing is rounded, and (where they have one) nothing is converted and so nothing is copied.
    files = backbone_files(prefix, config, kwargs.get("cache_dir"))
    getattr(config, f"{prefix}_config").dtype = _widest_dtype(files)
    with _quiet(), torch.random.fork_rng(devices=[]):  # a pooler that is not in use is drawn at random
        kwargs = {**kwargs, "local_files_only": True, "attn_implementation": "eager"}
        reference = reload_backbone(prefix, config, kwargs).state_dict()
    has_random_pooler = prefix == "vision" and config.vision_pooling != "pooler"
    names = [name for name in state if not (has_random_pooler and "pooler" in name)]
    return [name for name in names if name not in reference or not _is_rounded(state[name], reference[name])]


def _widest_dtype(files: list[Path]) -> torch.dtype | None:
    """That which holds all floating-point tensors of safetensors files; `None` of none, and of other files."""
    dtypes = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    found = [dtype for name, dtype in _FLOATS.items() if name in dtypes]
    return functools.reduce(torch.promote_types, found) if found else None


def whole_state_of(model: "FromagePreTrainedModel") -> dict[str, torch.Tensor]:
    """The state dict of a model, which was gathered from all processes where it is sharded.

    Raises:
        ValueError: It is sharded, and was not gathered.
    """
    if not model.traits.is_sharded:
        return model.state_dict()
    if model.traits.gathered_state is None:
        raise ValueError(
            "The backbones are sharded: no process has all weights. Let all of them call FromageTrainer.save_model; or "
            "get_model_state_dict of torch.distributed.checkpoint.state_dict, with full_state_dict=True, and give what "
            "the first process gets as `state_dict`."
        )
    return model.traits.gathered_state


def has_packed_weights(backbone: nn.Module) -> bool:
    """Whether a quantiser keeps several weights in a number, or in a tensor of its own: no state dict for others."""
    weights = [w.to_local() if isinstance(w, DTensor) else w for w in backbone.parameters()]  # sharded ones are plain
    return not all(w.is_floating_point() and w.dtype.itemsize > 1 for w in weights) or any(
        hasattr(weight, "__tensor_flatten__") for weight in weights
    )


def weights_digest(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """A digest a tensor, taken where it lies: 0.6 s a gigabyte on a CPU core, half of what comparing files takes."""
    return {name: [_digest(leaf) for leaf in _plain_tensors(tensor)] for name, tensor in state.items()}


def _is_rounded(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    if tensor.shape != original.shape:
        return False
    tensor, original = tensor.cpu(), original.cpu()
    through = (original.dtype, torch.bfloat16, torch.float16) if original.is_floating_point() else (original.dtype,)
    return any(torch.equal(original.to(dtype).to(tensor.dtype), tensor) for dtype in through)


def _digest(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes and their places: 8 bytes at a time, each times a random number of its place."""
    data = tensor.detach().as_subclass(torch.Tensor).flatten().view(torch.uint8)
    factors = _factors(data.device)
    digest, memory = factors.new_zeros(()), factors.new_empty(min(_CHUNK, len(data) + 7) // 8)
    for chunk in data.split(_CHUNK):
        if len(chunk) % 8 or chunk.storage_offset() % 8:
            chunk = torch.cat([chunk, chunk.new_zeros(-len(chunk) % 8)])
        words = chunk.view(torch.int64)
        # The upper half again below: alone, changes of two words' highest bits (their signs) would cancel out.
        mixed = torch.bitwise_right_shift(words, 32, out=memory[: len(words)])
        digest = digest * factors[0] + mixed.add_(words).mul_(factors[: len(words)]).sum()
    return int(digest)


@functools.lru_cache
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (_CHUNK // 8,), generator=generator, device="cpu")
    return (numbers | 1).to(device)


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that one of a quantised type consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without transformers' progress bar and report: they were shown when the model was loaded."""
    has_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with without_report():
            yield
    finally:
        if has_progress_bar:
            transformers_logging.enable_progress_bar()
