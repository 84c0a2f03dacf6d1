"""How a few-step student is made: recipes, data, teacher, student, objectives, loop, evaluation, export."""

import logging

import engines  # noqa: F401 - first: it turns off the uploads of the engine libraries before any is loaded


def _concerns_us(record: logging.LogRecord) -> bool:
    """Not that diffusers' pipelines name an image processor that wants torchvision: nothing here uses one.

    Nor that the config of an AutoencoderTiny, as diffusers writes it, holds a field that diffusers does not read.
    """
    told = record.getMessage()
    own_field = told.startswith("The config attributes {'block_out_channels'") and "AutoencoderTiny" in told
    return "requires torchvision" not in told and not own_field


for _name in ("transformers.utils.import_utils", "diffusers.configuration_utils"):
    logging.getLogger(_name).addFilter(_concerns_us)
