"""How a few-step student is made: recipes, data, teacher, student, objectives, loop, evaluation, export."""

import engines  # noqa: F401 - first: it turns off the uploads of the engine libraries before any is loaded
