"""Rebuilds scenes and model: `python -m lvlm_fix.assets.recipe --out DIR`. Read world, scenes, tower, decoder."""
