"""A picture component that reads what visitors upload, within bounds, and says in one sentence what it cannot read."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from PIL import Image

from lvlm_fix.demo import bounds

NO_UPLOAD = "the picture is no upload of this server: upload it first, or pick a sample"


class WithoutStub(ComponentMeta):
    """Gradio's own metaclass writes a .pyi file beside the source of every class, also where it is installed."""

    def __new__(mcs, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
        return ABCMeta.__new__(mcs, name, bases, attributes)


class PictureInput(gr.Image, metaclass=WithoutStub):
    """`gr.Image` whose value reaches a function as an upright RGB picture, or not at all.

    Its own way would open any file of the server that a request names without Gradio's mark of a file, fetch any
    address, decode a file of any number of pixels, and answer a damaged one with a traceback.
    """

    def get_block_name(self) -> str:
        return "image"

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None and is_http_url_like(str(url_or_file_path)):
            raise gr.Error(NO_UPLOAD, print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload: Any) -> Image.Image | None:  # type: ignore[override]
        if payload is None:
            return None
        try:
            return bounds.picture(_uploaded(payload.path))
        except OSError as error:  # what the system says of a file holds its path
            raise gr.Error(NO_UPLOAD, print_exception=False) from error
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error


def _uploaded(path: str | None) -> Path:
    """The file of an upload or a sample.

    Raises:
        ValueError: anything else is named; it is the same sentence whether there is such a file or not.
    """
    folder = Path(get_upload_folder()).resolve()
    try:
        file = Path(path or "").resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # gone, a null character, or a loop of links
        raise ValueError(NO_UPLOAD) from error
    if not file.is_relative_to(folder) or not file.is_file():
        raise ValueError(NO_UPLOAD)
    return file
