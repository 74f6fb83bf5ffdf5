"""Rebuild the embedded LVLM, scenes, samples and the OpenCLIP model: `python -m lvlm_fix.assets.recipe --out DIR`."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lvlm_fix.assets.recipe.architecture import (
    PRESETS,
    Preset,
    build_config,
    build_processor,
    build_tokenizer,
)
from lvlm_fix.assets.recipe.dataset import render
from lvlm_fix.assets.recipe.world import CATEGORIES

log = logging.getLogger("lvlm_fix.recipe")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lvlm_fix.assets.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and results")
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="cpu", help="sizes and length of the training"
    )
    parser.add_argument(
        "--stage",
        choices=("all", "lvlm", "clip"),
        default="all",
        help="the LVLM, the OpenCLIP model, or both",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(out / "recipe.log")],
    )
    started, preset = time.monotonic(), PRESETS[arguments.preset]
    log.info(
        "preset %s, seed %d, on %s, torch %s",
        arguments.preset,
        arguments.seed,
        arguments.device,
        torch.__version__,
    )

    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(arguments.seed)
    if arguments.stage != "clip":
        _build_lvlm(tokenizer, preset, out, arguments.seed, arguments.device)
        log.info("LVLM done after %.0f minutes", (time.monotonic() - started) / 60)
    if arguments.stage != "lvlm":
        _build_clip(tokenizer, arguments.preset, out, arguments.seed, arguments.device)
    log.info("everything done after %.0f minutes", (time.monotonic() - started) / 60)


def _build_lvlm(
    tokenizer: PreTrainedTokenizerFast, preset: Preset, out: Path, seed: int, device: str
) -> None:
    started = time.monotonic()
    # Eager attention is for training on a CPU alone: its backward pass is four times faster there than the fused one.
    model = LlavaForConditionalGeneration._from_config(
        build_config(preset, tokenizer), attn_implementation="eager"
    ).to(device)
    name_ids = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in CATEGORIES]

    from lvlm_fix.assets.recipe.tower import train_tower

    tower_scenes = render(0, preset.tower_scenes, out / "scenes", "render for the tower")
    train_tower(model, name_ids, tower_scenes, preset, out, seed)
    del tower_scenes
    log.info("tower done after %.0f minutes", (time.monotonic() - started) / 60)

    from lvlm_fix.assets.recipe.decoder import train_decoder

    # Scenes that the tower has not seen: on its own training scenes its features would be surer than in use.
    decoder_scenes = render(
        preset.tower_scenes, preset.decoder_scenes, out / "scenes", "render for the decoder"
    )
    train_decoder(model, tokenizer, decoder_scenes, preset, out, seed)
    log.info("decoder done after %.0f minutes", (time.monotonic() - started) / 60)

    from lvlm_fix.assets.recipe.release import release

    release(model, build_processor(tokenizer), out)


def _build_clip(tokenizer: PreTrainedTokenizerFast, name: str, out: Path, seed: int, device: str) -> None:
    from lvlm_fix.assets.recipe.clip import PRESETS as SIZES
    from lvlm_fix.assets.recipe.clip import build_clip_tokenizer, train_clip, write_clip

    # Scenes of its own, too: what judges the LVLM should know no more of its training than anyone.
    first = PRESETS[name].tower_scenes + PRESETS[name].decoder_scenes
    drawn = render(first, SIZES[name].scenes, out / "scenes", "render for OpenCLIP")
    own = build_clip_tokenizer(tokenizer)
    write_clip(train_clip(own, drawn, SIZES[name], out, seed, device), own, SIZES[name], out / "clip")


if __name__ == "__main__":
    main()
