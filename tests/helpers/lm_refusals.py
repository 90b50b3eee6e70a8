"""What is wrong with a language model that FROMAGe refuses, shown by that LM alone in one line."""

import torch
from transformers import PreTrainedModel

from modeling_fromage.backbones_fromage import decoder_and_head
from modeling_fromage.miniature_fromage import miniature

IDS = torch.tensor([[40, 41, 42, 43]])


def more_than(value: float) -> str:
    """A bound that does not depend on the machine."""
    bound = next(bound for bound in (1.0, 0.1, 0.01) if value > bound)
    return f"by more than {bound:g} of their norm"


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def best_multiple(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return found * ((found * expected).sum() / (found * found).sum())


@torch.no_grad()
def of_its_logits(lm: PreTrainedModel) -> str:
    decoder, head = decoder_and_head(lm)
    hidden, logits = decoder(input_ids=IDS, use_cache=False)[0], lm(input_ids=IDS, use_cache=False).logits
    if hidden.shape[-1] != head.weight.shape[-1]:
        return f"its head takes {head.weight.shape[-1]} features, its hidden states have {hidden.shape[-1]}"
    return f"its logits differ from its head's {more_than(off(best_multiple(head(hidden), logits), logits))}"


@torch.no_grad()
def of_its_ids(lm: PreTrainedModel) -> str:
    decoder = miniature(lm)  # random weights everywhere: what makes more of the ids starts from zero
    expected = decoder(input_ids=IDS, use_cache=False)[0]
    found = decoder(inputs_embeds=decoder.get_input_embeddings()(IDS), use_cache=False)[0]
    return f"hidden states without ids differ {more_than(off(found, expected))}"


def of_its_embeddings(lm: PreTrainedModel) -> str:
    decoder, _ = decoder_and_head(lm)
    embeds = -decoder.get_input_embeddings()(IDS).detach().requires_grad_()
    try:
        decoder(inputs_embeds=embeds, use_cache=False)[0].sum().backward()
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"a pass from embeddings alone raises {type(error).__name__}"
    raise AssertionError("it runs")


@torch.no_grad()
def of_its_causality(lm: PreTrainedModel) -> str:
    decoder, _ = decoder_and_head(lm)
    short, long = (decoder(input_ids=IDS[:, :n], use_cache=False)[0][:, :2] for n in (2, 4))
    return f"hidden states change with what follows {more_than(off(long, short))}"


@torch.no_grad()
def of_its_rows(lm: PreTrainedModel) -> str:
    embedding = lm.get_input_embeddings()
    found, rows = embedding(IDS), embedding.weight[IDS]
    return f"embeddings differ from the rows of their matrix {more_than(off(best_multiple(rows, found), found))}"


def of_its_depth(lm: PreTrainedModel) -> str:
    assert "num_hidden_layers" not in lm.config.to_dict()
    return "its configuration names no `num_hidden_layers`"


DEMONSTRATIONS = {
    "makes its logits in a way": of_its_logits,
    "takes more from token ids": of_its_ids,
    "does not run from embeddings": of_its_embeddings,
    "is not causal": of_its_causality,
    "does more than look rows up": of_its_rows,
    "names no `num_hidden_layers`": of_its_depth,
}


def demonstrate(lm: PreTrainedModel, why: str) -> str:
    """One line about the LM alone that an assertion has shown; it raises where there is nothing wrong."""
    (found,) = [show for words, show in DEMONSTRATIONS.items() if words in why]
    return found(lm.eval())
