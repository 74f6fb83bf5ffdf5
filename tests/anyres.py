"""LLaVA-NeXT and LLaVA-OneVision in small: what their tests share, and how they see pictures, written to be read.

The slow way has no hooks and no batch: one crop at a time goes through the tower in eager attention with all weights
kept, and where each image token comes from is counted out in loops, from the picture's size alone.
"""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
from PIL import Image
from slow import Conversation, SlowDecoder, best, stages
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lvlm_fix import DAMRO, VAR, VTCCLS, ZipVL, attach

TOLERANCE, ONE_CODE = 1e-4, 1e-2
SIDE, PATCH = 24, 8
CELLS = SIDE // PATCH
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72]]

PRUNE, CONTRAST = VTCCLS(keep=14, start_layer=0), DAMRO(alpha=1.0, beta=0.01, topk=2)
# Random weights make no sinks: thresholds low enough that some image tokens count as such.
MOVE = VAR(p=0.9, rho=0.05, min_image_attention=0.05, tau=12.0, first_layer=1, sink_dims=(3, 20))
PACK = ZipVL(tau=0.8, window=4, recent=8, random=8)
FIXES = {
    "vtc_cls": (PRUNE,),
    "damro": (CONTRAST,),
    "var": (MOVE,),
    "zipvl": (PACK,),
    "zipvl of the image": (ZipVL(tau=0.8, window=4, recent=8, random=8, scope="image"),),
    "zipvl evict": (ZipVL(tau=0.8, window=4, recent=8, random=8, evict=True),),
    "vtc_cls damro": (PRUNE, CONTRAST),
    "all": (PRUNE, CONTRAST, MOVE, PACK),
}
NOTHING = {
    "vtc_cls": (VTCCLS(keep=10**6, start_layer=0),),
    "damro": (DAMRO(alpha=0, beta=0),),
    "var": (VAR(p=0, tau=12.0, rho=0.05, min_image_attention=0.05, sink_dims=(3, 20)),),
    "zipvl": (ZipVL(tau=1, bits=8, low_bits=8, window=10_000),),
}
NOTHING["all"] = tuple(method for methods in list(NOTHING.values()) for method in methods)
SHORT, LONG = "what is it ?", "is there a cat ? is there a dog in the image ?"


def build_tokenizer(*placeholders: str) -> PreTrainedTokenizerFast:
    """A word a token, and 60 words that only the model says."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *placeholders]
    words += dict.fromkeys(f"USER ASSISTANT {SHORT} {LONG}".split())
    words += [f"word{number}" for number in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {placeholder.strip("<>") + "_token": placeholder for placeholder in placeholders}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=names,
    )


def sharpen(model, factor: float) -> None:
    """Scale weights up, so that tokens differ in attention and methods change logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(factor)


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((width, height))


# Crops 2 x 2 with bars above and below, 1 x 2 with none, 2 x 1 with bars at the sides, 1 x 3 with none.
SQUARE, WIDE, TALL, THIN = picture(1, 60, 40), picture(2, 40, 20), picture(3, 20, 60), picture(4, 80, 26)
BATCHES = {
    "one picture": [([SQUARE], SHORT)],
    "three crops": [([THIN], SHORT)],
    "two pictures": [([TALL, WIDE], SHORT)],
    "rows of different length": [([WIDE], SHORT), ([], LONG), ([WIDE, TALL], LONG), ([TALL], LONG)],
}


def ask(processor, *rows):
    """Model inputs of rows of (pictures, question)."""
    texts = [f"USER {'<image> ' * len(pictures)}{question} ASSISTANT" for pictures, question in rows]
    pictures = [list(pictures) for pictures, _ in rows if pictures]
    return processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")


def run(model, fix, inputs, compile=False, **options):
    with attach(model, *fix, compile=compile) if fix else contextlib.nullcontext():
        return model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False} | options)


def with_logits(model, fix, inputs, **options):
    """Five words, whatever they are, and the logits that they were chosen by."""
    return run(
        model,
        fix,
        inputs,
        **{"min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True} | options,
    )


def answers(processor, inputs, output):
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class SlowAnyres:
    """How a picture becomes tokens, and which of them the methods choose."""

    def __init__(self, model) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.placeholder = model.config.image_token_id
        self.decoder = SlowDecoder(self.model.model.language_model, self.model.lm_head)

    # what a family says

    def look(self, crop):
        """Projected tokens (P, C) of a crop (3, H, W), its scores by layer (L, P), and those for DAMRO (P,)."""
        raise NotImplementedError

    def resampled(self, cells):
        """A map of tokens, each a list of (weight, crop, cell), at the size in which the decoder gets it."""
        return cells

    # what the families share

    def tokens(self, width, height, cut=True):
        """Where each token of a picture comes from: a list of (weight, crop, cell), empty for a newline token."""
        base = [[(1.0, 0, cell)] for cell in range(CELLS**2)]
        if not cut:
            return [*base, []]
        fits = []
        for rows, columns in PINPOINTS:
            scale = min(columns / width, rows / height)
            used = min(int(width * scale) * int(height * scale), width * height)
            fits.append((used, -(rows * columns - used), (rows // SIDE, columns // SIDE)))
        rows, columns = max(fits)[2]
        cells = [
            [
                [(1.0, 1 + (y // CELLS) * columns + x // CELLS, (y % CELLS) * CELLS + x % CELLS)]
                for x in range(columns * CELLS)
            ]
            for y in range(rows * CELLS)
        ]
        if width / height > columns / rows:
            bare = (rows * CELLS - int(round(height * columns * CELLS / width, 7))) // 2
            cells = cells[bare : len(cells) - bare]
        else:
            bare = (columns * CELLS - int(round(width * rows * CELLS / height, 7))) // 2
            cells = [row[bare : len(row) - bare] for row in cells]
        for row in self.resampled(cells):
            base += [*row, []]
        return base

    def see(self, crops, size, cut=True):
        """Of each token of a picture: features, scores by layer, score for DAMRO, and crop (-1 for newline tokens)."""
        tokens = self.tokens(*size, cut)
        looked = {crop: self.look(crops[crop]) for crop in {crop for parts in tokens for _, crop, _ in parts}}
        depth = len(looked[0][1])
        features, layers, scores, origin = [], [], [], []
        for parts in tokens:
            if not parts:
                features.append(self.model.model.image_newline)
                layers.append([0.0] * depth)
                scores.append(0.0)
                origin.append(-1)
                continue
            features.append(sum(weight * looked[crop][0][cell] for weight, crop, cell in parts))
            layers.append(
                [
                    sum(weight * float(looked[crop][1][layer][cell]) for weight, crop, cell in parts)
                    for layer in range(depth)
                ]
            )
            scores.append(sum(weight * float(looked[crop][2][cell]) for weight, crop, cell in parts))
            shares = {crop: 0.0 for _, crop, _ in parts}
            for weight, crop, _ in parts:
                shares[crop] += weight
            origin.append(max(shares, key=shares.__getitem__))
        return features, layers, scores, origin

    def chosen(self, seen, fix):
        """Indices of a picture's tokens in the positive and in the negative branch."""
        prune, contrast, *_ = stages(fix)
        features, layers, scores, origin = seen
        kept, outliers = list(range(len(features))), []
        if prune is not None:
            own = [token for token in kept if origin[token] >= 0]
            totals = [sum(layers[token][prune.start_layer : -1]) for token in own]
            picked = {own[place] for place in best(totals, min(prune.keep, len(own)))}
            kept, row_has_one = [], False
            for token in range(len(features)):
                if token in picked or (origin[token] < 0 and row_has_one):
                    kept.append(token)
                row_has_one = origin[token] >= 0 and (row_has_one or token in picked)
        if contrast is not None:
            for crop in range(max(origin) + 1):
                own = [token for token in range(len(features)) if origin[token] == crop]
                outliers += [own[place] for place in best([scores[token] for token in own], contrast.topk)]
            outliers = sorted([*outliers, len(features) - 1])
        return kept, outliers

    def branch(self, ids, images):
        """Embeddings and image flags of a prompt; `images` are the tokens and the places of those that stay."""
        rows, image, images, skip = [], [], list(images), 0
        for word in ids:
            if word != self.placeholder:
                rows.append(self.word(word))
                image.append(False)
            elif skip:
                skip -= 1
            else:
                features, places = images.pop(0)
                rows += [features[place] for place in places]
                image += [True] * len(places)
                skip = len(features) - 1
        assert not images and not skip
        return torch.stack(rows), image

    def word(self, word):
        return self.model.get_input_embeddings().weight[word]

    def converse(self, ids, seen, fix):
        """A conversation that begins with the prompt `ids` and pictures as `see` tells them."""
        chosen = [self.chosen(one, fix) for one in seen]
        branches = [self.branch(ids, [(one[0], kept) for one, (kept, _) in zip(seen, chosen, strict=True)])]
        if stages(fix)[1] is not None:
            branches.append(
                self.branch(
                    ids, [(one[0], outliers) for one, (_, outliers) in zip(seen, chosen, strict=True)]
                )
            )
        return Conversation(self.decoder, branches, fix)

    def seen(self, inputs, rows):
        """Every picture of a batch as `see` tells it, by row."""
        pixels = iter(inputs["pixel_values"])
        return [
            [self.see(next(pixels), one.size, self.cuts(len(pictures))) for one in pictures]
            for pictures, _ in rows
        ]

    def cuts(self, pictures):
        """Whether the pictures of a prompt that has so many are cut in crops."""
        return True
