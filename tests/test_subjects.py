"""Personal subjects: what ships, and what comes from a user's folder."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from coneslab import world
from coneslab.errors import ConeslabError, ConeslabWarning, WorldError
from coneslab.world import subjects


def test_plain_prompt_drops_the_token_and_mends_the_article():
    apple = subjects.subject("apple")
    assert apple.plain("a krx apple on the beach") == "an apple on the beach"
    assert apple.plain("two cars and krx apple") == "two cars and apple"
    assert apple.plain("a book near the krx apple") == "a book near the apple"
    assert apple.plain("an apple") == "an apple"


def test_same_name_same_pictures():
    one, two = subjects.subject("dog"), subjects.subject("dog")
    assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    assert "dog" in repr(one) and "<img alt=" in one._repr_html_()


def test_subject_from_a_users_folder(tmp_path):
    rotated = Image.new("RGB", (100, 60), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6  # turned by a quarter: shown 60 wide, 100 high
    rotated.save(tmp_path / "b.jpg", exif=exif)
    Image.new("RGBA", (50, 50), (0, 0, 255, 0)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.warns(ConeslabWarning, match=r"notes\.txt: left out"):
        mine = subjects.subject_from_folder(tmp_path, "dog", token="wug", resolution=32)
    assert [image.size for image in mine.images] == [(32, 32), (32, 32)] and mine.prompt == "a wug dog"
    assert mine.images[0].getpixel((5, 5)) == (255, 255, 255)  # transparent becomes white
    assert mine.name == tmp_path.name and len(mine.prompts) == 10


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ConeslabError, match="is not a folder"):
        subjects.subject_from_folder(tmp_path / "nowhere", "dog")
    with pytest.raises(ConeslabError, match="holds no picture"):
        subjects.subject_from_folder(tmp_path, "dog")
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ConeslabError, match="broken.png"):
        subjects.subject_from_folder(tmp_path, "dog")
    with pytest.raises(ConeslabError, match="class_word"):
        subjects.subject_from_folder(tmp_path, " ")
    with pytest.raises(WorldError, match="dragon"):
        subjects.subject("dragon")


def test_wanted_pictures_show_the_subject_where_the_prompts_ask_for_it():
    about = subjects.subject("robot")
    drawn = subjects.wanted_pictures(about, n=2, seed=5)
    assert len(drawn) == 2 * len(about.prompts)
    beach = world.compose([subjects.truth("robot").sticker], "beach", seed=5)[0]  # the first prompt's scene
    assert about.prompts[0].endswith(world.SCENES["beach"][0]) and np.array_equal(drawn[0], beach)
    assert len({picture.tobytes() for picture in (*drawn, *about.images)}) == len(drawn) + len(about.images)
    with pytest.raises(ConeslabError, match="not of the sticker world"):
        subjects.wanted_pictures(replace(about, records=()))


def test_names_in_html_are_shown_as_they_are():
    shown = replace(subjects.subject("cat"), name='<cat*> "x"', token="<v*>")._repr_html_()
    assert "&lt;cat*&gt;" in shown and "a &lt;v*&gt; cat" in shown and "<cat" not in shown and "<v" not in shown
    assert 'alt="5 reference pictures of the subject &lt;cat*&gt; &quot;x&quot;"' in shown
