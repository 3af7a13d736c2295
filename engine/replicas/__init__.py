"""Several engines with the same model behind one front end (`--data-parallel-size`)."""
