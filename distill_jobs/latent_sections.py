"""The sections of a recipe whose teacher is a stock pipeline folder: its data, and the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from distill_jobs.sections import Section, TeacherSection


class CaptionedData(Section):
    """Captioned images. cache: folder for their latents and text embeddings, which several jobs may share.

    unreadable: end the job at an image that cannot be decoded, or leave it out and count it.
    """

    path: str = Field(min_length=1)
    cache: Path = Path("runs/latents")
    unreadable: Literal["error", "skip"] = "error"
    licence: str = Field("not stated", description="of the images and captions, for the bundle")


class ImageFolderData(CaptionedData):
    """A folder with metadata.jsonl or metadata.parquet: file_name and text in each row."""

    kind: Literal["image_folder"]


class WebdatasetData(CaptionedData):
    """Tar shards: a folder of them, or a pattern such as a/b/{000..015}.tar."""

    kind: Literal["webdataset"]


class FinetuneSection(TeacherSection):
    """Teaching a folder's network to give v. target: the data, or what the network itself said before."""

    target: Literal["data", "teacher"] = "data"


class FolderTeacher(Section):
    """A teacher that stands in a stock pipeline folder.

    v_finetune: training of it on the data, for a teacher that predicts the noise or the image, or whose schedule
    the recipe changes; students predict v.
    """

    folder: Path
    v_finetune: FinetuneSection | None = None
    licence: str = Field("not stated", description="of the teacher's weights, for the bundle")


def _form_of_data(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", value)
    return f"({kind})"


def _form_of_teacher(value: Any) -> str:
    folder = "folder" in value if isinstance(value, Mapping) else isinstance(value, FolderTeacher)
    return "(folder)" if folder else "(trained)"


# Tags in brackets: they show up in the place of an error, where ``read_recipe`` leaves them out.
Data = Annotated[
    Annotated[Literal["digits"], Tag("(digits)")]
    | Annotated[ImageFolderData, Tag("(image_folder)")]
    | Annotated[WebdatasetData, Tag("(webdataset)")],
    Discriminator(
        _form_of_data,
        custom_error_type="data",
        custom_error_message="give digits, or a section with kind: image_folder or webdataset",
    ),
]
Teacher = Annotated[
    Annotated[TeacherSection, Tag("(trained)")] | Annotated[FolderTeacher, Tag("(folder)")],
    Discriminator(_form_of_teacher),
]
