"""Training-free cures for hallucination in vision-language models, over unmodified Hugging Face models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "lvlm_fix.loading",
    "attach": "lvlm_fix.attaching",
    "Attachment": "lvlm_fix.attachment",
    "diagnose": "lvlm_fix.diagnosis",
    "Diagnosis": "lvlm_fix.diagnosis",
    "find_sink_dims": "lvlm_fix.sinks",
    "SinkDims": "lvlm_fix.sinks",
    "CLSFrom": "lvlm_fix.companion",
    "LVLM": "lvlm_fix.wrapper",
    "Answer": "lvlm_fix.wrapper",
    "open_picture": "lvlm_fix.pictures",
    "Method": "lvlm_fix.methods",
    "DAMRO": "lvlm_fix.methods",
    "VAR": "lvlm_fix.methods",
    "VTCCLS": "lvlm_fix.methods",
    "ZipVL": "lvlm_fix.methods",
    "UnsupportedModelError": "lvlm_fix.errors",
    "AttachError": "lvlm_fix.errors",
    "PromptError": "lvlm_fix.errors",
    "PictureError": "lvlm_fix.errors",
    "PremiseWarning": "lvlm_fix.errors",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from lvlm_fix.attaching import attach as attach
    from lvlm_fix.attachment import Attachment as Attachment
    from lvlm_fix.companion import CLSFrom as CLSFrom
    from lvlm_fix.diagnosis import Diagnosis as Diagnosis
    from lvlm_fix.diagnosis import diagnose as diagnose
    from lvlm_fix.errors import AttachError as AttachError
    from lvlm_fix.errors import PictureError as PictureError
    from lvlm_fix.errors import PremiseWarning as PremiseWarning
    from lvlm_fix.errors import PromptError as PromptError
    from lvlm_fix.errors import UnsupportedModelError as UnsupportedModelError
    from lvlm_fix.loading import load as load
    from lvlm_fix.methods import DAMRO as DAMRO
    from lvlm_fix.methods import VAR as VAR
    from lvlm_fix.methods import VTCCLS as VTCCLS
    from lvlm_fix.methods import Method as Method
    from lvlm_fix.methods import ZipVL as ZipVL
    from lvlm_fix.pictures import open_picture as open_picture
    from lvlm_fix.sinks import SinkDims as SinkDims
    from lvlm_fix.sinks import find_sink_dims as find_sink_dims
    from lvlm_fix.wrapper import LVLM as LVLM
    from lvlm_fix.wrapper import Answer as Answer


def __getattr__(name: str) -> Any:
    """Import on first use: `lvlm-fix --help` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'lvlm_fix' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
