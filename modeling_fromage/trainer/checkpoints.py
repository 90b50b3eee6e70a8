"""The checkpoints of a run."""

import logging
import os
import re
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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


__all__ = ["last_complete_checkpoint"]
