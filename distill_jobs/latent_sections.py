"""The sections of a recipe whose teacher works on latents: its data, and the pipeline, given or made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from distill_jobs.sections import Section, TeacherSection, Training


class CaptionedData(Section):
    """Captioned images. cache: folder for their latents and text embeddings, which several jobs may share.

    unreadable: end the job at an image that cannot be decoded, or leave it out and count it; what a shard that was
    cut off has lost counts as one.
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


class Shares(Section):
    """Shares of the kinds of picture: a glyph as it is, small and placed, in another colour; the rest are pairs."""

    plain: float = Field(0.5, ge=0, le=1)
    placed: float = Field(0.1, ge=0, le=1)
    recoloured: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if (together := self.plain + self.placed + self.recoloured) > 1 + 1e-9:
            raise ValueError(f"plain, placed and recoloured are shares of all pictures, and {together:g} together")
        return self


class GlyphData(CaptionedData):
    """Pictures drawn of the emoji of a font. path: the folder they are drawn into, once; runs may share it.

    font: with colour bitmaps; names: Unicode's emoji-test.txt. pictures: how many, of side_px pixels; held_glyphs,
    held_compositions: shares of the glyphs, and of the recolourings and pairs, that training never sees.
    """

    kind: Literal["glyphs"]
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    names: Path = Path("/usr/share/unicode/emoji/emoji-test.txt")
    pictures: int = Field(24_000, ge=1)
    side_px: int = Field(64, ge=16)
    held_glyphs: float = Field(0.03, ge=0, lt=1)
    held_compositions: float = Field(0.1, ge=0, lt=1)
    shares: Shares = Shares()


class FinetuneSection(TeacherSection):
    """Teaching a folder's network to give v. target: the data, or what the network itself said before."""

    target: Literal["data", "teacher"] = "data"


class LatentTeacher(Section):
    """A teacher whose network works on the latents of an autoencoder. licence: of its weights, for the bundle."""

    licence: str = "not stated"


class FolderTeacher(LatentTeacher):
    """A teacher that stands in a stock pipeline folder.

    v_finetune: training of it on the data, for a teacher that predicts the noise or the image, or whose schedule
    the recipe changes; students predict v. max_relative_error: of what it predicts on the data, at equal signal and
    noise; one with more is refused. Who predicts nothing has 1.
    """

    folder: Path
    v_finetune: FinetuneSection | None = None
    max_relative_error: float = Field(0.9, gt=0)


class AutoencoderSection(Training):
    """The autoencoder of a pipeline that is made: arguments of diffusers' AutoencoderKL, and its training.

    gradient: weight of the differences between neighbouring pixels, at every scale of the loss; kl: of the mean
    Kullback-Leibler divergence of a latent number from a standard normal one.
    """

    block_out_channels: tuple[int, ...] = (32, 64, 96)
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(16, ge=1)
    gradient: float = Field(1.0, ge=0)
    kl: float = Field(1e-4, ge=0)

    @property
    def pixels_per_latent(self) -> int:
        """Width of the square of pixels that one latent position stands for."""
        return int(2 ** (len(self.block_out_channels) - 1))


class TextSection(Section):
    """The text encoder of a pipeline that is made: a CLIP text model.

    words: size of the vocabulary, learned from the captions; tokens: of a prompt, start and end included; training:
    of the encoder alone, before there is a network, to guess the latent that belongs to a caption; null trains it
    together with the network, else it then stays as it is.
    """

    words: int = Field(1536, ge=600)
    tokens: int = Field(24, ge=3)
    width: int = Field(192, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    training: Training | None = None


class GlyphFinetune(TeacherSection):
    """More training of a network that was made of glyphs, on pictures of its own: other shares of their kinds."""

    pictures: int = Field(ge=1)
    shares: Shares


class MadeTeacher(TeacherSection, LatentTeacher):
    """A whole pipeline made from the data: autoencoder, text encoder and network; see ``TextSection.training``.

    finetune: a second training of the network, on pictures of its own.
    """

    autoencoder: AutoencoderSection
    text: TextSection = TextSection()
    finetune: GlyphFinetune | None = None


class DecoderSection(Training):
    """A tiny decoder (diffusers' AutoencoderTiny), trained to decode the latents of the data.

    target: the pictures that the teacher's autoencoder makes of them, or those of the data themselves; width:
    channels of its layers; blocks: of three convolutions each, at every size but the last; gradient: weight of the
    differences between neighbouring pixels, at every scale of the loss.
    """

    target: Literal["teacher", "data"] = "teacher"

    width: int = Field(64, ge=1)
    blocks: int = Field(3, ge=1)
    gradient: float = Field(1.0, ge=0)


def _form_of_data(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", value)
    return f"({kind})"


FORMS = {"folder": "folder", "made": "autoencoder"}
"""Forms of a latent teacher, and the field that each alone has."""


def form_of_teacher(value: Any) -> str:
    """How a teacher comes about, as the tag of its section; the form of one in YAML too."""
    given = value if isinstance(value, Mapping) else getattr(value, "model_fields_set", ())
    return next((f"({form})" for form, field in FORMS.items() if field in given), "(trained)")


# Tags in brackets: they show up in the place of an error, where ``read_recipe`` leaves them out.
Data = Annotated[
    Annotated[Literal["digits"], Tag("(digits)")]
    | Annotated[ImageFolderData, Tag("(image_folder)")]
    | Annotated[WebdatasetData, Tag("(webdataset)")]
    | Annotated[GlyphData, Tag("(glyphs)")],
    Discriminator(
        _form_of_data,
        custom_error_type="data",
        custom_error_message="give digits, or a section with kind: image_folder, webdataset or glyphs",
    ),
]
Teacher = Annotated[
    Annotated[TeacherSection, Tag("(trained)")]
    | Annotated[FolderTeacher, Tag("(folder)")]
    | Annotated[MadeTeacher, Tag("(made)")],
    Discriminator(form_of_teacher),
]
