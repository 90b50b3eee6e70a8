"""Checkpoints in the authors' format, there and back; hostile ones are refused before anything in them runs."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from hub_scripts import convert_original_checkpoint as converter
from modeling_fromage import FromageForConditionalGeneration, FromageImageIndex, FromageProcessor
from tests.backbones import PARITY
from tests.test_original import Inference
from tests.test_parity import CASES


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
        (spoil_args(retrieval_token_idx=77), "RET. is 77"),
        (spoil_args(n_visual_tokens="two"), "unexpected kinds"),
        (spoil_args(text_emb_layers=None), "cannot be used"),
        (spoil_args(shared_emb_dim=5), "need"),
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
