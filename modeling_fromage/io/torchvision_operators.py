"""A torchvision whose compiled operators cannot load, such as PyPI's CUDA build beside a CPU build of torch.

`import torchvision` then fails with "operator torchvision::nms does not exist", and with it all of transformers that
deals with images. Nothing here, in timm or in open_clip calls these operators: that they are declared is enough.
"""

import sys
import warnings
from importlib.util import find_spec

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")  # those that torchvision registers more about, as it is imported


def supply_missing_operators() -> None:
    """Declare the operators without which torchvision cannot be imported, and warn. A torchvision that can be imported,
    or fails for another reason, is left alone."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return
    except ImportError:
        return
    else:
        return
    _forget_torchvision()
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)
    try:
        import torchvision  # noqa: F401, F811
    except (ImportError, RuntimeError):
        _forget_torchvision()
        return
    warnings.warn(
        "torchvision's compiled operators do not load: it was built for another torch. It is used without them. To "
        "silence this, install the build that goes with your torch, or uninstall torchvision.",
        stacklevel=3,
    )


def _forget_torchvision() -> None:
    """Let the next import of torchvision start anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
