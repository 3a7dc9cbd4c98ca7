"""Frozen features: extracted once, then probed and searched."""
