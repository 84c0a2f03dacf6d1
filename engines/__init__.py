"""What a distilled model is and how it runs: schedule, samplers, bundle format, backends, pipeline."""
