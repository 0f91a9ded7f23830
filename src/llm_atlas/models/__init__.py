"""Whole models: one Decoder, the tables of names that load others' weights into it, and tools to look inside."""
