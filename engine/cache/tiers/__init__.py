"""Tiers of the prefix cache: host memory and a folder on a disk keep what the device has no room for."""
