"""How a few-step student is made: recipes, data, teacher, student, objectives, loop, evaluation, export."""
