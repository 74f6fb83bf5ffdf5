"""These cases hold the Triton kernels to their float64 oracles.

Without a GPU they run in Triton's interpreter, in processes of their own that tests/test_fused_*.py and
test_decoding.py start. On a GPU they run compiled, in bfloat16 too, and `fronts.py` shows that the fronts use Triton,
by this command:

    LVLM_FIX_GPU=1 CUDA_VISIBLE_DEVICES=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 pytest tests/interpreted/*.py
"""

from on_device import GPU, INTERPRETED, prepare

collect_ignore_glob = [] if GPU or INTERPRETED else ["*.py"]
if GPU or INTERPRETED:
    prepare()
