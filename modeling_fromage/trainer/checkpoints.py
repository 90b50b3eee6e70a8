"""The checkpoints of a run."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint_files_fromage import load_trained_parts, weight_files_of
from ..pretrained_fromage import FromagePreTrainedModel

logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run with a complete `trainer_state.json`, the last file that the Trainer writes into
    it; `None` where there is none."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := name.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and passed over.", path)
        else:
            return str(path)
    return None


def where_to_resume(given: str | bool | None, output_dir: str | os.PathLike) -> tuple[bool, Any]:
    """Whether a run is to go on where it was, and its checkpoint, if there is one: `True`, also as YAML and command
    lines write it, stands for the last complete one in `output_dir`."""
    text = str(given).lower()
    if text not in ("true", "false") or isinstance(given, str) and os.path.exists(given):
        return False, given
    if text == "false":
        return False, False
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("%s has no complete checkpoint yet: training starts from the beginning.", output_dir)
    return True, checkpoint


def restore_trained(model: Any, checkpoint: str | None) -> bool:
    """Load what the Trainer would not: an adapter that `add_adapter` has put into `model`, or what is trained beside
    sharded backbones; whether there is such."""
    if getattr(model, "_hf_peft_config_loaded", False):
        model.restore_adapter(checkpoint)
    elif isinstance(model, FromagePreTrainedModel) and model.traits.is_sharded:
        load_trained_parts(model.adapter, weight_files_of(checkpoint or "", None, {}))
    else:
        return False
    return True


__all__ = ["last_complete_checkpoint", "restore_trained", "where_to_resume"]
