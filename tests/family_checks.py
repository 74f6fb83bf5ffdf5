"""What every family must show, for the families' own test files: a small model is built, saved, loaded and compared.

The slow way has no hooks, no batch and no padding: a test file's `see` re-derives an image's tokens and scores in eager
attention and Python loops, and `slow` decodes each branch of each prompt by itself.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from recorded_operations import stand_in
from slow import Conversation, SlowDecoder, best, largest_difference, stages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvlm_fix import DAMRO, VAR, VTCCLS, PromptError, ZipVL, attach, replayed_decoder, replayed_tower

TOLERANCE = 1e-4
STEPS = 5
SHORT, LONG = "what is this ?", "is there a dog or a cat in this picture ?"
WORDS = ["USER", "ASSISTANT", ":", "?", "yes", "no", "what", "is", "this", "there", "a", "dog", "or", "cat"]
WORDS += ["in", "picture"]
WORDS += [f"word{index}" for index in range(60)]

PRUNE, CONTRAST = VTCCLS(keep=0.4, start_layer=0), DAMRO(alpha=1.0, beta=0.01, topk=2)
# Random models have no sinks of their own: the threshold is low enough that some image tokens count as such.
MOVE = VAR(p=0.9, rho=0.05, min_image_attention=0.05, tau=9.0, first_layer=1, sink_dims=(3, 20))
PACK = ZipVL(tau=0.8, window=4, recent=8, random=8)
PACK_IMAGE = ZipVL(tau=0.6, window=4, recent=8, random=8, scope="image")
EVICT = ZipVL(tau=0.8, window=4, recent=8, random=8, evict=True)
FIXES = {
    "vtc_cls": (PRUNE,),
    "damro": (CONTRAST,),
    "var": (MOVE,),
    "zipvl": (PACK,),
    "zipvl image": (PACK_IMAGE,),
    "zipvl evict": (EVICT,),
    "vtc_cls damro": (PRUNE, CONTRAST),
    "all": (PRUNE, CONTRAST, MOVE, PACK),
}
EXACT = {"vtc_cls"}
NOTHING = {
    "vtc_cls": VTCCLS(keep=10**6, start_layer=0),
    "damro": DAMRO(alpha=0, beta=0),
    "var": VAR(p=0, tau=10.0, sink_dims=(3, 20)),
    "zipvl": ZipVL(tau=1, bits=8, low_bits=8, window=10_000),
}


@dataclass
class Seen:
    """One image as the slow way sees it: tokens (N, C), CLS rows of all layers (L, N), DAMRO's row (N,), tiles (N,)."""

    tokens: torch.Tensor
    layers: list[list[float]]
    row: list[float]
    tiles: list[int]

    def kept(self, prune):
        if prune is None:
            return list(range(len(self.row)))
        total = [sum(layer[i] for layer in self.layers[prune.start_layer : -1]) for i in range(len(self.row))]
        return best(total, round(prune.keep * len(total)) if prune.keep < 1 else prune.keep)

    def outliers(self, contrast):
        found = []
        for tile in sorted(set(self.tiles)):
            own = [i for i in range(len(self.row)) if self.tiles[i] == tile]
            found += [own[i] for i in best([self.row[i] for i in own], contrast.topk)]
        return found


def build_tokenizer(special: list[str], named: dict[str, str]) -> PreTrainedTokenizerFast:
    """One token a word; `named` are special tokens that the processor asks the tokenizer for."""
    known = ["<pad>", "<s>", "</s>", "<unk>", *special, *named.values(), *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=special,
        extra_special_tokens=named,
        model_max_length=4096,
        **names,
    )


@torch.no_grad()
def sharpen(model, by: float) -> None:
    """Multiply matrices, so that tokens differ in attention and methods change logits by much."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(by)
        elif name.endswith(
            ("cls_token", "position_embeddings", "patch_embedding.weight", "embeddings.weight")
        ):
            parameter.normal_()


def merged(patches: list, side: int, block: int) -> list[list]:
    """Patches of a square in raster order, grouped by the token that a block of them becomes, also in raster order."""
    tokens = []
    for row in range(0, side, block):
        for column in range(0, side, block):
            own = [(row + down, column + right) for down in range(block) for right in range(block)]
            tokens.append([patches[r * side + c] for r, c in own])
    return tokens


def mean(values) -> float:
    return sum(float(value) for value in values) / len(values)


def build(processor, *rows):
    """Model inputs of rows of (pictures, question); shorter rows are padded on the left."""
    texts = [
        f"USER : {processor.image_token * len(pictures)} {question} ASSISTANT :"
        for pictures, question in rows
    ]
    pictures = [list(pictures) for pictures, _ in rows]
    return processor(
        images=pictures if any(pictures) else None, text=texts, padding=True, return_tensors="pt"
    )


def until_end(model, ids: list[int]) -> list[int]:
    """What was said, without what fills the row up: transformers' beams take the end token where padding is 0."""
    end = model.generation_config.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


def run(model, fix, inputs, compile=False, **options):
    with attach(model, *fix, compile=compile) if fix else contextlib.nullcontext():
        return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def logits_of(model, fix, inputs, **options):
    """Logits of every step, and the ids."""
    options |= {"output_logits": True, "return_dict_in_generate": True, "min_new_tokens": STEPS}
    output = run(model, fix, inputs, **options)
    return output.logits, output.sequences


def slow_branches(model, ids, images: list[Seen], fix):
    """Embeddings and image flags of a prompt's branches, the positive one first."""
    prune, contrast, _, _ = stages(fix)
    choices = [[image.kept(prune) for image in images]]
    if contrast is not None:
        choices.append([image.outliers(contrast) for image in images])
    words, branches = model.get_input_embeddings().weight, []
    for chosen in choices:
        rows, flags = [], []
        # which token of which image each placeholder stands for, in reading order
        places = iter([(image, i) for image in range(len(images)) for i in range(len(images[image].row))])
        for word in ids:
            if word != model.config.image_token_id:
                rows.append(words[word])
                flags.append(False)
                continue
            image, i = next(places)
            if i in chosen[image]:
                rows.append(images[image].tokens[i])
                flags.append(True)
        assert next(places, None) is None
        branches.append((torch.stack(rows), flags))
    return branches


@torch.inference_mode()
def say_the_same_replayed(model, inputs, monkeypatch, methods=FIXES["all"]):
    """Ask about a picture and about darker ones, plainly and under one compile=True; recordings of the tower."""
    stand_in(monkeypatch)
    monkeypatch.setattr(replayed_decoder, "LONGEST", 10**6)
    monkeypatch.setattr(replayed_tower, "MOST_CROPS", 10**3)
    asked = [dict(inputs) | {"pixel_values": inputs["pixel_values"] * light} for light in (1.0, 0.7, 0.4)]
    plainly = [logits_of(model, methods, one) for one in asked]
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with attach(model, *methods, compile=True) as fix:
        for one, (logits, sequences) in zip(asked, plainly, strict=True):
            output = model.generate(**one, max_new_tokens=STEPS, min_new_tokens=STEPS, **options)
            assert torch.equal(output.sequences, sequences)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, logits, strict=True))
        towers, prefills, _ = (list(one.known.values()) for one in fix.pipeline.recordings)
        assert len(prefills) == 1 and len(prefills[0].graphs) > 1
        return towers


class FamilyChecks:
    """Tests of one family; a subclass gives `loaded`, `pictures`, `see` and what is said below.

    `loaded` is (model, processor), `pictures` a list of at least three of different shape, of which the first
    gives one tile; `see(model, inputs, row)` gives the images of a row, seen slowly.
    """

    # The random models have neither outliers nor sinks of their own.
    pytestmark = pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning", "ignore:damro with vtc_cls")

    image_entries: int
    """Images, as the family counts them, in the batch below."""
    records_tower = True
    """Whether its tower takes pixels and nothing else."""
    build = staticmethod(build)
    """Model inputs of rows; a family whose placeholders need company says how."""
    branches = staticmethod(slow_branches)
    """A prompt's branches, with their positions in families whose tokens keep them."""

    @staticmethod
    def see(model, inputs, row) -> list[Seen]:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, pictures):
        return [([pictures[0]], SHORT), ([pictures[1], pictures[2]], LONG)]

    @pytest.fixture(scope="class")
    @classmethod
    def inputs(cls, loaded, rows):
        return cls.build(loaded[1], *rows)

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, loaded, inputs):
        return logits_of(loaded[0], (), inputs)

    @pytest.fixture(scope="class")
    @classmethod
    def eager(cls, loaded):
        model = copy.deepcopy(loaded[0])
        model.set_attn_implementation("eager")
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, eager, inputs):
        """The images of each row."""
        with torch.inference_mode():
            return [cls.see(eager, inputs, row) for row in range(len(inputs["input_ids"]))]

    @pytest.fixture(scope="class")
    @classmethod
    def precise(cls, loaded, inputs):
        """The same in float64: model, inputs and the images of each row."""
        model, doubled = copy.deepcopy(loaded[0]).double(), copy.deepcopy(inputs).to(torch.float64)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.inference_mode():
            return model, doubled, [cls.see(eager, doubled, row) for row in range(len(doubled["input_ids"]))]

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("name", FIXES)
    def test_logits_equal_the_slow_way_at_every_step(
        self, loaded, inputs, seen, precise, name, dtype, record_property
    ):
        """In float32 up to where ZipVL has packed numbers: one on the border of two codes goes either way there."""
        model, inputs, seen = (loaded[0], inputs, seen) if dtype == "float32" else precise
        fix = FIXES[name]
        steps = 1 if dtype == "float32" and stages(fix)[3] is not None else STEPS
        logits, sequences = logits_of(model, fix, inputs)
        decoder, worst = SlowDecoder(model.get_decoder(), model.lm_head), 0.0
        for row, images in enumerate(seen):
            start, prompt = int(inputs["attention_mask"][row].argmax()), inputs["input_ids"].shape[1]
            ids = inputs["input_ids"][row, start:].tolist()
            slow = Conversation(decoder, self.branches(model, ids, images, fix), fix)
            for step in range(steps):
                if step:
                    slow.say(model.get_input_embeddings().weight[sequences[row, prompt + step - 1]])
                worst = max(worst, largest_difference(logits[step][row], slow.logits))
        record_property("largest difference", worst)
        print(f"largest difference {worst:.2e}")
        assert worst < TOLERANCE

    @pytest.mark.parametrize("name", FIXES)
    def test_methods_change_the_logits_by_far_more_than_the_tolerance(self, loaded, inputs, plain, name):
        fixed, _ = logits_of(loaded[0], FIXES[name], inputs)
        for row in range(len(fixed[0])):
            finite = fixed[0][row].isfinite()
            assert (fixed[0][row] - plain[0][0][row])[finite].abs().max() > 100 * TOLERANCE

    @pytest.mark.parametrize("name", NOTHING)
    def test_methods_set_to_do_nothing_are_the_plain_model(self, loaded, inputs, plain, name):
        logits, sequences = logits_of(loaded[0], (NOTHING[name],), inputs)
        assert torch.equal(sequences, plain[1])
        for ours, theirs in zip(logits, plain[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if name in EXACT else TOLERANCE)

    def test_the_order_of_methods_does_not_matter(self, loaded, inputs):
        results = [
            logits_of(loaded[0], fix, inputs)
            for fix in itertools.islice(itertools.permutations(FIXES["all"]), 0, None, 5)
        ]
        assert len(results) == 5
        for logits, sequences in results[1:]:
            assert torch.equal(sequences, results[0][1])
            assert all(torch.equal(a, b) for a, b in zip(logits, results[0][0], strict=True))

    @torch.inference_mode()
    def test_compiled_steps_say_the_same(self, precise):
        """In float64, where no rounding chooses another of ZipVL's codes."""
        model, inputs, _ = precise
        logits, sequences = logits_of(model, FIXES["all"], inputs)
        compiled, said = logits_of(model, FIXES["all"], inputs, compile=True)
        assert torch.equal(said, sequences)
        assert max(map(largest_difference, compiled, logits)) < TOLERANCE

    def test_what_is_recorded_and_replayed_says_the_same(self, loaded, inputs, monkeypatch):
        towers = say_the_same_replayed(loaded[0], inputs, monkeypatch)
        assert [len(one.graphs) for one in towers] == ([1] if self.records_tower else [])

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("name", ["vtc_cls damro", "var", "zipvl", "all"])
    def test_a_padded_batch_says_what_its_rows_say_alone(self, loaded, rows, inputs, name, options):
        model, processor = loaded
        together = run(model, FIXES[name], inputs, **options)[:, inputs["input_ids"].shape[1] :]
        for row, said in zip(rows, together.tolist(), strict=True):
            own = self.build(processor, row)
            alone = run(model, FIXES[name], own, **options)[0, own["input_ids"].shape[1] :].tolist()
            assert until_end(model, said) == until_end(model, alone)

    def test_sampling_follows_the_seed(self, loaded, inputs):
        def sample(seed, **options):
            torch.manual_seed(seed)
            return run(loaded[0], FIXES["all"], inputs, do_sample=True, temperature=5.0, **options)

        assert torch.equal(sample(1), sample(1))
        assert any(
            one.shape != sample(1).shape or not torch.equal(one, sample(1)) for one in map(sample, (2, 3, 4))
        )
        assert torch.equal(sample(1, top_k=1), run(loaded[0], FIXES["all"], inputs))

    def test_the_model_is_afterwards_what_it_was(self, loaded, inputs, plain):
        model = loaded[0]

        def state():
            parts = (model.config.vision_config, model.config.get_text_config(), model.config)
            hooks = [
                len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
            ]
            return [part._attn_implementation for part in parts], hooks, sorted(model.__dict__)

        before = state()
        with attach(model, *FIXES["all"]) as fix:
            assert state() != before
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert state() == before
        assert not {"forward", "get_image_features"} & (set(model.__dict__) | set(model.base_model.__dict__))
        assert fix.report["vtc_cls"]
        logits, sequences = logits_of(model, (), inputs)
        assert torch.equal(sequences, plain[1])
        assert all(torch.equal(a, b) for a, b in zip(logits, plain[0], strict=True))

    def test_the_report_tells_what_the_slow_way_finds(self, loaded, inputs, seen):
        model = loaded[0]
        with attach(model, *FIXES["all"]) as fix:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            report = fix.report
        images = [(row, image) for row, own in enumerate(seen) for image in own]
        assert len(images) == self.image_entries
        for name, key, expected in (
            ("vtc_cls", "kept", [image.kept(PRUNE) for _, image in images]),
            ("damro", "outliers", [image.outliers(CONTRAST) for _, image in images]),
        ):
            assert [entry[key] for entry in report[name]] == expected
            assert [entry["prompt"] for entry in report[name]] == [row for row, _ in images]
            assert all(entry["source"] for entry in report[name])
        assert [entry["prompt"] for entry in report["var"]] == [0, 1]
        assert all(entry["layers"] == [1, 2] for entry in report["var"])
        assert [entry["prompt"] for entry in report["zipvl"]] == [0, 1]
        for entry in report["zipvl"]:
            assert len(entry["ratios"]) == 4
            assert all(0 < ratio <= 1 for ratio in entry["ratios"])
            assert min(entry["ratios"]) < 1
            assert 0 < entry["bytes"] < entry["full_bytes"]

    def test_some_image_tokens_are_sinks(self, loaded, inputs):
        """Else the tests of VAR would show nothing."""
        with attach(loaded[0], MOVE) as fix:
            loaded[0].generate(**inputs, max_new_tokens=1)
            assert all(any(entry["image_sinks"]) for entry in fix.report["var"])

    def test_videos_are_refused(self, loaded, inputs):
        with attach(loaded[0], PRUNE), pytest.raises(PromptError, match="videos are not read"):
            loaded[0](**inputs, pixel_values_videos=inputs["pixel_values"])

    def test_too_few_placeholders_are_refused(self, loaded, inputs):
        short = dict(inputs) | {"input_ids": inputs["input_ids"].clone()}
        places = (short["input_ids"] == loaded[0].config.image_token_id).nonzero()
        short["input_ids"][tuple(places[0])] = 5
        with attach(loaded[0], PRUNE), pytest.raises(PromptError, match="image tokens but"):
            loaded[0](**short)

    @pytest.mark.parametrize("path", ["generate", "forward"])
    def test_pictures_that_are_alike_are_told_apart_in_the_report(self, loaded, pictures, path):
        """Their tiles may be encoded once; rows and entries stay as many as they are."""
        model, processor = loaded
        inputs = self.build(
            processor, ([pictures[0], pictures[0]], SHORT), ([pictures[0]], SHORT), ([pictures[0]], LONG)
        )
        with attach(model, PRUNE, MOVE, PACK) as fix:
            if path == "generate":
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            else:
                model(**inputs)
            report = fix.report
        assert [entry["prompt"] for entry in report["var"]] == [0, 1, 2]
        assert [entry["prompt"] for entry in report["zipvl"]] == [0, 1, 2]
        assert sorted({entry["prompt"] for entry in report["vtc_cls"]}) == [0, 1, 2]

    @torch.inference_mode()
    def test_a_bare_forward_gives_the_logits_that_generate_starts_from(self, loaded, inputs):
        model = loaded[0]
        with attach(model, *FIXES["all"]):
            bare = model(**inputs).logits[:, -1]
        logits, _ = logits_of(model, FIXES["all"], inputs)
        torch.testing.assert_close(bare, logits[0].to(bare.dtype), rtol=0, atol=TOLERANCE)
