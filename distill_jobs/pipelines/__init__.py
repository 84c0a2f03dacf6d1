"""Stock diffusers pipeline folders: reading teachers and published models, writing students, exporting both."""
