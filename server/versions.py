"""New versions of the bundles that are served: which of them may take the place of the old without a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from engines.bundle import Bundle
from engines.condition import Tokenizer, load_tokenizer
from engines.errors import BundleError
from server.catalogue import Model
from server.loading import served_bundles
from server.service import Service
from server.settings import Settings


@dataclass(frozen=True)
class Version:
    """A bundle as it was read once: its folder may hold another by now."""

    bundle: Bundle
    tokenizer: Tokenizer

    @classmethod
    def of(cls, bundle: Bundle) -> Version:
        """Raises: BundleError."""
        return cls(bundle, load_tokenizer(bundle))

    @property
    def name(self) -> str:
        return self.bundle.manifest.name


def read_versions(settings: Settings) -> tuple[Version, ...]:
    """What lies where the settings say, verified. Raises: BundleError."""
    return tuple(map(Version.of, served_bundles(settings)))


def new_versions(settings: Settings, served: Sequence[Version]) -> tuple[Version, ...]:
    """What lies where the settings say, verified, and fit to follow what is served.

    Raises: BundleError when a request that was accepted for the old could not be made by the new.
    """
    versions = read_versions(settings)
    by_name = {version.name: version for version in versions}
    for old in served:
        name = old.name
        if name not in by_name:
            raise BundleError(f"The new bundles have no model {name}; to withdraw a model, restart.")
        lacking = next(_lacking(by_name[name], old), None)
        if lacking is not None:
            raise BundleError(
                f"{by_name[name].bundle.path} lacks {lacking}, which the bundle in use offers. Requests for it may "
                "have been accepted: give it another name, or restart."
            )
    return versions


def hashes(versions: Sequence[Version]) -> dict[str, str]:
    """By model name, the sha256 of its manifest."""
    return {version.name: version.bundle.sha256 for version in versions}


def offer(versions: Sequence[Version], service: Service) -> None:
    """Have an API resolve requests against these from now on."""
    service.catalogue.replace(
        Model(
            version.bundle.manifest, version.tokenizer, partial(service.costs.predicted_s, version.bundle.manifest)
        )
        for version in versions
    )
    service.metrics.offers([version.bundle for version in versions])


def _lacking(new: Version, old: Version) -> Iterator[str]:
    """What a request for the old may ask for and the new does not have."""
    had, has = old.bundle.manifest, new.bundle.manifest
    yield from (f"the task {task}" for task in had.tasks if task not in has.tasks)
    sizes = {str(size) for size in has.sizes}
    yield from (f"the size {size}" for size in map(str, had.sizes) if size not in sizes)
    students = {(student.steps, student.sampler) for student in has.students}
    for student in had.students:
        if (student.steps, student.sampler) not in students:
            yield f"the {student.sampler} sampler with {student.steps} steps"
    encoders = {encoder.steps for encoder in has.encoders}
    yield from (f"the encoder of {e.steps} steps" for e in had.encoders if e.steps not in encoders)
    if had.guidance.min < has.guidance.min or had.guidance.max > has.guidance.max:
        yield f"guidance_scale {had.guidance.min:g} to {had.guidance.max:g}"
    if not new.tokenizer.reads_all_of(old.tokenizer):
        yield "prompts"
