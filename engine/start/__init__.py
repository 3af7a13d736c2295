"""What happens once, before the first step: memory is planned, weights are loaded, the parts are made."""
