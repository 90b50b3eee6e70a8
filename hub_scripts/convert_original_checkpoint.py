"""Convert a checkpoint of the authors: `python -m hub_scripts.convert_original_checkpoint --checkpoint-dir D
--output-dir O [--language-model L] [--vision-model V]`.

D holds `pretrained_ckpt.pth.tar`, `model_args.json` and perhaps `cc3m_embeddings*.pkl`, as released; `--release NAME`
downloads them. O is a folder for `from_pretrained`, with the processor, and with the image index in `O/index`. The
backbones default to those named in `model_args.json`; weights of backbones on the Hub are not downloaded. `--reverse`
converts the other way: D is a checkpoint of this package, and O is in the authors' format.
"""

import argparse
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import resolve_revision

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from modeling_fromage.backbone_loading_fromage import saved_dtype, take_ids_from
from modeling_fromage.checkpoint_fromage import TRAINED_PREFIX
from modeling_fromage.configuration_fromage import vision_half
from modeling_fromage.file_writing_fromage import replacing
from modeling_fromage.image_vectors_fromage import ImageVector
from modeling_fromage.io.command_line import command_parser, errors_in_one_line
from modeling_fromage.vision_fromage import auto_model_for

from .build_image_index import from_original_embeddings

RELEASES = {"fromage": "fromage_model", "fromage_vis4": "fromage_model/fromage_vis4"}  # k = 1, the paper's; k = 4
RELEASE_URL = "https://github.com/kohjingyu/fromage/raw/b36a1889e16cb9486e83e1853dce68ab653068c9"
CHECKPOINT, ARGS, EMBEDDINGS = "pretrained_ckpt.pth.tar", "model_args.json", "cc3m_embeddings.pkl"
# Some files hold the whole input matrix beside its last row, the trained [RET].
_MATRIX, _RET_ROW = "model.input_embeddings.weight", "ret_input_embeddings.weight"
_NEEDED_ARGS = ("n_visual_tokens", "shared_emb_dim", "text_emb_layers", "retrieval_token_idx")


def key_map(num_text_layers: int) -> dict[str, str]:
    """The authors' name of each trained tensor -> its name within our `adapter`."""
    modules = {"model.visual_embeddings": "multi_modal_projector", "model.visual_fc": "visual_projection"}
    modules |= {f"model.text_hidden_fcs.{i}.0": f"text_projection.{i}" for i in range(num_text_layers)}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    return {**names, "model.logit_scale": "logit_scale", _RET_ROW: "ret_embedding.weight"}


def original_names(model: FromageForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """Our trained parameters under the authors' names."""
    names = key_map(len(model.config.text_embed_layers or []))
    return {theirs: model.adapter.get_parameter(ours) for theirs, ours in names.items()}


def read_args(path: Path) -> dict[str, Any]:
    """Read `model_args.json`. Only a few of its fields are needed.

    Raises:
        ValueError: The file cannot be read, or a field that is needed is missing or has another type.
    """
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
        kinds = {name: type(args[name]) for name in _NEEDED_ARGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}.") from error
    wrong = {name: kind.__name__ for name, kind in kinds.items() if kind is not (list if "layers" in name else int)}
    if wrong or not all(isinstance(layer, int) for layer in args["text_emb_layers"]):
        raise ValueError(f"{path} has fields of unexpected types: {wrong or args['text_emb_layers']}.")
    return args


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint of the authors, with or without the whole input matrix. No code in it can run.

    Raises:
        ValueError: The file is not such a checkpoint, asks for anything but tensors, or has two different `[RET]` rows.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is refused: {type(error).__name__}: {error}. Nothing of it was run.") from error
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise ValueError(f"{path} is refused: {odd} are not plain floating-point tensors. Nothing was run.")
    matrix, row = state.pop(_MATRIX, None), state.get(_RET_ROW)
    if matrix is not None and row is not None:
        both = matrix.dim() == row.dim() == 2 and matrix.dtype == row.dtype
        if not (both and torch.equal(matrix[-1:], row[-1:])):
            raise ValueError(
                f"{path} has two different [RET] rows, in {_MATRIX} {tuple(matrix.shape)} and in {_RET_ROW}."
            )
    return state


def _is_plain(tensor: object) -> bool:
    """Whether it is a dense floating-point tensor in memory."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    if not isinstance(tensor, torch.Tensor) or type(tensor) not in kinds:
        return False
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return is_dense and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def download(release: str) -> Path:
    """Download a release of the authors into torch.hub's cache, unless it is there, and return its folder."""
    folder = Path(torch.hub.get_dir()) / "fromage" / release
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, ARGS):
        if not (folder / name).is_file():
            torch.hub.download_url_to_file(f"{RELEASE_URL}/{RELEASES[release]}/{name}", str(folder / name))
    return folder


def backbone_name(args: dict[str, Any], field: str) -> str:
    """The Hub id that a checkpoint names. A checkpoint may not choose a folder of this machine.

    Raises:
        ValueError: The name is not a Hub id, or is a folder.
    """
    name = args.get(field)
    if isinstance(name, str) and _is_repo_id(name) and not os.path.exists(name):
        return name
    raise ValueError(
        f"{ARGS} has {field}={name!r}, which is a folder here or not a Hub id. Name the backbone yourself: "
        "--language-model, --vision-model."
    )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_weights(
    vision_model: str, language_model: str, processor: FromageProcessor, **config_kwargs: Any
) -> FromageForConditionalGeneration:
    """A model whose backbones have no weights, so that none are downloaded: enough to save the trained parts.

    The trained parts are not initialized.
    """
    configs = {}
    for prefix, name in (("text", language_model), ("vision", vision_model)):
        revision = resolve_revision(name, None)  # the commit that the checkpoint will name
        configs[prefix] = AutoConfig.from_pretrained(name, revision=revision)
        config_kwargs[f"{prefix}_model_id"] = name
        config_kwargs[f"{prefix}_model_revision"] = getattr(revision, "resolved", revision)
    text, vision = configs["text"], vision_half(configs["vision"])
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text, dtype=saved_dtype(text))
        tower = auto_model_for(vision).from_config(vision, dtype=saved_dtype(vision))
        try:
            language.generation_config = GenerationConfig.from_pretrained(
                language_model, revision=config_kwargs["text_model_revision"]
            )
        except OSError:  # the repository has no generation_config.json
            pass
        take_ids_from(processor, config_kwargs)
        config = FromageConfig.from_vision_text_configs(tower.config, language.config, **config_kwargs)
        model = FromageForConditionalGeneration(config, language, tower, new_adapter=False)
    model.adapter.to_empty(device="cpu")
    return model.eval()


@torch.no_grad()
def load_state(model: FromageForConditionalGeneration, state: dict[str, torch.Tensor]) -> None:
    """Copy the authors' tensors into our trained parameters.

    Raises:
        ValueError: A name is missing or unknown, a shape does not fit, or a value is not finite.
    """
    if model.adapter.ret_lm_head is not None:
        raise ValueError("The authors' format holds one [RET] row, tied in and out; this language model needs two.")
    parameters = original_names(model)
    missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing or unknown:
        raise ValueError(f"The checkpoint lacks {sorted(missing)} and has {sorted(unknown)}, which are unknown.")
    for name, parameter in parameters.items():
        tensor = state[name]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; these backbones and arguments need "
                             f"{tuple(parameter.shape)}.")  # fmt: skip
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or infinite values.")
        parameter.copy_(tensor)


def convert(
    checkpoint_dir: Path,
    output_dir: Path,
    language_model: str | None = None,
    vision_model: str | None = None,
    embeddings: Sequence[Path] | None = None,
) -> FromageForConditionalGeneration:
    """Convert a folder of the authors to one of ours.

    Args:
        checkpoint_dir (`Path`): Folder with `pretrained_ckpt.pth.tar` and `model_args.json`.
        output_dir (`Path`): Folder for `from_pretrained`, which is written.
        language_model (`str`, *optional*): Hub id or folder; defaults to what the checkpoint names.
        vision_model (`str`, *optional*): Hub id or folder; defaults to what the checkpoint names.
        embeddings (`Sequence[Path]`, *optional*): Image embeddings; default to the folder's `cc3m_embeddings*.pkl`.

    Returns:
        [`FromageForConditionalGeneration`]: The model, as it was saved.

    Raises:
        ValueError: A file is refused, or does not fit the backbones.
    """
    args = read_args(checkpoint_dir / ARGS)
    state = read_state(checkpoint_dir / CHECKPOINT)  # before anything large is loaded
    language_model = language_model or backbone_name(args, "opt_version")
    vision_model = vision_model or backbone_name(args, "visual_encoder")
    processor = FromageProcessor.from_vision_text_pretrained(
        vision_model, language_model, num_image_tokens=args["n_visual_tokens"]
    )
    if processor.ret_token_id != args["retrieval_token_idx"]:
        raise ValueError(f"[RET] is {args['retrieval_token_idx']} in {ARGS}, and {processor.ret_token_id} with the "
                         f"tokenizer of {language_model}.")  # fmt: skip
    on_the_hub = not (os.path.isdir(language_model) or os.path.isdir(vision_model))
    assemble = without_weights if on_the_hub else FromageForConditionalGeneration.from_vision_text_pretrained
    model = assemble(
        vision_model,
        language_model,
        processor=processor,
        projection_dim=args["shared_emb_dim"],
        text_embed_layers=args["text_emb_layers"],
    ).eval()
    load_state(model, state)
    pickles = sorted(checkpoint_dir.glob("cc3m_embeddings*.pkl")) if embeddings is None else embeddings
    index = from_original_embeddings([str(path) for path in pickles], model) if pickles else None
    dtypes = {tensor.dtype for tensor in state.values()}
    # The stored dtype where it is one of ours, so that converting back gives the same bits.
    dtype = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
    model.save_pretrained(output_dir, adapter_dtype=dtype)
    processor.save_pretrained(output_dir)
    if index is not None:
        index.save_pretrained(output_dir / "index")
    return model


def convert_back(checkpoint_dir: Path, output_dir: Path) -> None:
    """Convert a folder of ours to one of the authors: the trained tensors bit by bit, without the input matrix.

    The backbones are not needed.

    Raises:
        ValueError: The folder is not a checkpoint of ours, or holds what the authors' format cannot.
    """
    config = FromageConfig.from_pretrained(checkpoint_dir)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint_dir.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(TRAINED_PREFIX)]  # noqa: SIM118 (a method of safetensors)
            tensors.update({key.removeprefix(TRAINED_PREFIX): file.get_tensor(key) for key in keys})
    if (vector := ImageVector.of(config)) != ImageVector():
        raise ValueError(f"The authors' model reads an encoder's pooled output, and {checkpoint_dir} reads: {vector}.")
    names = key_map(len(config.text_embed_layers or []))
    if tensors.keys() != set(names.values()) or config.num_ret_tokens != 1:
        raise ValueError(
            f"The authors' format holds {sorted(names.values())}, one [RET] row, tied in and out; {checkpoint_dir} has "
            f"{sorted(tensors)} and {config.num_ret_tokens} rows."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    args = {
        "opt_version": config.text_model_id,
        "visual_encoder": config.vision_model_id,
        "n_visual_tokens": config.num_image_tokens,
        "shared_emb_dim": config.projection_dim,
        "text_emb_layers": config.text_embed_layers,
        "retrieval_token_idx": config.ret_token_id,
        "freeze_lm": True,
        "freeze_vm": True,
    }
    state = {theirs: tensors[ours] for theirs, ours in names.items()}
    with replacing(output_dir / CHECKPOINT) as temporary:
        torch.save({"state_dict": state}, temporary)
    with replacing(output_dir / ARGS) as temporary:
        temporary.write_text(json.dumps(args, indent=4), encoding="utf-8")
    if (checkpoint_dir / "index").is_dir():
        index = FromageImageIndex.from_pretrained(checkpoint_dir / "index")
        content = {"paths": index.ids, "embeddings": index.embeds.float().numpy()}
        with replacing(output_dir / EMBEDDINGS) as temporary:
            temporary.write_bytes(pickle.dumps(content))


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint-dir", type=Path, metavar="D")
    source.add_argument("--release", choices=sorted(RELEASES), help="the authors', with one visual token or with four")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="O")
    parser.add_argument("--language-model", metavar="L", help="Hub id or folder; by default what the checkpoint names")
    parser.add_argument("--vision-model", metavar="V", help="Hub id or folder; by default what the checkpoint names")
    parser.add_argument("--embeddings", type=Path, nargs="+", help="the authors' *.pkl, if they are not in D")
    parser.add_argument("--reverse", action="store_true", help="convert from our format to the authors'")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        if options.reverse:
            if options.release:
                raise ValueError("--reverse takes a folder of ours: give --checkpoint-dir.")
            convert_back(options.checkpoint_dir, options.output_dir)
        else:
            folder = options.checkpoint_dir or download(options.release)
            convert(folder, options.output_dir, options.language_model, options.vision_model, options.embeddings)
        print(f"Wrote {options.output_dir}: {', '.join(sorted(path.name for path in options.output_dir.iterdir()))}")


if __name__ == "__main__":
    main()
