"""What tests of conversations share: a small pipeline with pictures to show, which may be slow and may be watched."""

import time

from modeling_fromage import FromageImageIndex, FromagePipeline
from tests.helpers.backbones import make_model, make_processor
from tests.helpers.pipelines import COLOURS, picture

ALWAYS, NEVER = 20.0, -20.0  # biases of [RET] for a random model


class Pace:
    """Counts the steps of a language model, and makes each take `seconds`."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def __call__(self, *args: object) -> None:
        self.steps += 1
        time.sleep(self.seconds)


def make_talker(
    names: list[str] = COLOURS, num_ret_tokens: int = 1, **config_kwargs: object
) -> tuple[FromagePipeline, Pace]:
    """A random model with an index of pictures in these colours, which are their names."""
    model = make_model("opt_clip", num_ret_tokens=num_ret_tokens, **config_kwargs)
    processor = make_processor(num_ret_tokens=num_ret_tokens)
    metadata = [{"caption": name} for name in names]
    index = FromageImageIndex.build(
        model, processor, [picture(name) for name in names], ids=list(names), metadata=metadata, show_progress=False
    )
    pace = Pace()
    model.language_model.model.decoder.layers[0].register_forward_pre_hook(pace)
    return FromagePipeline(model=model, processor=processor, index=index), pace
