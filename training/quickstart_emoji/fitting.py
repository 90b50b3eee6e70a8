"""The quickstart's training, for as many steps as its minutes allow."""

import random
import time
from collections.abc import Sequence

import torch
from datasets import Dataset

from modeling_fromage import FromageDataCollator, FromageForConditionalGeneration, FromageTrainer
from modeling_fromage.trainer.pair_states import retrieval_captions, statistics_of
from modeling_fromage.training_losses_fromage import has_previous_token

from ..arguments import RunArguments

_END_WEIGHT = 4.0  # of the place of [RET] in its own loss: of a text's places it is one


def steps_that_fit(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    dataset: Dataset,
    batch_size: int,
    seconds: float,
) -> int:
    """How many training steps fit in `seconds`, from the time of one. The learning-rate schedule needs the number."""
    batch = collator(list(dataset.shuffle(seed=0).select(range(min(batch_size, len(dataset))))))
    model.train()
    for _ in range(3):  # the first one warms up
        start = time.monotonic()
        model(**batch).loss.backward()
        elapsed = time.monotonic() - start
    model.zero_grad()
    return max(1, int(seconds / elapsed))


@torch.no_grad()
def start_projector(
    model: FromageForConditionalGeneration, collator: FromageDataCollator, dataset: Dataset, ridge: float = 0.1
) -> None:
    """Start the projector at the visual tokens that are nearest to the words of each image's caption: ridge regression
    of the captions' input embeddings on the image features. A few steps of training then lead further than from
    random weights.

    Args:
        ridge (`float`, defaults to 0.1): The penalty, times the number of images (views of one count as images).
    """
    k, projector = model.config.num_image_tokens, model.adapter.multi_modal_projector
    views = [row["pooled_image_features"].reshape(-1, projector.in_features) for row in dataset]
    texts = collator.processor.tokenizer([f" {caption}" for caption in dataset["caption"]], add_special_tokens=False)
    ids = torch.tensor([(own * k)[:k] if len(own) < k else own[-k:] for own in texts["input_ids"]])
    words = model.frozen_lm().embed(ids.to(model.device)).float().flatten(1).cpu()
    x = torch.cat(views)
    y = words.repeat_interleave(torch.tensor([len(view) for view in views]), dim=0)
    (x_mean, scale), y_mean = statistics_of(x), y.mean(0)
    z = (x - x_mean) * scale
    gram = z.t() @ z + ridge * len(z) * torch.eye(z.shape[1])
    weight = torch.linalg.solve(gram, z.t() @ (y - y_mean)).t() * scale
    projector.weight.copy_(weight)
    projector.bias.copy_(y_mean - weight @ x_mean)


def start_ret_head(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    dataset: Dataset,
    seed: int = 0,
    penalty: float = 1e-2,
) -> None:
    """Start `[RET]`'s row of the head, of several tokens the first one's, where its own loss is least, over one text of
    each of a thousand rows.

    The hidden states before `[RET]` and the language model's own logits are constants, so the loss depends on this row
    alone. Joint training sees each text once or not at all, too little to learn where texts end.

    Args:
        penalty (`float`, defaults to 1e-2): Of the row's squared norm; a thousand texts say little of its many entries.
    """
    if model.adapter.ret_lm_head is None:
        return
    rows, choose = dataset.shuffle(seed=seed).select(range(min(len(dataset), 1000))), random.Random(seed).choice
    texts = sorted((choose(own) for own in retrieval_captions(rows)), key=len)
    batches = [_states_before_tokens(model, collator, texts[i : i + 64]) for i in range(0, len(texts), 64)]
    states, normalizers, is_end = (torch.cat(parts) for parts in zip(*batches, strict=True))
    transform, rows = model.frozen_lm().transform, model.adapter.ret_lm_head.weight
    row = torch.nn.Parameter(rows[:1].detach().clone())
    weights = 1 + (_END_WEIGHT - 1) * is_end
    optimizer = torch.optim.LBFGS([row], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = transform(states @ row.t().to(states))[:, 0]
        found = (weights * (torch.logaddexp(normalizers, logits) - is_end * logits)).mean()
        found = found + penalty * row.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        rows[:1] = row


@torch.no_grad()
def _states_before_tokens(
    model: FromageForConditionalGeneration, collator: FromageDataCollator, texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token of texts but the first, up to `[RET]`: the hidden state before it (T, H), the logsumexp of the
    language model's own logits there (T,), and whether it is `[RET]` (T,)."""
    lm = model.frozen_lm()
    ids, mask = (each.to(model.device) for each in collator.retrieval_inputs(texts).values())
    mask = mask.masked_fill(ids > model.config.ret_token_id, 0)
    hidden, _ = lm.run_unpadded(lm.embed(ids), mask)
    has_previous = has_previous_token(mask)
    hidden = hidden[torch.nn.functional.pad(has_previous, (0, 1))[mask.bool()]]
    targets = ids[:, 1:][has_previous]
    normalizers, _ = lm.frozen_logit_statistics(hidden, targets)
    return hidden.float(), normalizers, (targets == model.config.ret_token_id).float()


def fit(
    model: FromageForConditionalGeneration,
    collator: FromageDataCollator,
    args: RunArguments,
    dataset: Dataset,
    seconds: float,
) -> FromageTrainer:
    """Retrieval first, then joint training for about `seconds`, `args.max_steps` at most.

    Returns:
        The trainer, its model in eval mode.
    """
    if model.config.projector_type == "linear" and not model.config.vision_patch_tokens:
        start_projector(model, collator, dataset)  # others have no closed form
    start_ret_head(model, collator, dataset, args.seed)
    steps = steps_that_fit(model, collator, dataset, args.per_device_train_batch_size, seconds)
    args.max_steps = min(args.max_steps, steps)
    trainer = FromageTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, **args.trainer_options()
    )
    trainer.train()
    model.eval()
    return trainer
