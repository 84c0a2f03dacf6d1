"""How a few-step student is made: recipes, data, teacher, student, objectives, loop, evaluation, export."""

import logging

import engines  # noqa: F401 - first: it turns off the uploads of the engine libraries before any is loaded


def _concerns_us(record: logging.LogRecord) -> bool:
    """Not that diffusers' pipelines name an image processor that wants torchvision: nothing here uses one."""
    return "requires torchvision" not in record.getMessage()


logging.getLogger("transformers.utils.import_utils").addFilter(_concerns_us)
