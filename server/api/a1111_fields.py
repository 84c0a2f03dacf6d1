"""AUTOMATIC1111's request fields: what they are brought to, and which ask for nothing."""

from __future__ import annotations

import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engines.noise import MAX_SEED
from server.api.validation import PLAIN_NAME
from server.catalogue import Catalogue, Model
from server.errors import InvalidRequestError
from server.fitting import Fit, nearest_size, white_or_opaque_is_edit
from server.images import decode_file
from server.request import MAX_IMAGES, DenoiseRequest
from server.resolve import Edit, resolve_edit
from server.schemas import EditBody, GenerationBody

_SAMPLER_ALIASES = {"ddim": "deterministic"}
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "negative_prompt": ("", None),
    "enable_hr": (False, None),
    "styles": ([], None),
    "subseed": (-1, None),
    "subseed_strength": (0, None),
    "seed_resize_from_h": (0, -1, None),
    "seed_resize_from_w": (0, -1, None),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "eta": (0, 1, None),
    "s_churn": (0, None),
    "s_tmax": (0, None),
    "s_tmin": (0, None),
    "s_noise": (1, None),
    "script_name": ("", None),
    "script_args": ([], None),
    "scheduler": ("automatic", "Automatic", None),
    "save_images": (False, None),
    "image_cfg_scale": (0, 1.5, None),
    "inpainting_fill": (0, 1, None),
    "initial_noise_multiplier": (1, None),
    "include_init_images": (False, None),
    "s_min_uncond": (0, None),
    "refiner_checkpoint": ("", "None", None),
    "firstpass_image": ("", None),
    "force_task_id": ("", None),
    "infotext": ("", None),
    "comments": ({}, None),
    "latent_mask": ("", None),
    "mask_round": (True, None),
}
"""Values with which a field changes nothing here."""

_IDLE = frozenset(
    {
        *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name"),
        *("hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "firstphase_width"),
        *("firstphase_height", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"),
        *("refiner_switch_at", "disable_extra_networks"),
    }
)
"""Fields that say how to do what is off here (a second pass, a refiner, extra networks, saving on the server)."""


class TextWish(BaseModel):
    """Body of ``txt2img``: the fields that matter; ``_check_rest`` has the others. null means left out."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    prompt: str | None = None
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="-1, as when left out, is random")
    sampler_name: str | None = None
    sampler_index: str | None = None
    batch_size: int | None = Field(None, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(None, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    width: int | None = Field(None, ge=1, le=16384)
    height: int | None = Field(None, ge=1, le=16384)
    denoising_strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    override_settings: dict[str, Any] | None = Field(None, description="sd_model_checkpoint, a model's name, alone")
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = Field(None, description="true when left out")


class ImageWish(TextWish):
    """Body of ``img2img``. White of the mask is edited."""

    init_images: list[str] = Field(default_factory=list)
    mask: str | None = None
    mask_blur: int | None = Field(None, ge=0, le=64)
    mask_blur_x: int | None = Field(None, ge=0, le=64)
    mask_blur_y: int | None = Field(None, ge=0, le=64)
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1)
    inpaint_full_res: bool | int | None = None
    inpaint_full_res_padding: int | None = Field(None, ge=0)
    resize_mode: int | None = Field(
        None, ge=0, le=1, description="0, as when left out, stretches, 1 cuts about the centre"
    )


def adjusted_text(wish: TextWish, catalogue: Catalogue) -> tuple[GenerationBody, dict[str, Any]]:
    """The native body, and what was changed on the way there, by field.

    Raises: InvalidRequestError naming a field that asks for what is not here.
    """
    _check_rest(wish)
    model = _model(wish, catalogue)
    adjusted: dict[str, Any] = {}
    fields = _brought(wish, model, adjusted)
    width, height = wish.width or 512, wish.height or 512
    size = nearest_size(model.manifest.sizes, width, height)
    _note(adjusted, "width", width, size.width)
    _note(adjusted, "height", height, size.height)
    return GenerationBody(**fields, size=str(size)), adjusted


def resolve_image(wish: ImageWish, catalogue: Catalogue) -> tuple[Edit, dict[str, Any]]:
    """The edit that ``with_files_of`` completes, and what was changed, to which ``note_fitted`` adds.

    Raises: as ``adjusted_text`` and ``resolve_edit``.
    """
    _check_rest(wish)
    model = _model(wish, catalogue)
    adjusted: dict[str, Any] = {}
    fields = _brought(wish, model, adjusted)
    wished = None
    if wish.width is not None and wish.height is not None:
        wished = str(nearest_size(model.manifest.sizes, wish.width, wish.height))
    body = EditBody(**fields, strength=_strength(wish), size=wished)
    return resolve_edit(body, catalogue, masked=bool(wish.mask)), adjusted


def with_files_of(wish: ImageWish, edit: Edit) -> DenoiseRequest:
    """Decodes the files, so call it beside the event loop. Raises: as ``decode_file`` and ``fit_image``."""
    image = decode_file(wish.init_images[0], "init_images")
    mask = decode_file(wish.mask, "mask") if wish.mask else None
    fit: Fit = "crop" if wish.resize_mode else "stretch"
    return edit.with_files(image, mask, white_or_opaque_is_edit, fit=fit, invert=bool(wish.inpainting_mask_invert))


def note_fitted(adjusted: dict[str, Any], wish: ImageWish, wanted: DenoiseRequest) -> None:
    """What was changed of an edit's size, strength and mask."""
    _note(adjusted, "width", wish.width or wanted.width, wanted.width)
    _note(adjusted, "height", wish.height or wanted.height, wanted.height)
    _note(adjusted, "denoising_strength", _strength(wish), wanted.effective_strength)
    if wish.mask:
        _note(adjusted, "inpaint_full_res", bool(wish.inpaint_full_res), False)
        for name in ("mask_blur", "mask_blur_x", "mask_blur_y"):
            _note(adjusted, name, getattr(wish, name) or 0, 0)


def _strength(wish: ImageWish) -> float:
    return 0.75 if wish.denoising_strength is None else wish.denoising_strength


def _model(wish: TextWish, catalogue: Catalogue) -> Model:
    """That of ``override_settings``, as these clients choose one for a single request, else the default."""
    asked = wish.override_settings or {}
    name = asked.get("sd_model_checkpoint")
    if not asked.keys() <= {"sd_model_checkpoint"} or not isinstance(name, str | None):
        message = "override_settings may hold sd_model_checkpoint alone here: a name that GET sd-models lists."
        raise InvalidRequestError("unsupported_value", message, param="override_settings")
    return catalogue.find(name)


def _brought(wish: TextWish, model: Model, adjusted: dict[str, Any]) -> dict[str, Any]:
    """Steps, guidance and sampler at what was trained; the rest under its native name."""
    manifest = model.manifest
    steps = wish.steps or manifest.default_steps
    trained = min((s.steps for s in manifest.students), key=lambda n: (abs(n - steps), n))
    _note(adjusted, "steps", steps, trained)
    scale = manifest.guidance.default if wish.cfg_scale is None else wish.cfg_scale
    guidance = min(max(scale, manifest.guidance.min), manifest.guidance.max)
    _note(adjusted, "cfg_scale", scale, guidance)
    name = wish.sampler_name or wish.sampler_index
    offered = [s.sampler for s in manifest.students if s.steps == trained]
    wanted = _SAMPLER_ALIASES.get((name or "").lower(), (name or "").lower())
    sampler = next((s for s in offered if s == wanted), offered[0])
    if name is not None and sampler != wanted:
        adjusted["sampler_name"] = {"from": name[:64], "to": sampler}
    n = (wish.batch_size or 1) * (wish.n_iter or 1)
    if n > MAX_IMAGES:
        message = f"batch_size times n_iter must be at most {MAX_IMAGES}."
        raise InvalidRequestError("out_of_range", message, param="batch_size")
    seed = secrets.randbelow(2**32) if wish.seed in (None, -1) else wish.seed
    return {
        "model": model.name,
        "prompt": wish.prompt or "",
        "n": n,
        "seed": seed,
        "steps": trained,
        "guidance_scale": guidance,
        "sampler": sampler,
        "output_format": "png",
    }


def _check_rest(wish: TextWish) -> None:
    """Every other field must ask for nothing."""
    for name, value in (wish.model_extra or {}).items():
        if name in _IDLE or (name in _ASKS_NOTHING and value in _ASKS_NOTHING[name]):
            continue
        if name in _ASKS_NOTHING:
            message = f"{name} is not supported here; leave it at its default."
            raise InvalidRequestError("unsupported_value", message, param=name)
        plain = name if PLAIN_NAME.fullmatch(name) else None
        message = (
            f"This API has no field {plain}." if plain else "The body has a field that this API does not have."
        )
        raise InvalidRequestError("unknown_field", message, param=plain)
    for script in (wish.alwayson_scripts or {}).values():
        if not isinstance(script, dict) or script.get("args") not in ([], [False], None):
            message = "alwayson_scripts must be empty or off: there are no scripts here."
            raise InvalidRequestError("unsupported_value", message, param="alwayson_scripts")


def _note(adjusted: dict[str, Any], name: str, wanted: Any, used: Any) -> None:
    if wanted != used:
        adjusted[name] = {"from": wanted, "to": used}
