"""Checkpoints in the authors' format, there and back; hostile ones are refused before anything in them runs."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, OPTConfig

from hub_scripts import convert_original_checkpoint as converter
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.helpers.backbones import PARITY, make_model
from tests.helpers.hub import run as run_on_hub
from tests.helpers.hub_server import hub_server
from tests.helpers.parity import CASES, Inference


def run(case, folder, output):
    backbones = PARITY / case
    converter.main(["--checkpoint-dir", str(folder), "--output-dir", str(output),
                    "--language-model", str(backbones / "language_model"),
                    "--vision-model", str(backbones / "vision_model")])  # fmt: skip


def release(case, tmp_path, compact=False):
    folder = tmp_path / "release"
    shutil.copytree(PARITY / case / "fromage_model", folder)
    if compact:
        (folder / "compact_ckpt.pth.tar").replace(folder / converter.CHECKPOINT)
    return folder


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("case", sorted(CASES))
def test_there_and_back(case, compact, tmp_path):
    folder = release(case, tmp_path, compact)
    run(case, folder, tmp_path / "ours")
    model = FromageForConditionalGeneration.from_pretrained(tmp_path / "ours")
    processor = FromageProcessor.from_pretrained(tmp_path / "ours")
    processor.check_config(model.config)
    index = FromageImageIndex.from_pretrained(tmp_path / "ours" / "index")
    index.check_model(model)

    # The goldens of inference are of these weights.
    expected = Inference(case)
    for name, parameter in converter.original_names(model).items():
        assert torch.equal(parameter, converter.original_names(expected.model)[name]), name
    expected.model, expected.processor = model, processor
    for item in expected.golden["prompts"]:
        factor = item["ret_factor"]
        answer = expected.answer(item["prompt"], num_words=16, ret_scale_factor=factor)
        assert answer == item["with_ret"]["returned"]["default"]
    assert index.ids == expected.index.ids
    torch.testing.assert_close(index.embeds, expected.index.embeds, atol=2e-5, rtol=0)

    converter.main(["--checkpoint-dir", str(tmp_path / "ours"), "--output-dir", str(tmp_path / "back"), "--reverse"])
    theirs = torch.load(folder / converter.CHECKPOINT, weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back" / converter.CHECKPOINT, weights_only=True)["state_dict"]
    assert back.keys() == theirs.keys() - {"model.input_embeddings.weight"}
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in back.items()
    )
    args = [json.loads((path / converter.ARGS).read_text()) for path in (folder, tmp_path / "back")]
    assert all(args[0][name] == args[1][name] for name in converter._NEEDED_ARGS)
    run(case, tmp_path / "back", tmp_path / "again")
    again = FromageImageIndex.from_pretrained(tmp_path / "again" / "index")
    assert again.ids == index.ids
    torch.testing.assert_close(again.embeds, index.embeds)


def on_a_hub(server):
    """The release's backbones, as its arguments name them."""
    for repo, folder in (("facebook/opt-golden-a", "language_model"), ("openai/clip-golden-a", "vision_model")):
        files = (PARITY / "case_a_opt_tied" / folder).iterdir()
        server.commit(repo, {path.name: path.read_bytes() for path in files})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_there_and_back_in_half_precision(dtype, tmp_path):
    """As the releases of 11 MB must be."""
    folder = release("case_a_opt_tied", tmp_path, compact=True)
    content = torch.load(folder / converter.CHECKPOINT, weights_only=True)
    state = {name: tensor.to(dtype) for name, tensor in content["state_dict"].items()}
    torch.save({"state_dict": state}, folder / converter.CHECKPOINT)
    run("case_a_opt_tied", folder, tmp_path / "ours")
    converter.main(["--checkpoint-dir", str(tmp_path / "ours"), "--output-dir", str(tmp_path / "back"), "--reverse"])
    back = torch.load(tmp_path / "back" / converter.CHECKPOINT, weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_way_back_needs_no_backbones(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    for backbone in ("language_model", "vision_model"):
        shutil.rmtree(tmp_path / "tiny" / backbone)
    back = ["--reverse", "--checkpoint-dir", str(folder), "--output-dir", str(tmp_path / "theirs")]
    converter.main(back)
    theirs = torch.load(tmp_path / "theirs" / converter.CHECKPOINT, weights_only=True)["state_dict"]
    ours = load_file(folder / "model.safetensors")
    for name, key in converter.key_map(1).items():
        assert torch.equal(theirs[name], ours[f"adapter.{key}"])
    ours["adapter.ret_lm_head.weight"] = torch.ones(1, 1)
    save_file(ours, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        converter.main(back)


def test_several_ret_tokens_have_no_way_back(tmp_path):
    make_model("opt_clip", num_ret_tokens=3).save_pretrained(tmp_path / "ours", save_backbones=True)
    with pytest.raises(ValueError, match="holds .* one .RET. row, .* and 3 rows"):
        converter.convert_back(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


CONVERT = """
import sys
from hub_scripts import convert_original_checkpoint as converter
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
if len(sys.argv) > 3:  # as it would be with the weights
    converter.without_weights = converter.FromageForConditionalGeneration.from_vision_text_pretrained
converter.main(["--checkpoint-dir", sys.argv[1], "--output-dir", sys.argv[2]])
"""

LOAD = """
import sys, torch
from modeling_fromage import FromageForConditionalGeneration
model = FromageForConditionalGeneration.from_pretrained(sys.argv[1])
torch.save(model(torch.tensor([[2, 5, 6, 501]])).logits, sys.argv[2])
"""


def test_no_weights_of_backbones_are_fetched(tmp_path):
    """The trained parts of backbones on the Hub are converted without 13 GB of them; the result is the same."""
    folder = release("case_a_opt_tied", tmp_path)
    for name in ("convert", "load"):
        (tmp_path / f"{name}.py").write_text({"convert": CONVERT, "load": LOAD}[name])
    with hub_server() as server:
        on_a_hub(server)
        run_on_hub(server, tmp_path, "convert.py", str(folder), "light")
        assert "config.json" in server.served and not [n for n in server.served if n.endswith((".safetensors", ".bin"))]
        run_on_hub(server, tmp_path, "convert.py", str(folder), "whole", "with weights")
        assert [name for name in server.served if name.endswith(".safetensors")]
        for name in ("light", "whole"):
            run_on_hub(server, tmp_path, "load.py", name, f"{name}.pt")
    light, whole = tmp_path / "light", tmp_path / "whole"
    assert torch.equal(torch.load(tmp_path / "light.pt"), torch.load(tmp_path / "whole.pt"))
    assert (light / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (light, whole)]
    for prefix in ("text", "vision"):  # what is known of files that were fetched
        assert configs[0].pop(f"{prefix}_model_fingerprint") == {} != configs[1].pop(f"{prefix}_model_fingerprint")
    assert configs[0] == configs[1] and len(configs[0]["text_model_revision"]) == 40
    generation = [json.loads((path / "generation_config.json").read_text()) for path in (light, whole)]
    assert generation[0] == generation[1]
    assert {path.name for path in light.iterdir()} == {path.name for path in whole.iterdir()}
    indexes = [FromageImageIndex.from_pretrained(path / "index") for path in (light, whole)]
    assert indexes[0].ids == indexes[1].ids and torch.equal(indexes[0].embeds, indexes[1].embeds)


RELEASE = """
import sys, torch
from hub_scripts import convert_original_checkpoint as converter
from hub_scripts.make_tiny_checkpoint import make_tiny_checkpoint
converter.RELEASE_URL = sys.argv[1]
torch.hub.set_dir("cache")
converter.main(["--release", sys.argv[2], "--output-dir", sys.argv[2]])
"""


@pytest.mark.parametrize(("name", "tokens", "parameters"), [("fromage", 1, 5_513_729), ("fromage_vis4", 4, 18_108_929)])
def test_releases_of_the_authors(name, tokens, parameters, tmp_path):
    """Both released models, by name, at their own shapes: OPT-6.7B, ViT-L/14, [RET] 50266, arguments as published."""
    folder = tmp_path / "site" / converter.RELEASES[name]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.visual_embeddings.weight": (4096 * tokens, 1024),
        "model.visual_embeddings.bias": (4096 * tokens,),
        "model.visual_fc.weight": (256, 1024),
        "model.visual_fc.bias": (256,),
        "model.text_hidden_fcs.0.0.weight": (256, 4096),
        "model.text_hidden_fcs.0.0.bias": (256,),
        "model.logit_scale": (),
        "ret_input_embeddings.weight": (1, 4096),
    }
    state = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
    torch.save({"state_dict": state}, folder / converter.CHECKPOINT)
    args = {"opt_version": "facebook/opt-6.7b", "task": "multitask", "freeze_lm": True, "pretrained_visual": True,
            "visual_encoder": "openai/clip-vit-large-patch14", "freeze_vm": True, "use_pooler": True,
            "n_visual_tokens": tokens, "image_embed_dropout_prob": 0.0, "text_embed_dropout_prob": 0.0,
            "shared_emb_dim": 256, "text_emb_layers": [-1], "append_retrieval_token": True,
            "input_prompt": "A picture of", "retrieval_token_idx": 50266}  # fmt: skip
    (folder / converter.ARGS).write_text(json.dumps(args))
    (tmp_path / "release.py").write_text(RELEASE)
    with hub_server() as server:
        for repo, files in full_size_backbones().items():
            server.commit(repo, files)
        run_on_hub(server, tmp_path, "release.py", (tmp_path / "site").as_uri(), name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters
    assert torch.equal(tensors["adapter.ret_embedding.weight"], state["ret_input_embeddings.weight"].float())
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config["ret_token_id"] == 50266 and config["num_image_tokens"] == tokens
    assert config["text_model_id"] == "facebook/opt-6.7b" and config["text_config"]["num_hidden_layers"] == 32


def test_downloads_are_kept(tmp_path, monkeypatch):
    site = tmp_path / "site" / converter.RELEASES["fromage_vis4"]
    shutil.copytree(PARITY / "case_a_opt_tied" / "fromage_model", site)
    monkeypatch.setattr(converter, "RELEASE_URL", (tmp_path / "site").as_uri())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    (site / converter.ARGS).rename(site / "later")
    with pytest.raises(OSError):
        converter.download("fromage_vis4")
    (site / "later").rename(site / converter.ARGS)
    folder = converter.download("fromage_vis4")
    shutil.rmtree(site)
    assert converter.download("fromage_vis4") == folder
    assert {path.name for path in folder.iterdir()} == {converter.CHECKPOINT, converter.ARGS}


def full_size_backbones():
    """Configurations of OPT-6.7B and CLIP ViT-L/14, and a tokenizer of OPT's size; no weights."""
    parity = PARITY / "case_a_opt_tied"
    text = OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32,
                     num_attention_heads=32, dtype="float16", architectures=["OPTForCausalLM"])  # fmt: skip
    vision = CLIPConfig(vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                       "num_attention_heads": 16, "patch_size": 14})  # fmt: skip
    tokenizer = {path.name: path.read_bytes() for path in (parity / "language_model").iterdir()
                 if path.suffix in (".json", ".txt") and "config" not in path.stem}  # fmt: skip
    vocabulary = json.loads(tokenizer["vocab.json"])
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary), 50265)}
    tokenizer["vocab.json"] = json.dumps(vocabulary).encode()
    tokenizer["tokenizer_config.json"] = (parity / "language_model" / "tokenizer_config.json").read_bytes()
    processor = (parity / "vision_model" / "preprocessor_config.json").read_bytes()
    return {
        "facebook/opt-6.7b": {**tokenizer, "config.json": text.to_json_string().encode()},
        "openai/clip-vit-large-patch14": {"preprocessor_config.json": processor,
                                          "config.json": vision.to_json_string().encode()},
    }  # fmt: skip


def test_reverse_takes_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        converter.main(["--release", "fromage", "--output-dir", str(tmp_path / "o"), "--reverse"])
    assert "--checkpoint-dir" in capsys.readouterr().err


class _Runs:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def spoil_state(change):
    def spoil(folder, trace):
        path = folder / converter.CHECKPOINT
        content = torch.load(path, weights_only=True)
        change(content["state_dict"], trace)
        torch.save(content, path)

    return spoil


def spoil_args(**changes):
    def spoil(folder, trace):
        path = folder / converter.ARGS
        args = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in args.items() if value is not None}))

    return spoil


BIAS, MATRIX = "model.visual_fc.bias", "model.input_embeddings.weight"


def spoil_paths(name):
    def spoil(folder, trace):
        content = {"paths": ["a.png", name], "embeddings": torch.ones(2, 16).numpy()}
        (folder / "cc3m_embeddings.pkl").write_bytes(pickle.dumps(content))

    return spoil


@pytest.mark.parametrize("name", ["../private", "/private/model", "private", None, 7])
def test_a_checkpoint_names_no_folder_of_this_machine(name, tmp_path, capsys, monkeypatch):
    folder = release("case_a_opt_tied", tmp_path)
    (tmp_path / "private").mkdir()
    monkeypatch.chdir(tmp_path)
    args = json.loads((folder / converter.ARGS).read_text())
    (folder / converter.ARGS).write_text(json.dumps({**args, "opt_version": name}))
    with pytest.raises(SystemExit):
        converter.main(["--checkpoint-dir", str(folder), "--output-dir", str(tmp_path / "ours")])
    assert "--language-model" in capsys.readouterr().err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_state(lambda state, trace: state.update(evil=_Runs(trace))), "is refused"),
        (lambda folder, trace: (folder / converter.CHECKPOINT).write_bytes(pickle.dumps(_Runs(trace))), "is refused"),
        (lambda folder, trace: (folder / converter.CHECKPOINT).write_bytes(b"no checkpoint"), "is refused"),
        (lambda folder, trace: (folder / converter.CHECKPOINT).unlink(), "is refused"),
        (lambda folder, trace: (folder / "cc3m_embeddings.pkl").write_bytes(pickle.dumps(_Runs(trace))), "is refused"),
        (lambda folder, trace: (folder / converter.ARGS).write_text("{"), "cannot be used"),
        (spoil_state(lambda state, trace: state.pop("model.visual_fc.bias")), "lacks .*visual_fc.bias"),
        (spoil_state(lambda state, trace: state.update(more=torch.ones(1))), "has .*more"),
        (spoil_state(lambda state, trace: state.update({"model.visual_fc.bias": torch.ones(3)})), r"is \(3,\)"),
        (spoil_state(lambda state, trace: state["model.visual_fc.bias"].fill_(float("nan"))), "NaN"),
        (spoil_state(lambda state, trace: state["ret_input_embeddings.weight"].add_(1)), "two different"),
        (spoil_state(lambda state, trace: state.update({MATRIX: torch.ones(0, 64)})), "two different"),
        (spoil_state(lambda state, trace: state.update({MATRIX: torch.ones(64)})), "two different"),
        (
            spoil_state(lambda state, trace: state.update({BIAS: torch.ones(16).to_sparse()})),
            "not plain floating-point tensors",
        ),
        (
            spoil_state(lambda state, trace: state.update({BIAS: torch.ones(16, device="meta")})),
            "not plain floating-point tensors",
        ),
        (
            spoil_state(lambda state, trace: state.update({BIAS: torch.ones(16) * 1j})),
            "not plain floating-point tensors",
        ),
        (
            spoil_state(lambda state, trace: state.update({BIAS: torch.ones(16, dtype=torch.long)})),
            "not plain floating-point tensors",
        ),
        (spoil_state(lambda state, trace: state.update({BIAS: 1.0})), "is refused"),
        (spoil_args(retrieval_token_idx=77), "RET. is 77"),
        (spoil_args(n_visual_tokens="two"), "unexpected types"),
        (spoil_args(text_emb_layers=None), "cannot be used"),
        (spoil_args(shared_emb_dim=5), "need"),
        (spoil_paths("../../secret.png"), "outside its folder"),
        (spoil_paths("/etc/secret.png"), "outside its folder"),
        (spoil_paths(7), "not a list of strings"),
        (spoil_paths("C:\\secret.png"), "outside its folder"),
    ],
)
def test_what_is_refused(spoil, message, tmp_path, capsys):
    folder, trace = release("case_a_opt_tied", tmp_path), tmp_path / "it ran"
    spoil(folder, trace)
    with pytest.raises(SystemExit):
        run("case_a_opt_tied", folder, tmp_path / "ours")
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not trace.exists() and not (tmp_path / "ours").exists()
