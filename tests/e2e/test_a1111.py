"""AUTOMATIC1111's clients, unchanged, against a real process."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from tests.support.pictures import file_of, photo
from tests.support.serving import serving, until

BOX = (16, 16, 40, 48)
PHOTO = base64.b64encode(file_of(photo())).decode()


@pytest.fixture(scope="module")
def url(toy_bundle: Path, slow_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([toy_bundle], log=tmp_path_factory.mktemp("a1111") / "log") as server:
        yield f"{server.url}/sdapi/v1"


@pytest.fixture(scope="module")
def api(url: str) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=url)


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def white(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, box)
    return mask


def inside(box: tuple[int, int, int, int]) -> np.ndarray:
    area = np.zeros((64, 64), np.bool_)
    area[box[1] : box[3], box[0] : box[2]] = True
    return area


def test_txt2img_says_what_it_adjusted(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(prompt="seven", seed=3, steps=20, cfg_scale=7.0, batch_size=2)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [3, 4]
    assert [image.info["parameters"] for image in result.images] == result.info["infotexts"]
    assert result.info["infotexts"][1].startswith(
        "seven\nSteps: 8, Sampler: deterministic, CFG scale: 5.0, Seed: 4, "
    )
    assert result.info["adjusted"] == {
        "steps": {"from": 20, "to": 8},
        "cfg_scale": {"from": 7.0, "to": 5.0},
        "sampler_name": {"from": "Euler a", "to": "deterministic"},
        "width": {"from": 512, "to": 64},
        "height": {"from": 512, "to": 64},
    }


def test_what_fits_is_not_adjusted(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(
        prompt="seven", steps=4, cfg_scale=2.0, sampler_name="DDIM", width=64, height=64, seed=1, n_iter=2
    )
    assert result.info["adjusted"] == {}
    assert len(result.images) == 2


def test_img2img_stays_nearer_the_less_strength_it_has(api: webuiapi.WebUIApi) -> None:
    def changed(strength: float) -> float:
        result = api.img2img(
            images=[photo()], prompt="seven", denoising_strength=strength, steps=8, width=64, height=64, seed=1
        )
        return float(np.abs(np.asarray(result.image, np.float32).mean(2) - np.asarray(photo(mode="L"))).mean())

    assert changed(0.125) < changed(1.0)


@pytest.mark.parametrize("invert", [0, 1])
def test_inpainting_edits_the_white_part_alone(api: webuiapi.WebUIApi, invert: int) -> None:
    result = api.img2img(
        images=[photo()], mask_image=white(BOX), inpainting_mask_invert=invert, prompt="three", width=64, height=64
    )
    kept = inside(BOX) if invert else ~inside(BOX)
    got, sent = np.asarray(result.image.convert("RGB")), np.asarray(photo())
    assert (got[kept] == sent[kept]).all()
    assert (got[~kept] != sent[~kept]).any()
    assert result.info["adjusted"]["inpaint_full_res"] == {"from": True, "to": False}


def test_a_minus_one_seed_is_random_and_told(http: httpx.Client) -> None:
    seeds = {http.post("/txt2img", json={"prompt": "seven", "seed": -1}).json()["parameters"]["seed"] for _ in "ab"}
    assert len(seeds) == 2


def test_images_may_be_left_out(http: httpx.Client) -> None:
    assert http.post("/txt2img", json={"prompt": "seven", "send_images": False}).json()["images"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "error", "field"),
    [
        ("txt2img", {"prompt": ""}, 422, "empty_prompt", "prompt"),
        ("txt2img", {"prompt": "a horse"}, 422, "unknown_prompt", "prompt"),
        ("txt2img", {"prompt": "seven", "negative_prompt": "blurry"}, 422, "unsupported_value", "negative_prompt"),
        ("txt2img", {"prompt": "seven", "enable_hr": True}, 422, "unsupported_value", "enable_hr"),
        (
            "txt2img",
            {"prompt": "seven", "alwayson_scripts": {"x": {"args": [1]}}},
            422,
            "unsupported_value",
            "alwayson_scripts",
        ),
        ("txt2img", {"prompt": "seven", "steps": 0}, 422, "out_of_range", "steps"),
        ("txt2img", {"prompt": "seven", "seed": -2}, 422, "out_of_range", "seed"),
        ("txt2img", {"prompt": "seven", "batch_size": 5, "n_iter": 3}, 422, "out_of_range", "batch_size"),
        ("txt2img", {"prompt": "seven", "whatever": 1}, 422, "unknown_field", "whatever"),
        ("txt2img", {"prompt": "seven", "<b>": 1}, 422, "unknown_field", ""),
        ("img2img", {"prompt": "seven"}, 422, "out_of_range", "init_images"),
        ("img2img", {"prompt": "seven", "init_images": ["http://a/b.png"]}, 422, "invalid_image", "init_images"),
        (
            "img2img",
            {"prompt": "seven", "init_images": ["R0lGODlhAQABAAAAACw="]},
            415,
            "unsupported_image_type",
            "init_images",
        ),
        (
            "img2img",
            {"prompt": "seven", "init_images": [PHOTO], "denoising_strength": 0},
            422,
            "out_of_range",
            "denoising_strength",
        ),
        (
            "txt2img",
            {"prompt": "seven", "override_settings": {"sd_model_checkpoint": "other"}},
            404,
            "model_not_found",
            "override_settings",
        ),
        (
            "txt2img",
            {"prompt": "seven", "override_settings": {"sd_vae": "x"}},
            422,
            "unsupported_value",
            "override_settings",
        ),
        ("nothing", {}, 404, "not_found", ""),
        ("progress", {}, 405, "method_not_allowed", ""),
        ("options", {"sd_model_checkpoint": "other"}, 422, "unsupported_value", "options"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, error: str, field: str
) -> None:
    answer = http.post(f"/{path}", json=body)
    told = answer.json()
    assert (answer.status_code, told["error"], told["errors"]) == (status, error, field)
    assert set(told) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize(
    ("body", "code"),
    [("", "invalid_json"), ('{"prompt": "sev', "invalid_json"), ('{"steps": 4, "steps": 4}', "duplicate_key")],
)
def test_what_is_no_json_is_400(http: httpx.Client, body: str, code: str) -> None:
    answer = http.post("/txt2img", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, code)


def test_all_fields_of_the_original_are_accepted_at_their_defaults(http: httpx.Client) -> None:
    """Clients made from its description send every field there is.

    Source: ``StableDiffusionImg2ImgProcessingAPI`` of AUTOMATIC1111/stable-diffusion-webui 1.10.
    """
    text = {
        **dict.fromkeys(("styles", "eta", "s_min_uncond", "s_churn", "s_tmax", "s_tmin", "s_noise", "scheduler")),
        **dict.fromkeys(("override_settings", "refiner_checkpoint", "refiner_switch_at", "comments", "infotext")),
        **dict.fromkeys(("force_task_id", "firstpass_image", "script_name", "restore_faces", "tiling")),
        **{"prompt": "seven", "negative_prompt": "", "seed": -1, "subseed": -1, "subseed_strength": 0},
        **{"seed_resize_from_h": -1, "seed_resize_from_w": -1, "batch_size": 1, "n_iter": 1, "steps": 50},
        **{"cfg_scale": 7.0, "width": 512, "height": 512, "do_not_save_samples": False, "do_not_save_grid": False},
        **{"override_settings_restore_afterwards": True, "disable_extra_networks": False, "script_args": []},
        **{"sampler_name": None, "sampler_index": "Euler", "send_images": True, "save_images": False},
        **{"alwayson_scripts": {}, "denoising_strength": 0.75},
    }
    image = {
        **{"init_images": [PHOTO], "resize_mode": 0, "image_cfg_scale": None, "mask": None, "mask_round": True},
        **{"mask_blur_x": 4, "mask_blur_y": 4, "mask_blur": None, "inpainting_fill": 0, "inpaint_full_res": True},
        **{"inpaint_full_res_padding": 0, "inpainting_mask_invert": 0, "initial_noise_multiplier": None},
        **{"latent_mask": None, "include_init_images": False},
    }
    for path, body in (("txt2img", text), ("img2img", text | image), ("img2img", text | image | {"mask": ""})):
        answer = http.post(f"/{path}", json=body)
        assert answer.status_code == 200, answer.text
    masked = http.post("/img2img", json=text | image | {"mask": base64.b64encode(file_of(white(BOX))).decode()})
    adjusted = json.loads(masked.json()["info"])["adjusted"]
    assert {"mask_blur_x", "mask_blur_y", "inpaint_full_res"} <= set(adjusted)


def test_what_clients_ask_first(api: webuiapi.WebUIApi) -> None:
    assert [model["model_name"] for model in api.get_sd_models()] == ["toy-digits"]
    assert {sampler["name"] for sampler in api.get_samplers()} == {"deterministic", "stochastic"}
    assert api.get_options()["sd_model_checkpoint"] == "toy-digits"
    assert api.get_progress()["progress"] == 0.0
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.set_options({"sd_model_checkpoint": "toy-digits"}) is None


def test_progress_is_shown_and_an_interrupt_ends_it(slow_bundle: Path, tmp_path: Path) -> None:
    with (
        serving([slow_bundle], log=tmp_path / "log") as server,
        httpx.Client(base_url=f"{server.url}/sdapi/v1", timeout=120) as http,
    ):
        answers: list[dict[str, Any]] = []

        def draw() -> None:
            answers.append(httpx.post(f"{http.base_url}txt2img", json=body, timeout=120).json())

        body = {"prompt": "seven", "batch_size": 10}
        threads = [threading.Thread(target=draw) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: http.get("/progress").json()["state"]["job_count"] == 8, "all under way")
        http.post("/interrupt").raise_for_status()
        for thread in threads:
            thread.join()
    assert any('"interrupted": true' in answer["info"] for answer in answers)
    assert len(answers) == 8
