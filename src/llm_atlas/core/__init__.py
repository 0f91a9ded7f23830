"""The floor everything stands on: devices, seeds, fetched assets, weight files."""
