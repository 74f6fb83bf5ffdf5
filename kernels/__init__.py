"""Fast forms of the methods' operations, each held to its slow oracle in `lvlm_fix.functional`.

Every operation is one file with one front: it checks its inputs, runs the fastest implementation there is for
them, and notes which one that was (`last_used`). No gradient flows through any of them.
"""

from lvlm_fix.kernels.cls_row import cls_row
from lvlm_fix.kernels.contrast import contrast
from lvlm_fix.kernels.dispatch import last_used
from lvlm_fix.kernels.pack import pack
from lvlm_fix.kernels.probe_scores import probe_scores
from lvlm_fix.kernels.quantized_decode import quantized_decode
from lvlm_fix.kernels.redistribution import Redistribution
from lvlm_fix.kernels.sparse_prefill import sparse_prefill
from lvlm_fix.kernels.visual_attention import visual_attention

__all__ = [
    "Redistribution",
    "cls_row",
    "contrast",
    "last_used",
    "pack",
    "probe_scores",
    "quantized_decode",
    "sparse_prefill",
    "visual_attention",
]
