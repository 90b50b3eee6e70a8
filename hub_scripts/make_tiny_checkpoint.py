"""Make a small random FROMAGe to try code with: `python -m hub_scripts.make_tiny_checkpoint DIR`.

Writes DIR/language_model (an OPT), DIR/vision_model (a CLIP encoder), and DIR/fromage, a checkpoint of the trained
parts that refers to both. It needs no network, and always writes the same weights.
"""

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Tokenizer,
    OPTConfig,
    OPTForCausalLM,
)

from modeling_fromage import FromageForConditionalGeneration, FromageProcessor
from modeling_fromage.io.command_line import at_least, command_parser, errors_in_one_line

_SPECIAL_TOKENS = ["<pad>", "</s>"]


def make_tiny_checkpoint(directory: str | Path, num_image_tokens: int = 1) -> Path:
    """Write the three folders and return the checkpoint's."""
    directory = Path(directory)
    text, vision = directory / "language_model", directory / "vision_model"
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([__doc__], vocab_size=400, special_tokens=_SPECIAL_TOKENS, show_progress=False)
    text.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(text / "tokenizer.json"))
    tokenizer = GPT2Tokenizer(
        tokenizer_file=str(text / "tokenizer.json"), bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(text)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    OPTForCausalLM(
        OPTConfig(vocab_size=len(tokenizer) + 4, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                  eos_token_id=tokenizer.eos_token_id, **ids)
    ).save_pretrained(text)  # fmt: skip
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         image_size=32, patch_size=8)
    ).save_pretrained(vision)  # fmt: skip
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(vision)

    processor = FromageProcessor.from_vision_text_pretrained(str(vision), str(text), num_image_tokens=num_image_tokens)
    model = FromageForConditionalGeneration.from_vision_text_pretrained(
        str(vision), str(text), processor=processor, projection_dim=16
    )
    checkpoint = directory / "fromage"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    return checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--num-image-tokens", type=at_least(1), default=1, help="visual tokens per image")
    options = parser.parse_args(argv)
    with errors_in_one_line(parser):
        print(make_tiny_checkpoint(options.directory, options.num_image_tokens))


if __name__ == "__main__":
    main()
