"""Fields that the bodies of several endpoints have in common, with what the reference says of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engines.sampler import Sampler

GuidanceScale = Annotated[float | None, Field(description="Strength of the prompt; 1 is guidance off.")]
GuidanceAlias = Annotated[float | None, Field(description="Another name of guidance_scale.")]
Steps = Annotated[int | None, Field(description="Denoising steps, one of those the model was distilled for.")]
StepsAlias = Annotated[int | None, Field(description="Another name of steps.")]
SamplerName = Annotated[Sampler | None, Field(description="The student's own if left out.")]
SourcePrompt = Annotated[str | None, Field(description="What the image shows; needed by mode invert.")]
EncoderSteps = Annotated[
    int | None,
    Field(description="Of mode invert: steps of the encoder, one of the model's; as steps when left out."),
]
