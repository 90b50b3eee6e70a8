"""A process that has not this package, and loads checkpoints with the code that they carry."""

from pathlib import Path

import torch

from tests.helpers import processes

STRANGER = """
import sys
sys.modules["modeling_fromage"] = None  # not installed here
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from PIL import Image

folder, result = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="<|image|>a cat[RET]", images=Image.new("RGB", (40, 30), "red"), return_tensors="pt")
found = []
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        found.append((model(**inputs).logits, model.get_text_embeds(**inputs)))
assert type(model).__module__.startswith("transformers_modules.")
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_image_tokens == 2
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
torch.save(found, result)
"""


def ask_stranger(folder: str | Path, tmp_path: Path, prelude: str = "", **environment: str) -> list:
    """Load `folder` (or a Hub id) with `trust_remote_code` in a process of its own that has not this package.

    `prelude` is code that runs before."""
    script, result = tmp_path / "stranger.py", tmp_path / "result.pt"
    script.write_text(f"import sys\n{prelude}{STRANGER}")
    environment = {"HF_HOME": str(tmp_path / "hf_home"), **environment}
    run = processes.run(script, folder, result, cwd=tmp_path, **environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(result, weights_only=True)
