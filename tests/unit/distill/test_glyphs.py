"""Pictures of glyphs: names as Unicode lists them, captions that say what is shown; what is held out stays out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from rich.progress import Progress

from distill_jobs.data.captioned import index_shards
from distill_jobs.data.colours import HUES, colour_of, recoloured
from distill_jobs.data.drawing import drawn
from distill_jobs.data.glyphs import read_glyphs, read_names
from distill_jobs.data.scenes import PLACES, Held, Scenes, colours_for
from distill_jobs.errors import DataError
from distill_jobs.latent_sections import GlyphData, Shares
from tests.support.glyphs import SHADES, glyph, glyphs

FONT = Path(GlyphData.model_fields["font"].default)
LISTED = """\
# emoji-test.txt
# group: Food & Drink
# subgroup: food-fruit
1F34E           ; fully-qualified     # 🍎 E0.6 red apple
# group: People & Body
# subgroup: hand-fingers-open
1F44B           ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB     ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
# subgroup: person
1F9D4 200D 2642 FE0F ; fully-qualified     # 🧔‍♂️ E13.1 man: beard
1F9D4 200D 2642      ; minimally-qualified # 🧔‍♂ E13.1 man: beard
# group: Flags
# subgroup: country-flag
1F1EF 1F1F5     ; fully-qualified     # 🇯🇵 E0.6 flag: Japan
# group: Symbols
# subgroup: keycap
0035 FE0F 20E3  ; fully-qualified     # 5️⃣ E0.6 keycap: 5
"""


@pytest.fixture
def names(tmp_path: Path) -> Path:
    file = tmp_path / "emoji-test.txt"
    file.write_text(LISTED, encoding="utf-8")
    return file


def test_names_are_spoken_and_skin_tones_left_out(names: Path) -> None:
    found = read_names(names)
    told = ["red apple", "waving hand", "man with beard", "flag of Japan", "keycap 5"]
    assert [entry.name for entry in found] == told
    assert found[2].text == "\U0001f9d4\u200d\u2642\ufe0f"
    assert (found[3].group, found[3].subgroup) == ("Flags", "country-flag")


def test_what_is_missing_is_named_with_its_package(names: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.names: .*nowhere is not there; Debian's unicode-data"):
        read_names(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.font: .*nowhere is not there; Debian's fonts-noto-color-emoji"):
        read_glyphs(tmp_path / "nowhere", read_names(names))


def test_files_of_another_kind_are_refused(names: Path, tmp_path: Path) -> None:
    (tmp_path / "prose").write_text("no emoji here")
    with pytest.raises(DataError, match="lists no fully-qualified emoji"):
        read_names(tmp_path / "prose")
    with pytest.raises(DataError, match=r"data\.font: .*prose has no bitmaps"):
        read_glyphs(tmp_path / "prose", read_names(names))


@pytest.mark.skipif(not FONT.is_file(), reason="Debian's fonts-noto-color-emoji is not installed")
def test_sequences_are_one_glyph_of_the_font(names: Path, tmp_path: Path) -> None:
    found = read_glyphs(FONT, read_names(names))
    assert len(found) == 5
    assert found[0].colour == "red"
    assert all(each.picture.mode == "RGBA" and min(each.picture.size) > 60 for each in found)


def test_every_colour_can_be_given_and_is_recognised() -> None:
    for shade in SHADES.values():
        for colour in HUES:
            assert colour_of(recoloured(glyph("thing", shade).picture, colour)) == colour


def test_a_colour_is_recognised_on_white_and_grey_has_none() -> None:
    canvas = Image.new("RGB", (64, 64), "white")
    canvas.paste((30, 110, 220), (20, 20, 40, 40))
    assert colour_of(canvas) == "blue"
    assert colour_of(glyph("stone", (120, 120, 120)).picture) is None


def test_flags_people_and_what_is_named_by_a_colour_keep_theirs() -> None:
    red = SHADES["cherry"]
    assert "red" not in colours_for(glyph("cherry", red))
    assert "blue" in colours_for(glyph("cherry", red))
    assert colours_for(glyph("red circle", red)) == ()
    assert colours_for(glyph("flag of Japan", red, group="Flags")) == ()
    assert colours_for(glyph("cook", red, subgroup="person-role")) == ()
    assert colours_for(glyph("stone", (120, 120, 120))) == ()


def test_a_picture_depends_on_seed_and_index_alone() -> None:
    one, other = (Scenes(glyphs(6), Held(0, 0, 0), 32) for _ in range(2))
    one.scene(40)
    assert np.array_equal(np.asarray(one.scene(41).picture), np.asarray(other.scene(41).picture))
    assert one.scene(41).caption == other.scene(41).caption
    assert one.scene(42).caption != Scenes(glyphs(6), Held(1, 0, 0), 32).scene(42).caption


def test_captions_say_what_is_shown() -> None:
    scenes = Scenes(glyphs(6), Held(0, 0, 0), 64)
    shown = [scenes.scene(index) for index in range(300)]
    assert {scene.names for scene in shown[:6]} == {(each.name,) for each in scenes.glyphs}
    assert all(name in scene.caption for scene in shown for name in scene.names)
    assert {len(scene.names) for scene in shown} == {1, 2}
    for scene in shown:
        if scene.colour:
            assert scene.colour in scene.caption
            assert colour_of(scene.picture) == scene.colour
        drawn_on = np.argwhere(np.asarray(scene.picture.convert("L")) < 250)
        assert drawn_on.size, scene.caption
        if scene.caption.endswith(("top left", "bottom right")):
            middle = drawn_on.mean(axis=0)
            assert (middle < 32).all() == scene.caption.endswith("top left")
    placed = {word for row in PLACES for word in row if word}
    assert placed == {scene.caption.partition(", ")[2] for scene in shown if scene.caption.startswith("small")} - {
        ""
    }


@pytest.mark.parametrize(
    ("shares", "colours", "names"),
    [
        ({"plain": 1, "placed": 0, "recoloured": 0}, False, 1),
        ({"plain": 0, "placed": 0, "recoloured": 1}, True, 1),
        ({"plain": 0, "placed": 0, "recoloured": 0}, False, 2),
    ],
    ids=["plain", "recoloured", "pairs"],
)
def test_shares_are_of_the_pictures_after_one_of_each_glyph(
    shares: dict[str, float], colours: bool, names: int
) -> None:
    scenes = Scenes(glyphs(6), Held(0, 0, 0), 16, Shares(**shares))
    assert {len(scenes.scene(index).names) for index in range(6)} == {1}
    shown = [scenes.scene(index) for index in range(6, 60)]
    assert {(bool(scene.colour), len(scene.names)) for scene in shown} == {(colours, names)}


def test_shares_of_more_than_all_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"shares of all pictures, and 1\.2 together"):
        Shares(plain=0.9, placed=0.1, recoloured=0.2)


def test_what_is_held_out_is_never_drawn() -> None:
    held = Held(0, glyphs=0.2, compositions=0.5)
    scenes = Scenes(glyphs(40), held, 16)
    shown = [scenes.scene(index) for index in range(600)]
    hidden = {each.name for each in scenes.glyphs if held.glyph(each.name)}
    assert 0 < len(hidden) < 20
    assert not [scene for scene in shown if hidden & set(scene.names)]
    tinted = [(scene.colour, *scene.names) for scene in shown if scene.colour]
    pairs = [scene.names for scene in shown if len(scene.names) == 2]
    assert tinted
    assert pairs
    assert not [words for words in (*tinted, *pairs) if held.composition(*words)]


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="it takes two"):
        Scenes(glyphs(3), Held(0, 1 - 1e-9, 0), 16).scene(0)


def test_shards_are_drawn_once_for_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("font", "names"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("distill_jobs.data.drawing.read_names", lambda file: ())
    monkeypatch.setattr("distill_jobs.data.drawing.read_glyphs", lambda font, names: glyphs(5))
    monkeypatch.setattr("distill_jobs.data.drawing.SHARD_PICTURES", 4)
    data = GlyphData(
        kind="glyphs",
        path=str(tmp_path / "drawn"),
        font=tmp_path / "font",
        names=tmp_path / "names",
        pictures=10,
        side_px=16,
    )
    folder = drawn(data, 0, Progress(disable=True))
    assert [file.name for file in sorted(folder.iterdir())] == ["000.tar", "001.tar", "002.tar"]
    assert len(index_shards(str(folder))) == 10
    before = folder.stat().st_mtime_ns
    assert drawn(data, 0, Progress(disable=True)) == folder
    assert folder.stat().st_mtime_ns == before
    assert drawn(data, 1, Progress(disable=True)) != folder
    assert drawn(data.model_copy(update={"shares": Shares(plain=0.4)}), 0, Progress(disable=True)) != folder
    (tmp_path / "font").write_text("another font")
    assert drawn(data, 0, Progress(disable=True)) != folder
