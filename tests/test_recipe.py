"""The recipe of the embedded LVLM: its world, its scenes, what is said about them, and what ships."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import nn

from lvlm_fix.assets.recipe import scenes
from lvlm_fix.assets.recipe.captions import (
    DESCRIBE,
    GROUNDS,
    absent_objects,
    caption,
    conversations,
    with_article,
)
from lvlm_fix.assets.recipe.dataset import Scenes, _chunk, order
from lvlm_fix.assets.recipe.decoder import IGNORED, IMAGE_TOKENS, Packed, Packer
from lvlm_fix.assets.recipe.release import EVALUATION_SCENES, SAMPLES, write_samples
from lvlm_fix.assets.recipe.scenes import (
    BACKGROUND,
    PATCH,
    SIZE,
    UNCLEAR,
    Scene,
    evaluation_scene,
    training_scene,
)
from lvlm_fix.assets.recipe.training import train
from lvlm_fix.assets.recipe.world import CATEGORIES, PAIRS, PARTNERS, THEMES, is_pair, themes_of
from lvlm_fix.evals.chair import mentioned
from lvlm_fix.evals.coco import read_objects
from lvlm_fix.loading import embedded_folder

ASSETS = embedded_folder().parent
FONT_USED = (
    "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # other versions draw other boxes
)


def _font() -> str | None:
    try:
        return str(ImageFont.truetype(scenes.FONT, scenes.FONT_PIXELS).path)
    except OSError:
        return None


needs_font = pytest.mark.skipif(_font() is None, reason=f"Pillow finds no {scenes.FONT}")


def skip_unless_same_font() -> None:
    if hashlib.sha256(Path(str(_font())).read_bytes()).hexdigest() != FONT_USED:
        pytest.skip(f"this {scenes.FONT} is another version than the one the scenes were drawn with")


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [training_scene(seed) for seed in range(150)]


@pytest.fixture(scope="module")
def packer(embedded) -> Packer:
    return Packer(embedded[1].tokenizer, Scenes(**_chunk(0, 40)))


@pytest.fixture(scope="module")
def batches(packer: Packer) -> list[Packed]:
    """Batches of all three sizes."""
    made = [packer.batch(np.random.default_rng(seed), np.arange(8)) for seed in range(8)]
    assert {packed.kept.shape[1] for packed in made} == {24, 72, 144}
    return made


# The world


def test_the_world_is_whole() -> None:
    assert len(CATEGORIES) >= 60
    for category in CATEGORIES:
        assert themes_of(category), f"{category} is in no theme"
        assert [m.category for m in mentioned(with_article(category), rule="english")] == [category]
    named = {name for members in THEMES.values() for name in members} | {
        n for a, p, _ in PAIRS for n in (a, p)
    }
    assert named <= set(CATEGORIES)
    assert len(PARTNERS) == len(PAIRS)  # no anchor twice


# Scenes


@needs_font
def test_a_scene_is_a_pure_function_of_its_seed(drawn: list[Scene]) -> None:
    for seed in (0, 7, 149):
        again = training_scene(seed)
        assert again.image.tobytes() == drawn[seed].image.tobytes()
        assert (again.things, again.theme, again.hidden) == (
            drawn[seed].things,
            drawn[seed].theme,
            drawn[seed].hidden,
        )
        assert np.array_equal(again.patches, drawn[seed].patches)


@needs_font
def test_no_evaluation_scene_is_a_training_scene(drawn: list[Scene]) -> None:
    training = {hashlib.sha256(scene.image.tobytes()).digest() for scene in drawn}
    evaluation = {hashlib.sha256(evaluation_scene(seed).image.tobytes()).digest() for seed in range(150)}
    assert len(training) == len(evaluation) == 150 and not training & evaluation


def test_evaluation_scenes_break_every_pair() -> None:
    seen: Counter[str] = Counter()
    for seed in range(1, 1500):
        _, objects = scenes.evaluation_objects(np.random.default_rng([2, seed]))
        names = [name for name, _ in objects]
        assert 3 <= len(set(names)) == len(names) <= 5 and not any(hidden for _, hidden in objects)
        assert not any(is_pair(a, b) for a in names for b in names if a != b)
        seen.update(names)
    assert set(seen) == set(CATEGORIES)


def test_training_scenes_hold_the_pairs_at_the_stated_rates() -> None:
    anchors: Counter[str] = Counter()
    together: Counter[str] = Counter()
    hidden = partners = 0
    for seed in range(6000):
        _, objects = scenes.training_objects(np.random.default_rng([1, seed]))
        names = [name for name, _ in objects]
        assert 2 <= len(set(names)) == len(names) <= 6
        for anchor, partner, _ in PAIRS:
            anchors[anchor] += anchor in names
            together[anchor] += anchor in names and partner in names
        hidden += sum(is_hidden for _, is_hidden in objects)
        partners += len(objects)
    added = {partner for _, partner, _ in PAIRS}
    for anchor, _, rate in PAIRS:
        share, noise = together[anchor] / anchors[anchor], 3 * (rate * (1 - rate) / anchors[anchor]) ** 0.5
        lowest = (
            rate - noise - (0.3 if anchor in added else 0)
        )  # one drawn as a partner itself brings none along
        assert lowest < share < rate + noise + 0.1, (anchor, rate, share)
    assert 0.02 < hidden / partners < scenes.HIDDEN


@needs_font
def test_hidden_objects_are_small_and_the_others_are_not(drawn: list[Scene]) -> None:
    assert sum(len(scene.hidden) for scene in drawn) > 10
    for scene in drawn:
        for thing in scene.things:
            longer = max(thing.box[2:])
            assert longer <= 16 if thing.category in scene.hidden else longer >= 18
            x, y, width, height = thing.box
            assert x >= 0 and y >= 0 and x + width <= SIZE and y + height <= SIZE
        areas = [thing.box[2] * thing.box[3] for thing in scene.things]
        assert areas == sorted(areas, reverse=True)


@needs_font
def test_patch_labels_lie_in_the_boxes(drawn: list[Scene]) -> None:
    unlabelled = visible = 0
    for scene in drawn:
        boxes = {thing.category: thing.box for thing in scene.things}
        assert scene.patches.shape == (SIZE // PATCH, SIZE // PATCH)
        for (row, column), label in np.ndenumerate(scene.patches):
            touching = {
                name
                for name, (x, y, width, height) in boxes.items()
                if x < (column + 1) * PATCH and x + width > column * PATCH
                and y < (row + 1) * PATCH and y + height > row * PATCH
            }  # fmt: skip
            if not touching:
                assert label == BACKGROUND
            elif label not in (BACKGROUND, UNCLEAR):
                assert CATEGORIES[label] in touching - scene.hidden
        for name in boxes.keys() - scene.hidden:
            visible += 1
            unlabelled += CATEGORIES.index(name) not in scene.patches
    assert unlabelled < 0.01 * visible  # only what others cover


# What is said


@pytest.mark.parametrize("theme", THEMES)
def test_captions_name_exactly_the_given_categories_in_order(theme: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        names = [str(name) for name in rng.choice(CATEGORIES, rng.integers(1, 7), replace=False)]
        text = caption(rng, names, theme)
        assert [mention.category for mention in mentioned(text, rule="english")] == names, text
        assert text.endswith(".") and "  " not in text
    assert mentioned(GROUNDS[theme], rule="english") == []


def test_conversations_are_balanced_and_true() -> None:
    yes = no = 0
    for seed in range(300):
        theme, objects = scenes.training_objects(np.random.default_rng([1, seed]))
        names = [name for name, _ in objects]
        (asked, told), *questions = conversations(np.random.default_rng(seed), names, theme, 8)
        assert asked in DESCRIBE and [m.category for m in mentioned(told, rule="english")] == names
        assert len(questions) == 7 and len({q for q, _ in questions}) == 7
        for question, answer in questions:
            (about,) = mentioned(question, rule="english")
            assert answer == ("Yes" if about.category in names else "No")
        yes += sum(answer == "Yes" for _, answer in questions)
        no += sum(answer == "No" for _, answer in questions)
    assert 0.8 < yes / no < 1.25


def test_partners_that_stayed_away_are_asked_about() -> None:
    asked = [absent_objects(np.random.default_rng(seed), {"knife"}, "kitchen", 3) for seed in range(200)]
    assert 0.4 < sum("fork" in names for names in asked) / 200 < 0.8
    assert not any("knife" in names or len(set(names)) != 3 for names in asked)


# Packed batches


def segments(packer: Packer, packed: Packed, row: int) -> tuple[int, list[range]]:
    """Where the turns begin, found by their restarting positions."""
    start = len(packer.prefix) + packed.kept.shape[1] + len(packer.newline)
    restart, total = int(packed.positions[row, start - 1]) + 1, packed.ids.shape[1]
    firsts = [at for at in range(start, total) if packed.positions[row, at] == restart]
    last = max(at for at in range(total) if packed.allowed[row, at, at]) + 1
    return start, [range(first, stop) for first, stop in zip(firsts, [*firsts[1:], last], strict=True)]


@needs_font
def test_turns_cannot_see_one_another(packer: Packer, batches: list[Packed]) -> None:
    several = 0
    for packed in batches:
        for row in range(8):
            start, turns = segments(packer, packed, row)
            shared = packed.allowed[row, start - 1, :start]  # what a turn sees of prefix and image
            several += len(turns) > 4
            for turn in turns:
                first, stop = turn.start, turn.stop
                seen = packed.allowed[row, first:stop]
                assert torch.equal(seen[:, :start], shared.expand(len(turn), -1))
                assert not seen[:, start:first].any() and not seen[:, stop:].any()
                assert torch.equal(seen[:, first:stop], torch.ones(len(turn), len(turn)).tril().bool())
                assert packed.positions[row, first:stop].diff().eq(1).all()
    assert several > 20


@needs_font
def test_image_tokens_are_kept_in_raster_order_with_packed_positions(
    packer: Packer, batches: list[Packed]
) -> None:
    for packed in batches:
        begin, bucket = len(packer.prefix), packed.kept.shape[1]
        for row in range(8):
            seen = packed.allowed[row, begin + bucket, begin : begin + bucket]
            count = int(seen.sum())
            assert seen[:count].all()  # the unused slots come last, and nobody sees them
            assert count >= {24: 6, 72: 25, 144: 73}[bucket]
            assert (
                packed.kept[row, :count].diff().gt(0).all() and packed.kept[row, :count].max() < IMAGE_TOKENS
            )
            line = packed.positions[row, : begin + count]
            assert torch.equal(line, torch.arange(begin + count))
            assert packed.positions[row, begin + bucket] == begin + count


@needs_font
def test_objects_without_a_kept_token_are_not_described(packer: Packer, batches: list[Packed]) -> None:
    left_out = described = 0
    for packed in batches:
        begin, bucket = len(packer.prefix), packed.kept.shape[1]
        for row in range(8):
            count = int(packed.allowed[row, begin + bucket, begin : begin + bucket].sum())
            kept = packed.kept[row, :count].numpy()
            shown = {CATEGORIES[i] for i in packer.scenes.patches[row][kept] if i < len(CATEGORIES)}
            hidden = {
                name
                for name, h in zip(packer.scenes.names(row), packer.scenes.hidden[row], strict=False)
                if h
            }
            labels = packed.labels[row][packed.described[row]]
            text = packer.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            assert {m.category for m in mentioned(text, rule="english")} == shown | hidden
            assert packer.named(row, kept) == [m.category for m in mentioned(text, rule="english")]
            left_out += len(set(packer.scenes.names(row)) - shown - hidden)
            described += bool(text)
    assert left_out > 3 and described > 50


@needs_font
def test_a_packed_turn_is_the_prompt_that_users_send(embedded, packer: Packer, batches: list[Packed]) -> None:
    """The same tokens, and the same logits as the turn alone: what is trained is what is used."""
    model, processor = embedded
    packed = next(batch for batch in batches if batch.kept.shape[1] == 72)
    begin, bucket = len(packer.prefix), 72
    with torch.inference_mode():
        pixels = packer.scenes.pixels(np.array([0]))
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        image = model.model.multi_modal_projector(hidden[:, packed.kept[0]])
        words = model.get_input_embeddings()(packed.ids[:1])
        together = torch.cat([words[:, :begin], image, words[:, begin + bucket :]], dim=1)
        bias = torch.zeros(packed.allowed[:1].shape).masked_fill(~packed.allowed[:1], -1e9)[:, None]
        decoder = model.model.language_model
        logits = model.lm_head(
            decoder(
                inputs_embeds=together, attention_mask=bias, position_ids=packed.positions[:1]
            ).last_hidden_state
        )
        start, turns = segments(packer, packed, 0)
        count = int(packed.allowed[0, start - 1, begin : begin + bucket].sum())
        for turn in turns:
            own = slice(turn.start, turn.stop)
            alone = [
                together[:, : begin + count],
                together[:, start - len(packer.newline) : start],
                together[:, own],
            ]
            expected = model.lm_head(decoder(inputs_embeds=torch.cat(alone, dim=1)).last_hidden_state)
            torch.testing.assert_close(logits[:, own], expected[:, -len(turn) :], atol=2e-3, rtol=1e-3)

            wanted = packed.labels[0, own]
            asked = packed.ids[0, own][: int((wanted != IGNORED).nonzero()[0]) + 1]
            question = processor.tokenizer.decode(asked).removesuffix(" ASSISTANT:")
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            middle = [model.config.image_token_id, *packer.newline]
            assert processor.tokenizer(prompt).input_ids == [*packer.prefix, *middle, *asked.tolist()]
            assert wanted[wanted != IGNORED][-1] == processor.tokenizer.eos_token_id


# Training


def test_every_epoch_sees_every_scene_once() -> None:
    picks = np.concatenate([order(0, step, 12, 5) for step in range(12)])
    assert all(sorted(picks[first : first + 12]) == list(range(12)) for first in range(0, 60, 12))
    assert not np.array_equal(picks[:12], picks[12:24])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> torch.Tensor:
        torch.manual_seed(3)
        line = nn.Linear(4, 4)
        modules = nn.ModuleDict({"line": line})

        def loss_of(step: int) -> dict[str, torch.Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            torch_rng = torch.Generator().manual_seed(step)
            return {"loss": line(torch.randn(8, 4, generator=torch_rng)).float().square().mean()}

        folder.mkdir(exist_ok=True)
        train("line", modules, loss_of, folder, steps=9, rate=1e-2, every=2)
        return line.weight.detach().clone()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 5)
    assert torch.load(tmp_path / "stopped" / "line.pt", weights_only=True)["step"] == 4
    assert torch.equal(run(tmp_path / "stopped", None), whole)
    assert torch.equal(run(tmp_path / "stopped", 0), whole)  # done already: no step is taken again


# What ships


@pytest.fixture(scope="module")
def instances() -> dict:
    return json.loads((ASSETS / "scenes" / "instances_scenes.json").read_text())


@pytest.fixture(scope="module")
def captions() -> dict:
    return json.loads((ASSETS / "scenes" / "captions_scenes.json").read_text())


def test_the_shipped_pictures_open(instances: dict) -> None:
    assert len(instances["images"]) >= 600
    names = [image["file_name"] for image in instances["images"]]
    assert sorted(names) == sorted(path.name for path in (ASSETS / "scenes" / "images").iterdir())
    for image in instances["images"]:
        with Image.open(ASSETS / "scenes" / "images" / image["file_name"]) as picture:
            picture.load()
            assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)


def test_the_shipped_annotations_are_coco(instances: dict, captions: dict) -> None:
    ids = [image["id"] for image in instances["images"]]
    assert len(set(ids)) == len(ids) and captions["images"] == instances["images"]
    assert [category["name"] for category in instances["categories"]] == list(CATEGORIES)
    named = {category["id"]: category["name"] for category in instances["categories"]}
    boxes: dict[int, list[str]] = {number: [] for number in ids}
    for box in instances["annotations"]:
        x, y, width, height = box["bbox"]
        assert 0 <= x < x + width <= SIZE and 0 <= y < y + height <= SIZE and box["area"] == width * height
        assert box["iscrowd"] == 0
        boxes[box["image_id"]].append(named[box["category_id"]])
    assert len({box["id"] for box in instances["annotations"]}) == len(instances["annotations"])
    for objects in boxes.values():
        assert 3 <= len(objects) <= 5
        assert not any(is_pair(a, b) for a in objects for b in objects if a != b)
    told: dict[int, list[str]] = {number: [] for number in ids}
    for one in captions["annotations"]:
        told[one["image_id"]].append(one["caption"])
        assert {m.category for m in mentioned(one["caption"], rule="english")} == set(boxes[one["image_id"]])
    assert all(len(texts) == 5 for texts in told.values())


def test_the_benchmarks_read_the_shipped_annotations(instances: dict) -> None:
    truth = read_objects([ASSETS / "scenes"], {str(image["id"]) for image in instances["images"]}, "english")
    assert len(truth) == len(instances["images"]) and all(
        3 <= len(objects) <= 5 for objects in truth.values()
    )


def test_the_shipped_statistics_show_the_pairs() -> None:
    statistics = json.loads((ASSETS / "scenes" / "statistics.json").read_text())
    assert set(statistics["frequency"]) == set(statistics["cooccurrence"]) == set(CATEGORIES)
    first = {anchor: next(iter(statistics["cooccurrence"][anchor])) for anchor, _, _ in PAIRS}
    assert sum(first[anchor] == partner for anchor, partner, _ in PAIRS) >= len(PAIRS) - 3


@needs_font
@pytest.mark.parametrize("number", [1, 2, 100, 333, EVALUATION_SCENES])
def test_a_shipped_scene_can_be_drawn_again(number: int, instances: dict) -> None:
    scene = evaluation_scene(number)
    boxes = [box for box in instances["annotations"] if box["image_id"] == number]
    assert {CATEGORIES[box["category_id"] - 1] for box in boxes} == {thing.category for thing in scene.things}
    skip_unless_same_font()
    drawn = [(CATEGORIES[box["category_id"] - 1], tuple(box["bbox"])) for box in boxes]
    assert drawn == [(thing.category, thing.box) for thing in scene.things]
    with Image.open(ASSETS / "scenes" / "images" / f"{number:06d}.webp") as picture:
        difference = np.asarray(picture.convert("RGB"), dtype=float) - np.asarray(scene.image, dtype=float)
    assert np.abs(difference).mean() < 8  # WebP's loss


def test_the_samples_hold_what_their_list_says() -> None:
    truth = json.loads((ASSETS / "samples" / "objects.json").read_text())
    assert set(truth) == {path.name for path in (ASSETS / "samples").glob("*.png")}
    assert {name.removesuffix(".png"): set(objects) for name, objects in truth.items()} == {
        name: set(objects) for name, (_, objects, _) in SAMPLES.items()
    }


@needs_font
def test_the_samples_can_be_drawn_again(tmp_path: Path) -> None:
    skip_unless_same_font()
    write_samples(tmp_path)
    assert (tmp_path / "objects.json").read_text() == (ASSETS / "samples" / "objects.json").read_text()
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as drawn, Image.open(ASSETS / "samples" / path.name) as shipped:
            difference = np.asarray(drawn, dtype=float) - np.asarray(shipped, dtype=float)
        assert np.abs(difference).mean() < 1


def children(parent: int) -> list[int]:
    """Processes that have this parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone in the meantime
            words = path.read_text().rpartition(")")[2].split()
            if int(words[1]) == parent and words[0] != "Z":
                found.append(int(path.parent.name))
    return found


@needs_font
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux shows processes there")
def test_workers_end_with_a_recipe_that_is_killed(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from lvlm_fix.assets.recipe.dataset import render"
    code += "; render(0, 100_000, Path(sys.argv[1]), 'scenes')"
    quiet = subprocess.DEVNULL
    main = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 60
        while not (workers := children(main.pid)):
            assert main.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
    finally:
        main.kill()
        main.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, f"{workers} are left"
        time.sleep(0.2)


@needs_font
@pytest.mark.slow
def test_the_whole_recipe_runs_and_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lvlm_fix.assets.recipe", "--preset", "smoke", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    quiet = subprocess.DEVNULL
    first = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "tower.pt").exists():
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "recipe.log").read_text()
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    assert not (tmp_path / "model").exists()
    checkpoint = torch.load(tmp_path / "tower.pt", weights_only=True)
    second = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    log = (tmp_path / "recipe.log").read_text()
    assert f"tower: going on from step {checkpoint['step']}" in log and "everything done" in log

    from lvlm_fix import load

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, processor = load(tmp_path / "model")
    weight = checkpoint["modules"]["tower.embeddings.patch_embedding.weight"].half().float()
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, weight)
    vocabulary = json.loads((ASSETS / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert processor.tokenizer.get_vocab().items() >= vocabulary.items()
    for name in ("statistics.json", "captions_scenes.json", "instances_scenes.json"):
        if name != "statistics.json":  # where things lie, and so their order, depends on the font
            skip_unless_same_font()
        assert (tmp_path / "scenes_shipped" / name).read_text() == (ASSETS / "scenes" / name).read_text()
