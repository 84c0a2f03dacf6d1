"""What a GPU has to show, and the measure of it."""
