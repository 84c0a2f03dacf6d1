"""A run's folder: what stands where, who may work in it, and what it was made with."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill_jobs.checkpoint import write_text
from distill_jobs.errors import LockedError, RecipeError
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import changed_fields, read_recipe, without_effect

BARE = {"recipe.yaml", "machine.json", "data.json", "pictures.json", "given.json", ".lock", "tensorboard"}
"""What a run folder holds before anything is made that depends on its recipe."""


@dataclass(frozen=True)
class Machine:
    """What the last bits of a run depend on besides its recipe.

    threads: of torch, in each process; device: the model of a GPU, else the kind of device.
    """

    threads: int
    processes: int
    device: str
    cpu: str
    torch_version: str

    @classmethod
    def here(cls, processes: int, device: torch.device) -> Machine:
        cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(torch.get_num_threads(), processes, name, cpu, str(torch.__version__))

    def differences(self, other: Machine) -> list[str]:
        """What of this differs elsewhere, as "name: here, there"."""
        there = asdict(other)
        here = asdict(self).items()
        return [f"{name}: {value}, now {there[name]}" for name, value in here if value != there[name]]


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def machine(self) -> Path:
        return self.path / "machine.json"

    @property
    def data(self) -> Path:
        """Which captioned images the run was started with."""
        return self.path / "data.json"

    @property
    def given(self) -> Path:
        """The network of the teacher's folder that the run's own teacher was fine-tuned from."""
        return self.path / "given.json"

    @property
    def learned_from(self) -> Path:
        """The teacher that phases taken from another run learned from."""
        return self.path / "learned_from.json"

    @property
    def pictures(self) -> Path:
        """What identifies the pictures and captions that a pipeline is made of."""
        return self.path / "pictures.json"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def begun(self) -> Path:
        """The teacher that a run makes, as it is before it is fine-tuned."""
        return self.path / "begun"

    @property
    def autoencoder(self) -> Path:
        """That of a pipeline which the run makes."""
        return self.path / "autoencoder"

    @property
    def text_encoder(self) -> Path:
        """That of a pipeline which the run makes, as it is before there is a network."""
        return self.path / "text_encoder"

    @property
    def evaluation(self) -> Path:
        """What an evaluation drew and measured, cell by cell."""
        return self.path / "evaluation"

    @property
    def glyph_encoder(self) -> Path:
        """The image encoder of the glyph table."""
        return self.path / "glyph_encoder"

    @property
    def sample_sheet(self) -> Path:
        """Prompts with what teacher and students make of them, where an evaluation drew some."""
        return self.path / "sheets" / "glyphs.png"

    @property
    def stage_one(self) -> Path:
        return self.path / "stage_one"

    @property
    def gate(self) -> Path:
        """Stands when the stage-one student has passed its gate."""
        return self.path / "gate.json"

    def shared(self, steps: int) -> Path:
        """The one network for all step counts, as it was when it had learned this one."""
        return self.path / "shared" / f"d{steps}"

    def student(self, steps: int) -> Path:
        return self.path / "students" / f"d{steps}"

    def unconditional(self, steps: int) -> Path:
        """The second network of a student that is guided at sampling."""
        return self.path / "unconditional" / f"d{steps}"

    @property
    def consistency(self) -> Path:
        return self.path / "consistency"

    def encoder(self, steps: int) -> Path:
        return self.path / "encoders" / f"e{steps}"

    @property
    def decoder(self) -> Path:
        """The tiny decoder."""
        return self.path / "decoder"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone. Raises: LockedError when another job has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LockedError(
                    f"another job works in {self.path}; wait for it or choose another --out"
                ) from None
            yield

    def take_up(self, recipe: Recipe, resume: bool) -> None:
        """Start the recipe's run here, or go on with it, with other fields where they change rounding at most.

        A run that ended before it made anything, as of data that are not there, is started afresh.
        Raises: RecipeError when the folder holds another's, or phases of nobody knows which.
        """
        if not self.recipe.is_file() and (training_seconds(self) or (self.path / "checkpoints").is_dir()):
            raise RecipeError(
                f"{self.path} holds phases but no recipe.yaml, which says what they were trained for; put it back, "
                "or choose another --out"
            )
        if not self.recipe.is_file() or all(path.name in BARE for path in self.path.iterdir()):
            for of_another_start in (self.machine, self.data, self.pictures, self.given):
                of_another_start.unlink(missing_ok=True)
            write_text(self.recipe, recipe.to_yaml())
            return
        if not resume:
            raise RecipeError(f"{self.path} already holds a run; go on with --resume or choose another --out")
        changed = changed_fields(stored_recipe(self), recipe)
        if fixed := [name for name in changed if not without_effect(name)]:
            raise RecipeError(
                f"the recipe differs from the one {self.path} was started with: {', '.join(fixed)}; give the same "
                f"fields, or take a new --out and --from {self.path} for the phases that stay the same"
            )
        if changed:
            write_text(self.recipe, recipe.to_yaml())

    def started_on(self, here: Machine) -> Machine:
        """The machine the run was started on, recorded now if it is this one."""
        if not self.machine.is_file():
            write_text(self.machine, json.dumps(asdict(here), indent=2) + "\n")
        return Machine(**json.loads(self.machine.read_text(encoding="utf-8")))

    def keep_data(self, file: Path, identity: str, images: int) -> None:
        """Record what the run reads, at its start. file: ``data`` or ``pictures``; identity: its hash.

        Raises: RecipeError when it is another.
        """
        self._keep(file, {"sha256": identity, "images": images})

    def keep_given(self, teacher: Path, sha256: str) -> None:
        """Record which network is fine-tuned, by its hash. Raises: RecipeError when it was another."""
        if not self.given.is_file():
            write_text(self.given, json.dumps({"folder": str(teacher), "sha256": sha256}) + "\n")
        elif json.loads(self.given.read_text(encoding="utf-8"))["sha256"] != sha256:
            raise RecipeError(
                f"the network in {teacher} is not the one that the teacher in {self.path} was fine-tuned from, "
                "here or in the run that it was taken from; give the same, or take a new --out without --from"
            )

    def keep_read_by(self, source: RunFolder, teacher: str | None) -> None:
        """Record what a run read whose phases are taken. teacher: hash of its weights, None where it has none.

        Raises: RecipeError when this folder's was another.
        """
        for there, here in ((source.data, self.data), (source.pictures, self.pictures)):
            if there.is_file():
                self._keep(here, json.loads(there.read_text(encoding="utf-8")))
        if teacher is not None:
            write_text(self.learned_from, json.dumps({"run": str(source.path), "sha256": teacher}) + "\n")

    def check_teacher(self, sha256: str) -> None:
        """Raises: RecipeError where phases were taken that learned from another teacher."""
        if not self.learned_from.is_file():
            return
        taken = json.loads(self.learned_from.read_text(encoding="utf-8"))
        if taken["sha256"] != sha256:
            raise RecipeError(
                f"the phases taken from {taken['run']} learned from a teacher of other weights; give the same in "
                "teacher.folder, or take a new --out without --from"
            )

    def _keep(self, file: Path, now: dict[str, Any]) -> None:
        if not file.is_file():
            write_text(file, json.dumps(now) + "\n")
        elif (then := json.loads(file.read_text(encoding="utf-8"))) != now:
            raise RecipeError(
                f"the images, captions or encoders are not those that {self.path} was started with, or that phases "
                f"it took were made from ({then['images']:,} images then, {now['images']:,} now); give it the "
                "same, or take a new --out"
            )


def stored_recipe(folder: RunFolder) -> Recipe:
    """The recipe a run folder was made with. Raises: RecipeError when there is none."""
    if not folder.recipe.is_file():
        raise RecipeError(f"{folder.path} is not a run folder: it has no recipe.yaml")
    return read_recipe(folder.recipe)


def training_seconds(folder: RunFolder) -> dict[str, float]:
    """Seconds of training by finished phase, without the image encoder of the glyph table, which only judges."""
    files = sorted(file for file in folder.path.glob("**/phase.json") if file.parent != folder.glyph_encoder)
    phases = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {phase["name"]: phase["seconds"] for phase in phases}
