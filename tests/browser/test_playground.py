"""The playground as a visitor uses it."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from playwright.sync_api import Page, Route, expect

pytestmark = pytest.mark.browser

CARDS = "#grid .card"


def set_range(page: Page, label: str, value: str) -> None:
    page.get_by_role("slider", name=label).fill(value)


def requested(page: Page) -> dict[str, object]:
    """The request the page shows as curl."""
    line = page.locator("#curl").text_content() or ""
    words = shlex.split(line.replace("\\\n", " "))
    body: dict[str, object] = json.loads(words[words.index("-d") + 1])
    return body


def test_it_draws_at_once_and_offers_what_the_model_knows(any_page: Page) -> None:
    expect(any_page.locator(CARDS)).to_have_count(8)
    expect(any_page.locator("#known button")).to_have_count(10)
    expect(any_page.locator("#status")).to_contain_text(re.compile(r"8 images in \d+ ms"))
    expect(any_page.locator(f"{CARDS} img").first).to_have_class("pixelated")
    assert any_page.locator(f"{CARDS} img").first.evaluate("i => i.naturalWidth") == 64


def test_a_suggestion_draws_it(any_page: Page) -> None:
    any_page.get_by_role("button", name="seven", exact=True).click()
    expect(any_page.locator(f"{CARDS} img").first).to_have_attribute("alt", re.compile("^seven, seed "))
    expect(any_page.get_by_role("button", name="seven", exact=True)).to_have_attribute("aria-pressed", "true")


def test_the_slider_previews_live(page: Page) -> None:
    before = page.locator(f"{CARDS} img").first.get_attribute("src")
    set_range(page, "Guidance", "4.5")
    expect(page.locator("#guidance-value")).to_have_text("4.5")
    expect(page.locator("#status")).to_contain_text("guidance 4.5")
    assert page.locator(f"{CARDS} img").first.get_attribute("src") != before


def test_steps_and_images_are_chosen(page: Page) -> None:
    page.get_by_label("8", exact=True).check()
    set_range(page, "Images", "2")
    expect(page.locator("#status")).to_contain_text(re.compile("2 images.*8 steps"))
    expect(page.locator(CARDS)).to_have_count(2)


def test_the_dice_changes_the_seed_and_so_does_r_in_its_field(page: Page) -> None:
    seed = page.get_by_label("Seed", exact=True)
    first = seed.input_value()
    page.get_by_role("button", name="New random seed").click()
    expect(seed).not_to_have_value(first)
    second = seed.input_value()
    page.locator("h2").first.click()
    page.keyboard.press("r")
    expect(seed).to_have_value(second)
    seed.press("r")
    expect(seed).not_to_have_value(second)


def test_the_same_seed_draws_the_same(page: Page) -> None:
    seed, image = page.get_by_label("Seed", exact=True), page.locator(f"{CARDS} img").first
    seed.fill("5")
    expect(image).to_have_attribute("alt", re.compile("seed 5,"))
    source = image.get_attribute("src")
    seed.fill("6")
    expect(image).to_have_attribute("alt", re.compile("seed 6,"))
    seed.fill("5")
    expect(image).to_have_attribute("src", source or "")


def test_the_sweep_shows_every_guidance_and_picks_one(any_page: Page) -> None:
    tiles = any_page.locator("#sweep button")
    expect(tiles).to_have_count(9)
    tiles.last.click()
    expect(any_page.locator("#guidance-value")).to_have_text("5.0")
    expect(tiles.last).to_have_attribute("aria-pressed", "true")


def test_a_tile_that_fails_is_left_out_and_not_asked_for_again(page: Page) -> None:
    tiles, grid = page.locator("#sweep button"), page.locator("#grid")
    expect(tiles).to_have_count(9)
    lowest = float(page.locator("#guidance").get_attribute("min") or "")
    asked: list[float] = []

    def fail_the_lowest(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        if body["n"] == 1:
            asked.append(body["guidance_scale"])
        if body["n"] == 1 and body["guidance_scale"] == lowest:
            error = {"message": "No room.", "param": None, "code": "queue_full"}
            route.fulfill(status=503, json={"error": error})
        else:
            route.continue_()

    page.route("**/v1/images/generations", fail_the_lowest)
    page.get_by_role("button", name="seven", exact=True).click()
    expect(page.get_by_role("button", name=re.compile("^seven with guidance"))).to_have_count(8)
    expect(grid).to_have_attribute("aria-busy", "false")
    set_range(page, "Guidance", "4.5")
    expect(page.locator("#status")).to_contain_text("guidance 4.5")
    expect(grid).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(asked) == 9


def test_the_servers_own_words_are_shown_and_the_field_is_marked(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("<b>a cat</b>")
    prompt.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not know that prompt")
    expect(prompt).to_have_attribute("aria-invalid", "true")
    undescribed = page.locator("[aria-invalid]:not([aria-describedby~=problem])")
    expect(undescribed).to_have_count(0)
    prompt.fill("three")
    prompt.press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(prompt).to_have_attribute("aria-invalid", "false")


def test_a_server_that_is_gone_is_said_so(page: Page) -> None:
    def drop(route: Route) -> None:
        route.abort()

    page.route("**/v1/images/generations", drop)
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_the_curl_line_is_the_request(page: Page) -> None:
    page.get_by_label("Seed", exact=True).fill("12")
    expect(page.locator("#status")).to_contain_text("images in")
    body = requested(page)
    assert (body["seed"], body["n"], body["prompt"]) == (
        12,
        8,
        page.get_by_label("Prompt", exact=True).input_value(),
    )


def test_timing_names_every_stage(page: Page) -> None:
    expect(page.locator("#timing dt")).to_have_text(
        ["queue", "condition", "steps", "decode", "encode", "round trip"]
    )


def test_another_model_refits_the_controls(page: Page) -> None:
    page.get_by_label("Model", exact=True).select_option("toy-poison")
    page.get_by_role("button", name="six", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("no usable image")


def test_sizes_are_offered_where_there_are_several(page: Page) -> None:
    size, image = page.get_by_label("Size", exact=True), page.locator(f"{CARDS} img").first
    expect(size).to_be_hidden()
    assert "size" not in requested(page)
    page.get_by_label("Model", exact=True).select_option("toy-sized")
    expect(size).to_have_value("64x64")
    size.select_option("96x64")
    expect(image).to_have_attribute("width", "96")
    assert requested(page)["size"] == "96x64"
    page.get_by_label("Model", exact=True).select_option("toy-digits")
    expect(size).to_be_hidden()


def test_everything_is_reached_by_keyboard_and_has_a_name(any_page: Page) -> None:
    unnamed = any_page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, a')].filter(e =>
             !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    any_page.get_by_label("Prompt", exact=True).focus()
    any_page.keyboard.press("Tab")
    expect(any_page.get_by_role("button", name="Draw")).to_be_focused()


def test_nothing_is_wider_than_the_screen(any_page: Page) -> None:
    assert any_page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_reference_lists_every_operation(any_page: Page) -> None:
    paths = any_page.request.get("/openapi.json").json()["paths"]
    any_page.goto("/docs")
    expect(any_page.locator(".operation")).to_have_count(sum(len(methods) for methods in paths.values()))
    generations = any_page.locator("#post-v1-images-generations")
    for field in ("guidance_scale", "num_inference_steps", "partial_images", "output_compression"):
        expect(generations.get_by_text(field, exact=True).first).to_be_visible()
    assert any_page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_reference_has_every_body_of_an_answer_and_of_its_events(page: Page) -> None:
    page.goto("/docs")
    submitted = page.locator("#post-v1-jobs details").filter(has=page.locator("b", has_text="202"))
    expect(submitted.locator("caption")).to_have_text(["JobStateBody", "AcceptedJobBody"])
    expect(submitted.get_by_text("queue_position", exact=True)).to_have_count(1)
    expect(submitted.get_by_text("status_url", exact=True)).to_have_count(2)
    drawn = page.locator("#post-v1-images-generations details").first
    expect(drawn.locator("caption")).to_have_text(
        ["ImagesResponse", "PartialImageEvent", "CompletedEvent", "ErrorResponse"]
    )
    expect(drawn.get_by_text("partial_image_index", exact=True)).to_have_count(1)
    followed = page.locator("#get-v1-jobs-job-id-events details").first
    expect(followed.locator("caption")).to_have_text(["JobEventBody", "ErrorResponse"])
