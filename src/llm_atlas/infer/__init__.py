"""Running a model: the one generate loop and what plugs into it."""
