"""The embedded LVLM, its evaluation scenes and samples. Built by `recipe`, described in MODEL_CARD.md."""
