"""Images to start from, masks, history, cancelling and API keys, as a visitor uses them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import DESKTOP, LIMIT_MS, PHONE, playground
from tests.support.keys import write_key_file
from tests.support.serving import serving

pytestmark = pytest.mark.browser

CARDS = "#grid .card"
LOADED = "() => document.querySelector('#canvas').width"


def picture(width: int = 96, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(file, "PNG")
    return file.getvalue()


def upload(page: Page, data: bytes | None = None) -> None:
    name = {"name": "photo.png", "mimeType": "image/png", "buffer": data or picture()}
    page.get_by_label("Start from an image").set_input_files(name)  # type: ignore[arg-type]


def stroke(page: Page) -> None:
    """Paint over the middle of the left half."""
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()


def image_at(page: Page, selector: str) -> Image.Image:
    source = page.locator(selector).first.get_attribute("src") or ""
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")


def test_an_upload_takes_the_size_of_its_shape_and_may_be_cut_to_another(page: Page) -> None:
    page.get_by_label("Model", exact=True).select_option("toy-sized")
    size = page.get_by_label("Size", exact=True)
    upload(page, picture(100, 240))
    expect(size).to_have_value("64x128")
    expect(page.locator("#curl")).to_contain_text("size=64x128")
    stroke(page)
    expect(page.locator("#curl")).to_contain_text("mask")
    size.select_option("96x64")
    expect(page.locator("#curl")).to_contain_text("size=96x64")
    assert page.evaluate(LOADED) == 96
    expect(page.locator("#curl")).not_to_contain_text("mask")
    expect(page.locator(f"{CARDS} img").first).to_have_attribute("width", "96")


def test_of_sizes_of_one_shape_the_nearest_is_taken(page: Page) -> None:
    nearest = """async ([width, height]) => {
        const { nearestSize } = await import("/static/paint.js");
        return nearestSize(["256x256", "512x512", "512x256"], { width, height });
    }"""
    shapes = [(512, 512), (300, 300), (4000, 4000), (900, 500)]
    assert [page.evaluate(nearest, shape) for shape in shapes] == ["512x512", "256x256", "512x512", "512x256"]


def test_an_upload_is_cut_to_the_model_and_edited(any_page: Page) -> None:
    upload(any_page)
    expect(any_page.locator("#compare")).to_be_visible()
    assert any_page.evaluate(LOADED) == 64
    expect(any_page.locator("#curl")).to_contain_text("/v1/images/edits")
    expect(any_page.locator("#curl")).to_contain_text("strength=0.75")
    expect(any_page.locator("#curl")).not_to_contain_text("mask")
    expect(any_page.locator(CARDS)).to_have_count(8)
    assert any_page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_only_what_was_painted_changes(any_page: Page) -> None:
    upload(any_page)
    expect(any_page.locator("#compare")).to_be_visible()
    stroke(any_page)
    expect(any_page.locator("#curl")).to_contain_text("mask=@mask.png")
    expect(any_page.locator("#grid")).to_have_attribute("aria-busy", "false")
    made = image_at(any_page, f"{CARDS} img")
    assert made.getpixel((50, 32)) == (200, 30, 40)
    assert made.getpixel((16, 32)) != (200, 30, 40)


def test_undo_and_clear_take_the_mask_back(page: Page) -> None:
    upload(page)
    expect(page.locator("#compare")).to_be_visible()
    stroke(page)
    expect(page.locator("#curl")).to_contain_text("mask=")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#curl")).not_to_contain_text("mask=")
    stroke(page)
    expect(page.locator("#curl")).to_contain_text("mask=")
    page.get_by_role("button", name="Clear mask").click()
    expect(page.locator("#curl")).not_to_contain_text("mask=")


def test_a_mask_is_painted_by_keyboard(page: Page) -> None:
    upload(page)
    expect(page.locator("#compare")).to_be_visible()
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    expect(page.locator("#curl")).to_contain_text("mask=")
    page.keyboard.press("Control+z")
    expect(page.locator("#curl")).not_to_contain_text("mask=")


def test_a_dab_of_the_smallest_brush_is_sent(page: Page) -> None:
    upload(page)
    expect(page.locator("#compare")).to_be_visible()
    page.get_by_label("Brush").fill("2")
    page.locator("#canvas").focus()
    page.keyboard.press("Space")
    expect(page.locator("#curl")).to_contain_text("mask=")
    expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_slider_uncovers_before_and_after(page: Page) -> None:
    upload(page)
    expect(page.locator("#compare")).to_be_visible()
    page.get_by_role("slider", name="Before and after").fill("20")
    assert "80%" in page.locator("#before").evaluate("e => e.style.clipPath")
    assert image_at(page, "#before").getpixel((5, 5)) == (200, 30, 40)


def test_a_result_becomes_the_image_and_removing_it_draws_from_nothing(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Edit image of seed")).first.click()
    expect(page.locator("#compare")).to_be_visible()
    page.get_by_role("button", name="Remove image").click()
    expect(page.locator("#compare")).to_be_hidden()
    expect(page.locator("#curl")).to_contain_text("/v1/images/generations")


def test_a_file_that_is_no_image_is_said_at_the_field(page: Page) -> None:
    upload(page, b"no image")
    expect(page.get_by_role("alert")).to_contain_text("no image")
    expect(page.locator("#image")).to_have_attribute("aria-invalid", "true")
    assert page.locator("#picture + #problem").count() == 1


def test_a_model_without_the_tasks_hides_them(browser: Browser, page: Page) -> None:
    def fewer(route: Route) -> None:
        body = route.fetch().json()
        body["data"] = [{**each, "tasks": ["text_to_image"]} for each in body["data"]]
        route.fulfill(json=body)

    page.route("**/v1/models", fewer)
    page.reload()
    expect(page.locator(CARDS)).to_have_count(8)
    expect(page.locator("#picture")).to_be_hidden()
    expect(page.get_by_role("button", name=re.compile("Edit image"))).to_have_count(0)


def test_history_is_kept_restored_and_deleted(page: Page) -> None:
    page.get_by_role("button", name="seven", exact=True).click()
    first = page.get_by_role("button", name=re.compile("^Restore seven"))
    expect(first).to_have_count(1)
    page.get_by_role("button", name="three", exact=True).click()
    expect(page.get_by_role("button", name=re.compile("^Restore three"))).to_have_count(1)
    page.reload()
    first.click()
    expect(page.locator(f"{CARDS} img").first).to_have_attribute("alt", re.compile("^seven, "))
    page.get_by_role("button", name=re.compile("^Delete three")).click()
    expect(page.get_by_role("button", name=re.compile("^Restore three"))).to_have_count(0)
    page.get_by_role("button", name="Clear history").click()
    expect(page.locator("#history-part")).to_be_hidden()


def test_cancel_gives_the_request_up(page: Page) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/v1/images/generations", hold)
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")
    assert held


def test_a_server_with_keys_asks_for_one(browser: Browser, toy_bundle: Path, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    flags = ("--api-keys", str(tmp_path / "keys.json"))
    with serving([toy_bundle], *flags, log=tmp_path / "log") as server:
        context = browser.new_context(viewport=DESKTOP, base_url=server.url)
        context.set_default_timeout(LIMIT_MS)
        page = context.new_page()
        page.goto("/")
        key = page.get_by_label("API key")
        expect(page.get_by_role("alert")).to_contain_text("key")
        key.fill("hs_wrong")
        key.press("Enter")
        expect(key).to_have_attribute("aria-invalid", "true")
        key.fill(keys["a"])
        key.press("Enter")
        expect(page.locator(CARDS)).to_have_count(8)
        expect(key).to_be_hidden()
        expect(page.locator("#curl")).to_contain_text("$HALFSTEP_API_KEY")
        expect(page.locator("#curl")).not_to_contain_text(keys["a"])
        context.close()


def test_the_reference_asks_for_a_key_where_the_server_does(
    browser: Browser, toy_bundle: Path, tmp_path: Path
) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    with serving([toy_bundle], "--api-keys", str(tmp_path / "keys.json"), log=tmp_path / "log") as server:
        context = browser.new_context(viewport=PHONE, base_url=server.url)
        context.set_default_timeout(LIMIT_MS)
        page = context.new_page()
        page.goto("/docs")
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        key.fill("hs_wrong")
        key.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("not valid")
        key.fill(keys["reader"])
        key.press("Enter")
        expect(page.locator("#post-v1-images-generations")).to_be_visible()
        expect(key).to_be_hidden()
        page.reload()
        expect(page.locator("#post-v1-images-generations")).to_be_visible()
        context.close()


def test_a_withheld_image_is_shown_as_one(
    browser: Browser, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFSTEP_SAFETY_CHECK", "tests.support.safety_hooks:check")
    with (
        serving([toy_bundle], log=tmp_path / "log") as server,
        playground(browser, server.url, DESKTOP) as page,
    ):
        page.get_by_label("Prompt").fill("seven")
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_alt_text("Withheld by the server's safety check")).to_have_count(1)
        expect(page.locator(CARDS)).to_have_count(8)
        withheld = page.get_by_role("button", name=re.compile("^seven with guidance .*, withheld$"))
        expect(withheld).to_have_count(9)
        expect(withheld.first.locator("img")).to_have_attribute("src", "/static/withheld.svg")
        expect(page.get_by_role("alert")).to_be_hidden()
