"""Training: data, recipe, the loop, its processes."""
