"""The package first: it makes do with a torchvision of another build, which transformers then finds."""

import modeling_fromage  # noqa: F401
