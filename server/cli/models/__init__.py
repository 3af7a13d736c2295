"""The commands `jamba pull`, `jamba list` and `jamba rm`, which manage the models in the hub cache."""
