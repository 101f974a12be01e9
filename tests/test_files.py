"""What the package keeps: damage of any kind is noticed when it is read, and nothing is ever half written."""

from __future__ import annotations

import hashlib
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import coneslab
from coneslab import ConeslabError, files, load_edit, pictures
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits import (
    Combined,
    TokenEdit,
    WeightDelta,
    compress,
    export_tokens,
    import_tokens,
    vocabulary_fingerprint,
)
from coneslab.errors import FileFormatError, MissingFileError, WriteError
from coneslab.experiments import setting, table
from coneslab.finetuning import load_checkpoint, save_checkpoint
from coneslab.methods import Decomposition
from coneslab.methods.conceptor import vocabulary
from coneslab.neurons import ConceptNeurons, TunedNeurons
from coneslab.pretraining.autoencoder import save_grid
from coneslab.pretraining.loop import Log
from coneslab.pretraining.model_cards import write_model_card
from coneslab.pretraining.unet import Latents

Read = Callable[[], Any]
AWKWARD = 'a "quoted", sks cat\nof <two> lines: ±½, NA'  # in a name


# --- damage ---------------------------------------------------------------------------------------------


def mask_of(pipe: Any) -> ConceptNeurons:
    space = KVSpace(pipe)
    facts: dict[str, Any] = {"subject": "cat", "settings": {"rounds": 3}, "history": {"loss": [0.5, 0.25]}}
    return ConceptNeurons(space.layout, [0, 3, 70], [0.0, 0.5, 0.25], space.fingerprint(), **facts)


def named(name: str) -> coneslab.world.Subject:
    return coneslab.world.Subject(name, "cat", "sks", (Image.new("RGB", (4, 4)),), ("a sks cat",))


def named_delta(pipe: Any, subject: Any, *, seed: int) -> WeightDelta:
    return WeightDelta({"w": torch.full((2, 2), float(ord(subject.name)))}, "ab")


def tables_of(folder: Path) -> tuple[Path, Read]:
    cells = [{"subject": name, "seed": 0} for name in ("cat", AWKWARD)]

    def measure(subject: str, seed: int) -> list[dict[str, Any]]:
        return [{"condition": "shut", "measure": name, "value": len(subject) / 7} for name in ("text", "image")]

    def never(**_: Any) -> Any:
        raise AssertionError("every cell is in the table")

    table.run_cells(cells, measure, folder / "table.csv", progress=False)
    read = lambda: table.run_cells(cells, never, folder / "table.csv", progress=False).to_csv()  # noqa: E731
    return folder / "table.csv", read


def keep(kind: str, pipe: Any, judge: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Read]:
    """Let the package write a file of this kind; the files that were written, and how it reads them."""
    folder.mkdir()
    mask = mask_of(pipe)
    token = TokenEdit(("sks",), torch.arange(24.0)[None], vocabulary_fingerprint(pipe), history={"loss": [1.0]})
    delta = WeightDelta({"w": torch.arange(6.0).view(2, 3)}, "ab", subject="cat", settings={"steps": 3})
    words = Decomposition("a pet", ("cat", "dog"), np.array([2.0, 1.0]), 2, 1.0, "ab", validation={50: 0.5})
    edits = {
        "mask": mask,
        "weights": delta,
        "token": token,
        "low rank": compress(delta),
        "combined": Combined((token, delta)),
        "tuned": TunedNeurons(mask, np.arange(3.0)),
        "words": words,
    }
    if kind in edits:
        path = edits[kind].save(folder / "edit.safetensors")
        return [path], lambda: load_edit(path)
    if kind == "mask file":
        path = mask.save_mask(folder / "mask")
        return [path], lambda: ConceptNeurons.load_mask(path, pipe)
    if kind == "exported token":
        (path,) = export_tokens(token, pipe, folder, names={"sks": "<cat*>"})
        return [path], lambda: import_tokens(pipe, path).vectors.tolist()
    if kind == "checkpoint":
        path = folder / "checkpoint"
        save_checkpoint(path, {"weight/a": torch.arange(5.0)}, {"step": 2, "history": {"loss": [0.5]}})
        return [path], lambda: repr(load_checkpoint(path))
    if kind == "vocabulary":
        options: dict[str, Any] = {"words": ["cat", "dog"], "cache": folder, "progress": False}
        read = lambda: vocabulary.encode_vocabulary(pipe, judge, **options).features.tolist()  # noqa: E731
        read()
        return list(folder.iterdir()), read
    if kind == "kept edit":
        read = lambda: setting.kept(named_delta, pipe, named("a"), seed=0, folder=folder)  # noqa: E731
        read()
        monkeypatch.setattr(setting, "timed", lambda make: pytest.fail("it is kept already"))
        return sorted(folder.iterdir()), read
    if kind == "log":
        Log({"weights": 3}, [{"step": 1.0, "loss": 0.1234}], [{"mse": 0.5}]).save(folder / "log.json")
        return sorted(folder.iterdir()), lambda: Log.load(folder / "log.json")
    if kind == "settings":
        path = files.write_json(
            folder / "settings.json", {"DreamBooth": {"learning_rate": 1e-4}, "Cones": {"tau": 0.998}}
        )
        return sorted(folder.iterdir()), lambda: files.read_json(path)
    if kind == "model folder":
        for name in ("model_index.json", "unet/weights.bin"):
            files.write_whole(folder / name, name.encode() * 9)
        files.seal_folder(folder)
        return [path for path in folder.rglob("*") if path.is_file()], lambda: files.require_folder(folder)
    path, read = tables_of(folder)
    return [path, path.with_name("table.csv.sha256")], read


KINDS = (
    *("mask", "weights", "token", "low rank", "combined", "tuned", "words", "mask file", "exported token"),
    *("checkpoint", "vocabulary", "kept edit", "log", "settings", "model folder", "table"),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a byte or bit changed, a piece cut out, doubled, blanked or moved, something added or the end lost."""
    start, other = sorted(chance.randrange(len(data)) for _ in range(2))
    size = min(chance.choice((1, 2, 8, 64)), len(data) - other)
    way = chance.randrange(9)
    if way == 0:
        return data[:start] + bytes([chance.randrange(256)]) + data[start + 1 :]
    if way == 1:
        return data[:start] + bytes([data[start] ^ 1 << chance.randrange(8)]) + data[start + 1 :]
    if way == 2:
        return data[:start]
    if way == 3 and other - start >= size:
        a, b = data[start : start + size], data[other : other + size]
        return data[:start] + b + data[start + size : other] + a + data[other + size :]
    if way == 4:
        return data[:start] + data[start + size :]
    if way == 5:
        return data[:start] + data[start : start + size] + data[start:]
    if way == 6:
        return data[:start] + b"\0" * size + data[start + size :]
    if way == 7:
        return data + data[start : start + size]
    return data[:start] + chance.randbytes(size) + data[start:]


def fuzz(files_: list[Path], read: Read, rounds: int, seed: int) -> dict[str, int]:
    """Damage one file at a time: how often reading gave the same as before, and how often a ConeslabError."""
    chance, right, counts = random.Random(seed), read(), {"equal": 0, "refused": 0}
    whole = {path: path.read_bytes() for path in files_}
    for number in range(rounds):
        path = files_[number % len(files_)]
        path.write_bytes(damaged(whole[path], chance))
        try:
            found = read()
        except ConeslabError as error:
            assert len(str(error)) > 20
            counts["refused"] += 1
        else:
            assert found == right, f"round {number}: {path.name} was read as something else"
            counts["equal"] += 1
        for one, data in whole.items():  # reading may have made it again
            one.write_bytes(data)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_as_it_was_or_refused(kind, v_pipe, judge, tmp_path, monkeypatch):
    assert sum(fuzz(*keep(kind, v_pipe, judge, tmp_path / "kept", monkeypatch), rounds=40, seed=1).values()) == 40


def test_what_was_kept_under_another_name_is_not_taken_for_this(v_pipe, tmp_path, monkeypatch):
    """Whole files that change places: each has the right checksum, of something else."""
    for name in "ab":
        setting.kept(named_delta, v_pipe, named(name), seed=0, folder=tmp_path)
    one, other = sorted(tmp_path.glob("*.safetensors"))
    one.rename(tmp_path / "aside"), other.rename(one), (tmp_path / "aside").rename(other)
    with pytest.raises(FileFormatError, match="delete it, and the edit is made again"):
        setting.kept(named_delta, v_pipe, named("a"), seed=0, folder=tmp_path)

    recipe = type("Recipe", (), {"seed": 0, "place": lambda *_: (0, slice(0, 2))})()
    with Latents(tmp_path, recipe, lambda _: torch.zeros(2, 1), distinct=2, objects=(1, 0, 0, 0)) as latents:
        monkeypatch.setattr("coneslab.pretraining.unet.CHUNK", 2)
        save_checkpoint(
            latents.folder / "00000.safetensors",
            {"latents": torch.zeros(2)},
            {"captions": ["a", "b"], "chunk": "00001"},
        )
        monkeypatch.setattr(latents, "_ask", lambda number: latents._jobs.setdefault(number, Done()))
        with pytest.raises(FileFormatError, match="holds other pictures than it should"):
            latents.batch(0, 0)


class Done:
    def result(self) -> None:
        pass


DEEP = "[" * 100_000


def test_a_forged_file_with_the_right_checksum_is_refused_whatever_it_holds(tmp_path):
    tensors = {"w": torch.ones(2)}
    for description in (DEEP, "5", "{}", '{"fingerprint": "a", "settings": 5}'):
        metadata = {"format": "coneslab.edit/1", "kind": "WeightDelta", "description": description}
        save_file(tensors, tmp_path / "edit", files.sealed(tensors, metadata))
        with pytest.raises(FileFormatError, match="cannot be read as WeightDelta"):
            load_edit(tmp_path / "edit")
    for facts in (DEEP, "5", "null"):
        metadata = {"format": "coneslab.checkpoint/1", "facts": facts}
        save_file(tensors, tmp_path / "state", files.sealed(tensors, metadata))
        with pytest.raises(FileFormatError, match="not a complete coneslab checkpoint"):
            load_checkpoint(tmp_path / "state")
    for text in (DEEP, '{"a": ' * 100_000, "5", "[]", "\xff"):
        (tmp_path / "note.json").write_text(text, encoding="latin-1")
        with pytest.raises(FileFormatError, match="JSON"):
            files.read_json(tmp_path / "note.json")


def test_a_checkpoint_from_before_there_were_checksums_is_still_read(tmp_path):
    save_file({"weight/a": torch.ones(2)}, tmp_path / "state", {"facts": '{"step": 3}'})
    assert load_checkpoint(tmp_path / "state")[1] == {"step": 3}


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "edit": lambda _, path: load_edit(path),
    "mask": lambda pipe, path: ConceptNeurons.load_mask(path, pipe),
    "checkpoint": lambda _, path: load_checkpoint(path),
    "token": lambda pipe, path: import_tokens(pipe, path),
    "json": lambda _, path: files.read_json(path),
    "table": lambda _, path: files.read_table(path),
    "picture": lambda _, path: pictures.open_picture(path),
    "toml": lambda _, path: files.read_toml(path),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_told_and_never_waited_for(reader, v_pipe, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, kind, said in (
        ("folder", FileFormatError, "is a folder"),
        ("pipe", FileFormatError, "no ordinary file"),
        ("link", MissingFileError, "is a link to nothing"),
        ("nothing", MissingFileError, "there is no file"),
        ("folder/" + "x" * 300, MissingFileError, "there is no file"),
    ):
        with pytest.raises(kind, match=said):
            READERS[reader](v_pipe, tmp_path / name)
    assert issubclass(MissingFileError, FileNotFoundError)


# --- tables ---------------------------------------------------------------------------------------------


def test_a_table_is_plain_csv_with_its_checksum_beside_it(tmp_path):
    path, _ = tables_of(tmp_path)
    shown = pandas.read_csv(path)
    assert len(shown) == 4 and set(shown.subject) == {"cat", AWKWARD}
    digest, name = path.with_name("table.csv.sha256").read_text().split()
    assert name == "table.csv" and digest == hashlib.sha256(path.read_bytes()).hexdigest()  # as sha256sum -c wants it


def test_a_table_changed_by_hand_is_refused_until_that_is_said_to_be_on_purpose(tmp_path):
    path, _ = tables_of(tmp_path)
    path.write_text(path.read_text().replace("shut", "open"))
    with pytest.raises(
        FileFormatError, match=r"table.csv does not match .* changed it on purpose, delete table.csv.sha256"
    ):
        files.read_table(path)
    path.with_name("table.csv.sha256").unlink()
    assert set(files.read_table(path).condition) == {"open"}


def test_line_ends_of_another_system_are_no_damage(tmp_path):
    path, _ = tables_of(tmp_path)
    before = files.read_table(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after = files.read_table(path)
    assert after.columns.equals(before.columns) and after.value.equals(before.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty"),
        (b"subject,seed\ncat,0\ndo", "last line has no end"),
        (b"subject,seed\ncat,0\ndog\n", "row 3 has 1 entries, the first one 2"),
        (b"subject,seed\ncat,0,1\n", "row 2 has 3"),
        (b"subject,subject\ncat,0\n", "each once"),
        (b"\xff\xfe\x00", "utf-8"),
        (b'subject,seed\n"cat,0\n', "complete table"),
    ],
)
def test_a_table_made_by_hand_is_read_if_its_form_is_right(text, said, tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes(b"subject,seed\ncat,0\n")
    assert files.read_table(path).subject.tolist() == ["cat"]
    path.write_bytes(text)
    with pytest.raises(FileFormatError, match=said):
        files.read_table(path)


def test_a_kill_between_two_writes_leaves_a_table_that_can_be_read(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    first, second = (pandas.DataFrame({"value": [value]}) for value in (1, 2))
    files.write_table(path, first)
    whole = files.write_whole
    for killed_at, left in ((0, 1), (1, 1), (2, 2)):
        files.write_table(path, first)
        count = iter(range(9))

        def write(*given: Any, killed_at: int = killed_at, count: Iterator[int] = count) -> Path:
            if next(count) == killed_at:
                raise KeyboardInterrupt
            return whole(*given)

        monkeypatch.setattr(files, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            files.write_table(path, second)
        monkeypatch.undo()
        assert files.read_table(path).value.tolist() == [left]


def test_a_file_that_is_no_table_of_cells_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(ConeslabError, match="has the columns hello, cells need subject"):
        table.run_cells([{"subject": "cat"}], lambda subject: [{}], tmp_path / "notes.txt", progress=False)
    assert (tmp_path / "notes.txt").read_text() == "hello\n"


# --- writing --------------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes: what is written stops halfway, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_model(pipe: Any, folder: Path) -> None:
    with files.replacing_folder(folder / "model", "model_index.json") as unfinished:
        pipe.save_pretrained(unfinished)


BIG = torch.arange(4000.0)
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "edit": lambda pipe, folder: WeightDelta({"w": BIG}, "ab").save(folder / "edit"),
    "mask": lambda pipe, folder: coneslab.neurons.random_neurons(mask_of(pipe).binary(), seed=0).save(folder / "mask"),
    "tokens": lambda pipe, folder: export_tokens(TokenEdit(("<x>",), BIG[None], "ab"), pipe, folder),
    "checkpoint": lambda pipe, folder: save_checkpoint(folder / "state", {"a": BIG}, {}),
    "table": lambda pipe, folder: files.write_table(folder / "t.csv", pandas.DataFrame({"x": BIG.numpy()})),
    "json": lambda pipe, folder: files.write_json(folder / "x.json", {"x": BIG.tolist()}),
    "grid": lambda pipe, folder: save_grid(folder / "grid.png", [NOISE]),
    "card": lambda pipe, folder: write_model_card(folder, {"judge": LOG}, name="judge"),
    "model": a_model,
}
NOISE = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
LOG = Log({"weights": 1}, [{"step": 1, "seconds": 1.0, "rate": 1.0, "loss": 1.0}])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(writer, v_pipe, tmp_path):
    write = WRITERS[writer]
    with full_disk(700), pytest.raises(WriteError, match="could not be written .* free some space") as caught:
        write(v_pipe, tmp_path)
    assert isinstance(caught.value, OSError) and not contents(tmp_path)
    write(v_pipe, tmp_path)
    before = contents(tmp_path)
    assert before and not any(name.startswith(".") for name in before)
    with full_disk(700), pytest.raises(WriteError):
        write(v_pipe, tmp_path)
    beside = {name for name in before if name.endswith(".sha256")}  # may hold the new checksum as well
    assert {**contents(tmp_path), **dict.fromkeys(beside)} == {**before, **dict.fromkeys(beside)}
    if writer == "table":
        assert len(files.read_table(tmp_path / "t.csv")) == len(BIG)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WriteError, match="holds other things, which would be lost"):
        with files.replacing_folder(tmp_path, "model_index.json"):
            raise AssertionError("nothing must be written")
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_link_is_followed_and_a_device_stays_one(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    files.write_whole("/dev/null", b"gone")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a reader
    for write in (lambda path: files.write_whole(path, b"x"), files.require_writable):
        with pytest.raises(WriteError, match="no ordinary file"):
            write(tmp_path / "pipe")
    ends = os.pipe()
    files.write_whole(f"/dev/fd/{ends[1]}", b"through")
    assert os.read(ends[0], 99) == b"through"


# --- before work begins ---------------------------------------------------------------------------------


def unwritable(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return {
        "is a folder: name another file": folder / "folder",
        "is not a folder, so there can be no": folder / "file" / "x",
        "could not be written": Path("/proc/none/x"),
        "name too long|too long": folder / ("x" * 300),
    }


def test_what_cannot_be_written_is_found_out_and_nothing_is_made(tmp_path):
    cases = unwritable(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for said, path in cases.items():
        with pytest.raises(WriteError, match=f"(?i){said}"):
            files.require_writable(path)
    with pytest.raises(WriteError, match="is a file: name another folder"):
        files.require_writable(tmp_path / "file", folder=True)
    for wrong in (5, None, "a\0b", b"bytes"):
        with pytest.raises(ConeslabError, match="give a text or a pathlib.Path"):
            files.require_writable(wrong)  # type: ignore[arg-type]
    assert files.require_writable(tmp_path / "new" / "deep" / "x") == tmp_path / "new" / "deep" / "x"
    assert sorted(tmp_path.rglob("*")) == before


RESUMABLE: dict[str, Callable[..., Any]] = {
    "custom_diffusion": coneslab.custom_diffusion,
    "dreambooth": coneslab.dreambooth,
    "lora": lambda pipe, subject, **run: coneslab.lora(pipe, subject, rank=2, **run),
    "textual_inversion": coneslab.textual_inversion,
    "finetune_kv": coneslab.finetune_kv,
    "finetune_together": lambda pipe, subject, **run: coneslab.finetune_together(pipe, mask_of(pipe), [subject], **run),
    "ablate": lambda pipe, subject, **run: coneslab.ablate(pipe, "a cat", "a dog", **run),
    "erase": lambda pipe, subject, **run: coneslab.methods.erase(pipe, "a cat", **run),
}


@pytest.mark.parametrize("method", RESUMABLE)
def test_a_file_to_resume_from_is_checked_before_anything_is_computed(method, v_pipe, pictured, tmp_path, monkeypatch):
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(v_pipe.unet, "forward", computed)
    monkeypatch.setattr(v_pipe.vae, "encode", computed)
    monkeypatch.setattr(v_pipe.text_encoder, "forward", computed)
    for path in unwritable(tmp_path).values():
        with pytest.raises(WriteError):
            RESUMABLE[method](v_pipe, pictured, resume=path, progress=False)
    picture, edit = tmp_path / "picture.png", mask_of(v_pipe).save(tmp_path / "edit")
    Image.new("RGB", (8, 8)).save(picture)
    for path, said in ((picture, "not a complete coneslab checkpoint"), (edit, "not a coneslab checkpoint")):
        before = path.read_bytes()
        with pytest.raises(FileFormatError, match=said):
            RESUMABLE[method](v_pipe, pictured, resume=path, progress=False)
        assert path.read_bytes() == before


def test_work_whose_results_cannot_be_kept_does_not_begin(v_pipe, judge, tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it began")

    path = unwritable(tmp_path)["is a folder: name another file"]
    sampler = coneslab.measure.Sampler("DDIM", 2)
    monkeypatch.setattr(type(judge), "text_features", never)
    for work in (
        lambda: table.run_cells([{"seed": 0}], never, path, progress=False),
        lambda: setting.kept(never, v_pipe, named("a"), seed=0, folder=tmp_path / "file"),
        lambda: vocabulary.encode_vocabulary(v_pipe, judge, cache=tmp_path / "file", progress=False),
        lambda: coneslab.measure.compare_samplers(v_pipe, judge, [sampler], out=path),
        lambda: coneslab.experiments.compare_methods(path, client=never),
        lambda: coneslab.experiments.compare_methods(tmp_path / "t.csv", client=never, folder=tmp_path / "file"),
        lambda: coneslab.experiments.tune_methods(path, client=never),
        lambda: coneslab.experiments.run_experiment("precision", never, path=path),
        lambda: coneslab.pretraining.train(tmp_path / "file", ["vae"]),
        lambda: coneslab.pretraining.export(tmp_path, tmp_path / "file"),
    ):
        with pytest.raises(WriteError):
            work()


def test_the_home_folder_may_be_written_as_people_do(v_pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    mask = mask_of(v_pipe)
    assert load_edit(mask.save("~/deep/edit.safetensors")) == mask
    assert mask.save_mask("~/mask") == tmp_path / "mask" and ConceptNeurons.load_mask("~/mask", v_pipe) == mask
    save_checkpoint("~/state", {"a": torch.ones(1)}, {"step": 1})
    assert load_checkpoint("~/state")[1] == {"step": 1}
    assert import_tokens(v_pipe, export_tokens(TokenEdit(("<x>",), torch.ones(1, 24), "ab"), v_pipe, "~/t")[0])
    table.run_cells([{"subject": "cat"}], lambda subject: [{"value": 1.0}], "~/table.csv", progress=False)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    assert coneslab.subject_from_folder("~/pictures", "cat").name == "pictures"
    assert {path.name for path in tmp_path.iterdir()} >= {"deep", "mask", "state", "t", "table.csv", "pictures"}
