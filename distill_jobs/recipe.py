"""Recipes: one frozen, validated model of a whole job. Read from YAML by ``distill_jobs.recipe_file``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from distill_jobs.halving import HalvingTables
from distill_jobs.latent_sections import (
    CaptionedData,
    Data,
    DecoderSection,
    FolderTeacher,
    GlyphData,
    LatentTeacher,
    MadeTeacher,
    Teacher,
)
from distill_jobs.objectives import Tables
from distill_jobs.sections import (
    ChainSection,
    ComputeSection,
    ConsistencySection,
    EncoderSection,
    EvaluationSection,
    ExportSection,
    GuidanceSection,
    InpaintingSection,
    Section,
    StageOneSection,
    StageTwoSection,
)
from engines.manifest import GuidanceRange
from engines.schedule import NoiseSchedule, ScheduleSpec

FEW_STEPS = 2
"""Up to which students need a schedule that ends in pure noise."""


def _guided_throughout(chain: ChainSection, schedule: NoiseSchedule, off: frozenset[int]) -> bool:
    """Whether each step of a chain's first student has guidance in it. off: where the teacher has none."""
    if isinstance(chain, StageTwoSection):
        steps = HalvingTables.of(schedule, chain.steps[0], sampler=chain.sampler)
    else:
        steps = HalvingTables.encoding(schedule, chain.steps[0])
    return bool(steps.guided(Tables.of(schedule, off=off).off, steps).all())


class Recipe(Section):
    """A whole job: data, teacher, stage one, stage two, evaluation, export; and where wanted
    consistency, encoder and decoder.

    unet: the arguments of diffusers' UNet2DConditionModel, without time_cond_proj_dim. Where the teacher is a
    folder, ``unet`` and ``schedule`` are the folder's (see ``distill_jobs.pipelines.teacher``).
    """

    name: str
    seed: int = Field(0, ge=0, lt=2**53)
    data: Data
    inpainting: InpaintingSection | None = None
    schedule: ScheduleSpec = ScheduleSpec()
    clip: float | None = Field(None, gt=0)
    guidance: GuidanceSection
    unet: dict[str, Any]
    teacher: Teacher
    stage_one: StageOneSection
    stage_two: StageTwoSection
    consistency: ConsistencySection | None = None
    encoder: EncoderSection | None = None
    decoder: DecoderSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection
    compute: ComputeSection = ComputeSection()
    checkpoint_every: int = Field(200, ge=1, description="updates between checkpoints")
    log_every: int = Field(20, ge=1, description="updates between TensorBoard points")

    @field_validator("unet")
    @classmethod
    def _drops_nothing(cls, unet: dict[str, Any]) -> dict[str, Any]:
        if unet.get("dropout"):
            raise ValueError(
                "dropout must be 0: students learn exact targets, and a resumed run would drop something else"
            )
        return unet

    @model_validator(mode="after")
    def _starts_from_what_it_trains(self) -> Recipe:
        source = None if self.consistency is None else self.consistency.source
        if not self.stage_two.halvings and source != "stage_one":
            raise ValueError("stage_two.halvings may be empty with consistency.source: stage_one only")
        if isinstance(source, int) and source not in self.stage_two.steps:
            raise ValueError(f"consistency.source {source} is not among stage_two.halvings")
        if isinstance(source, int) and self.stage_two.sampler == "stochastic":
            raise ValueError("consistency.source must be stage_one, or a student of the deterministic sampler")
        return self

    @model_validator(mode="after")
    def _exports_what_it_trains(self) -> Recipe:
        if missing := sorted(set(self.export.students) - set(self.stage_two.steps)):
            raise ValueError(f"export.students {missing} are not among stage_two.halvings")
        finished = () if self.consistency is None else self.consistency.students
        if self.export.default_steps not in (*self.export.students, *finished):
            raise ValueError("export.default_steps must be one of export.students or consistency.students")
        return self

    @model_validator(mode="after")
    def _inverts_what_it_draws(self) -> Recipe:
        if self.encoder is None:
            return self
        if self.stage_two.sampler == "stochastic":
            raise ValueError("an encoder goes with a deterministic stage_two: drawing must be its way back")
        if self.stage_two.guidance != "input":
            raise ValueError(
                "an encoder goes with stage_two.guidance: input, for it starts from stage one as students do"
            )
        if self.guidance.min != 1:
            raise ValueError(
                "an encoder goes with guidance.min: 1, for images are encoded with guidance off, and it must have "
                "learned that"
            )
        if missing := sorted(set(self.encoder.students) - set(self.stage_two.steps)):
            raise ValueError(f"encoder.students {missing} have no student of as many steps in stage_two.halvings")
        return self

    @model_validator(mode="after")
    def _shares_or_shards(self) -> Recipe:
        if self.compute.shard and self.stage_two.weights == "shared":
            raise ValueError("compute.shard cannot go with stage_two.weights: shared")
        if self.compute.shard and self.decoder is not None:
            raise ValueError("compute.shard cannot go with decoder")
        if self.compute.shard and self.consistency is not None:
            raise ValueError("compute.shard cannot go with consistency")
        if self.compute.shard and (self.stage_two.on_policy or self.stage_two.lora):
            raise ValueError("compute.shard cannot go with stage_two.on_policy or stage_two.lora")
        return self

    @model_validator(mode="after")
    def _guides_as_it_trains(self) -> Recipe:
        guidance, allowed = self.stage_two.guidance, self.guidance
        if guidance != "input" and (self.consistency is not None or self.encoder is not None):
            raise ValueError("stage_two.guidance must be input with consistency or encoder")
        if isinstance(guidance, float) and not allowed.min <= guidance <= allowed.max:
            raise ValueError(f"stage_two.guidance {guidance:g} is outside {allowed.min:g} to {allowed.max:g}")
        if isinstance(guidance, float) and guidance not in self.evaluation.guidance_scales:
            raise ValueError(f"evaluation.guidance_scales must hold stage_two.guidance, {guidance:g}")
        default = self.served.default
        if isinstance(self.data, GlyphData) and default not in self.evaluation.guidance_scales:
            raise ValueError(
                f"evaluation.guidance_scales must hold guidance.default, {default:g}, at which glyphs are judged"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_what_it_trains(self) -> Recipe:
        evaluation, allowed = self.evaluation, self.guidance
        if outside := [s for s in evaluation.guidance_scales if not allowed.min <= s <= allowed.max]:
            raise ValueError(f"evaluation.guidance_scales {outside} are outside {allowed.min:g} to {allowed.max:g}")
        grids = {evaluation.teacher_steps, *(2 * chain.steps[0] for chain in self.chains if chain.steps)}
        if self.consistency is not None:
            grids.add(self.consistency.grid)
        if max(grids) > self.schedule.timesteps:
            raise ValueError(f"a grid of {max(grids)} steps is finer than schedule.timesteps")
        self._check_guided(grids)
        return self

    def _check_guided(self, grids: set[int]) -> None:
        """Raises: ValueError where guidance in an interval would say nothing, on one of these grids or at all."""
        if not self.guidance.interval:
            if any(chain.guided_share is not None for chain in self.chains):
                raise ValueError(
                    "guided_share is for teachers guided in an interval, guidance.log_snr_min to "
                    "guidance.log_snr_max; without one all steps are guided"
                )
            return
        if self.stage_two.guidance == "at_sampling" or self.served.max == 1:
            raise ValueError(
                "guidance.log_snr_min and guidance.log_snr_max are for students that learn guidance: they say "
                "nothing with stage_two.guidance: at_sampling, nor without guidance above 1"
            )
        schedule = NoiseSchedule(self.schedule)
        off = self.guidance.off(schedule)
        for n in sorted(grids):
            if off.issuperset(schedule.grid(n)[1:]):
                raise ValueError(
                    f"of a grid of {n} steps no timestep is between guidance.log_snr_min and guidance.log_snr_max, "
                    "so nothing would be guided there"
                )
        for chain in self.chains:
            if chain.guided_share is not None and _guided_throughout(chain, schedule, off):
                raise ValueError(
                    f"guided_share says nothing of a chain whose {chain.steps[0]} steps have guidance in each of "
                    "them; leave it out, or narrow guidance.log_snr_min to guidance.log_snr_max"
                )

    @model_validator(mode="after")
    def _fits_its_data(self) -> Recipe:
        """Only what the data needs is fixed; diffusers checks the rest when the network is built."""
        latent = isinstance(self.teacher, LatentTeacher)
        if latent == (self.data == "digits"):
            raise ValueError(
                "data: digits needs a teacher that is trained; captioned images need teacher.folder, "
                "or teacher.autoencoder to make one"
            )
        if not latent and self.export.prompts:
            raise ValueError("export.prompts is for models of any text; a digits model shows its classes")
        if not latent and self.decoder is not None:
            raise ValueError("decoder is for teachers that work on latents; digits are pixels")
        if latent and self.clip is not None:
            raise ValueError("clip is for images; latents have no bound")
        if latent and self.export.upscale != ExportSection.model_fields["upscale"].default:
            raise ValueError("export.upscale is for digits; latents are decoded by an autoencoder")
        if latent:
            self._check_unet_of_latents()
            return self
        seen = 1 if self.inpainting is None else 3  # with the mask and the masked image
        fixed = {"sample_size": 8, "in_channels": seen, "out_channels": 1, "cross_attention_dim": 16}
        for name, value in fixed.items():
            if self.unet.get(name) != value:
                raise ValueError(f"unet.{name} must be {value} for data: digits")
        return self

    def _check_unet_of_latents(self) -> None:
        """Raises: ValueError where the shape of latents and conditions is not told, or does not fit the task."""
        for name in ("sample_size", "out_channels", "cross_attention_dim"):
            if not isinstance(self.unet.get(name), int):
                given = isinstance(self.teacher, FolderTeacher)
                hint = "; leave unet out (--set unet=null) to take the folder's" if given else ""
                raise ValueError(f"unet.{name} must be given, as a whole number{hint}")
        channels = self.unet["out_channels"]
        seen = channels if self.inpainting is None else 2 * channels + 1  # with the mask and the masked latent
        if self.unet.get("in_channels", 4) != seen:
            raise ValueError(
                f"unet.in_channels must be {seen}: inpainting is for teachers that see the mask, and only they"
            )

    @model_validator(mode="after")
    def _makes_what_fits(self) -> Recipe:
        """A pipeline that is made: its parts fit each other."""
        teacher = self.teacher
        if not isinstance(teacher, MadeTeacher):
            return self
        if self.inpainting is not None or self.compute.shard:
            raise ValueError("a teacher that is made goes without inpainting and compute.shard")
        if isinstance(self.data, CaptionedData) and self.data.unreadable == "skip":
            raise ValueError("data.unreadable must be error where a teacher is made: it is made of every image")
        if teacher.finetune is not None and not isinstance(self.data, GlyphData):
            raise ValueError("teacher.finetune is for data.kind: glyphs, of which it draws pictures of its own")
        latents, told = teacher.autoencoder.latent_channels, teacher.text.width
        fixed = {"in_channels": latents, "out_channels": latents, "cross_attention_dim": told}
        for name, value in fixed.items():
            if self.unet.get(name) != value:
                raise ValueError(f"unet.{name} must be {value}, as teacher.autoencoder and teacher.text have it")
        if teacher.text.training is not None and self.unet.get("addition_embed_type") != "text":
            raise ValueError(
                "teacher.text.training needs unet.addition_embed_type: text, whose pooling of a prompt it trains"
            )
        side = self.unet["sample_size"]
        if isinstance(self.data, GlyphData) and self.data.side_px != side * teacher.autoencoder.pixels_per_latent:
            raise ValueError(
                f"data.side_px is {self.data.side_px}; unet.sample_size and teacher.autoencoder make pictures of "
                f"{side * teacher.autoencoder.pixels_per_latent}"
            )
        if self.schedule.kind == "cosine":
            raise ValueError(
                "schedule.kind cosine is none of stock pipelines'; squaredcos_cap_v2 is the same curve"
            )
        if teacher.text.width % teacher.text.heads:
            raise ValueError("teacher.text.width must be a multiple of teacher.text.heads")
        return self

    @field_validator("unet")
    @classmethod
    def _students_add_it(cls, unet: dict[str, Any]) -> dict[str, Any]:
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError("unet.time_cond_proj_dim is the student's and set by the job; leave it out")
        return unet

    @property
    def chains(self) -> tuple[ChainSection, ...]:
        """Its chains of halvings: that of stage two, and the encoders' where there are any."""
        return (self.stage_two,) if self.encoder is None else (self.stage_two, self.encoder)

    @property
    def served(self) -> GuidanceRange:
        """The guidance that its students are for: the recipe's range, or the one of single-guidance students."""
        only, given = self.stage_two.guidance, self.guidance
        if isinstance(only, float):
            return GuidanceRange(min=only, max=only, default=only)
        return GuidanceRange(min=given.min, max=given.max, default=given.default)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What a user may mean, but seldom does."""
        drawing = (*self.export.students, *(self.consistency.students if self.consistency else ()))
        if min(drawing) > FEW_STEPS or NoiseSchedule(self.schedule).zero_terminal_snr:
            return ()
        mend = "set schedule.rescale_zero_terminal_snr, and teacher.v_finetune for a folder"
        if self.schedule.kind == "cosine":
            mend = "leave schedule.log_snr_min out"
        return (
            f"the schedule leaves some of the image at its end, and students of {FEW_STEPS} steps and fewer start "
            f"where training never was; {mend}",
        )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()

    def evaluated_sha256(self) -> str:
        """Of all that an evaluation depends on: how a bundle is called and packed is none of it.

        Fields at their default are left out, so that a field which is new changes no hash of before.
        """
        drawn = self.export.model_dump(include={"students", "default_steps", "upscale"})
        asked = self.model_copy(update={"export": ExportSection(name="any", **drawn)})
        told = json.dumps(asked.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()
