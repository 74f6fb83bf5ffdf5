"""These cases run in Triton's interpreter, in a process of their own: see tests/test_fused_*.py."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
