"""Stable Diffusion 1.5 at true size, random weights: from a pipeline folder to a bundle, engines and an image."""

TEACHER, STUDENT, BUNDLE, PHOTOS, RUN = "teacher", "student", "bundle", "photos", "run"
