"""Training a model: the one loop, and in time the objectives, optimizers and schedules that plug into it."""
