"""Every model type that AutoModelForCausalLM takes, with CLIP: right in every stage, or refused at assembly by name.

The truth is the LM itself: `[RET]` a row of its own matrices, one text at a time, no padding, no cache.
"""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModel

from modeling_fromage import FromageForConditionalGeneration
from modeling_fromage.configuration_fromage import text_half
from tests.helpers.backbone_table import check_complete, check_row
from tests.helpers.backbones import VISION_CONFIGS
from tests.helpers.lm_families import IMAGE, MODEL_TYPES, MULTIMODAL_TYPES, RET, make_lm, tiny_config
from tests.helpers.lm_refusals import demonstrate
from tests.helpers.lm_stages import (
    assemble,
    check_folders,
    check_generation,
    check_only_the_adapter_moves,
    check_shared_beginnings,
    check_step,
    check_texts_and_scores,
)

WINDOW = 6  # shorter than the longest texts


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_language_model(family, tmp_path):
    check_row("language_models", family, row_of(family, tmp_path))


@pytest.mark.parametrize("family", MULTIMODAL_TYPES)
def test_multimodal_model(family, tmp_path):
    check_row("multimodal_models", family, multimodal_row_of(family, tmp_path))


def test_the_table_is_complete():
    check_complete("language_models", MODEL_TYPES)
    check_complete("multimodal_models", MULTIMODAL_TYPES)


def row_of(family, folder):
    try:
        lm = make_lm(family)
    except ImportError:  # its vision encoder is of a library that is not here
        lm = text_lm(family)
    except (AttributeError, ValueError) as error:
        shown = f"AutoModelForCausalLM builds none by itself: {type(error).__name__}"
        return {"result": "refused", "why": refusal_from_folder(family, folder), "shown": shown}
    try:
        model = assemble(lm)
    except ValueError as error:
        why = without_numbers(str(error))
        assert type(text_lm(family)).__name__ in why or repr(lm.config.model_type) in why
        return {"result": "refused", "why": why, "shown": shown_by(family, why)}
    differences = [check_step(model, "right")]
    check_only_the_adapter_moves(model)
    lm = make_lm(family, spread=6.0)
    model = assemble(lm)
    differences.append(check_step(model, "left"))
    model.eval()
    check_texts_and_scores(model)
    check_shared_beginnings(model)
    check_generation(model)
    row = exact_row(model, max(differences))
    check_folders(model, folder, lm)
    if "sliding_window" in tiny_config(family).to_dict():
        model = assemble(make_lm(family, spread=6.0, sliding_window=WINDOW)).eval()
        check_texts_and_scores(model)
        check_shared_beginnings(model)
        check_generation(model, by_the_lm=False)  # whose own is off behind its window in MiniMax and Moshi
    return row


def text_lm(family, spread=30.0):
    """The LM, of a multimodal model the one within it, with large weights."""
    return make_lm(text_half(tiny_config(family)).model_type, spread=spread)


def shown_by(family, why):
    """What is wrong with the LM, at large weights or, where these hide it (ProphetNet), at ordinary ones."""
    for spread in (30.0, 1.0):
        with contextlib.suppress(StopIteration):
            return demonstrate(text_lm(family, spread), why)
    raise AssertionError(f"{family} is refused ({why}), and nothing shows it")


def exact_row(model, difference):
    lm = model.frozen_lm()
    training = next((how for how, ability in TRAINING.items() if lm.takes(ability)), "ordinary")
    row = {
        "result": "exact",
        "text_part": type(model.language_model).__name__,
        "training": training,
        "why": lm.traits.why_no_shortcut(model.language_model) or "",
        "generation": next((how for how, ability in GENERATION.items() if lm.takes(ability)), "whole texts"),
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "within": next(bound for bound in (1e-9, 1e-4) if difference < bound),
    }
    if training == "grouped":
        row["why"] = "a trial of packed rows failed, one of cached prefixes did not"
    return row


TRAINING = {"packed": "packed rows", "grouped": "cached prefixes"}
GENERATION = {"cached": "left padding", "cached, padded prompts by whole texts": "a cache"}


def refusal_from_folder(family, folder):
    """The message about a model of which there is a configuration alone."""
    try:
        config = tiny_config(family)
    except (StrictDataclassError, ValueError):  # by rule, it does not fit together
        config = CONFIG_MAPPING[family]()
    config.save_pretrained(folder)
    AutoModel.from_config(VISION_CONFIGS["clip"]()).save_pretrained(folder / "vision")
    processor = SimpleNamespace(image_token_id=IMAGE, ret_token_id=RET, num_image_tokens=2, num_ret_tokens=1)
    with pytest.raises(ValueError, match=f"{family!r}") as raised:
        FromageForConditionalGeneration.from_vision_text_pretrained(str(folder / "vision"), str(folder), processor)
    return without_numbers(str(raised.value))


def without_numbers(message):
    """Without what depends on the machine."""
    return re.sub(r"by [\d.e-]+", "by ...", message.split(" It says:")[0])


@torch.no_grad()
def multimodal_row_of(family, folder):
    try:
        whole = make_lm(family)
    except ModuleNotFoundError as error:
        return {"result": "refused", "why": f"needs {error.name}"}
    except Exception:  # a tiny one cannot be made by rule
        return {"result": "refused", "why": refusal_from_folder(family, folder)}
    try:
        model = assemble(whole)
        check_folders(model, folder, whole)
    except ValueError as error:
        return {"result": "refused", "why": without_numbers(str(error).replace(str(folder), "..."))}
    return {"result": "exact", "text_part": type(model.language_model).__name__}
