"""The models on offer, as an API needs them: manifest and tokenizer, no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.condition import Tokenizer, load_tokenizer
from engines.errors import BundleError
from engines.manifest import BundleManifest, Size
from server.errors import NotFoundError
from server.request import DenoiseRequest

CostPrediction = Callable[[DenoiseRequest], float]
"""A request → predicted engine seconds, at the best batch size."""


@dataclass(frozen=True)
class Model:
    """A model on offer. predict_s: what its work costs here."""

    manifest: BundleManifest
    tokenizer: Tokenizer
    predict_s: CostPrediction

    @classmethod
    def of(cls, bundle: Bundle, predict_s: CostPrediction) -> Model:
        return cls(bundle.manifest, load_tokenizer(bundle), predict_s)

    @property
    def name(self) -> str:
        return self.manifest.name

    def size(self, text: str) -> Size | None:
        """The trained size written as ``WxH``."""
        return next((size for size in self.manifest.sizes if str(size) == text), None)


class Catalogue:
    """Models by id, no two of a name; the first is the default. Raises: BundleError when none is given."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models = {model.name: model for model in models}
        if not self._models:
            raise BundleError("There is no bundle to serve; name one with --bundle.")

    def replace(self, models: Iterable[Model]) -> None:
        """Offer other versions of the models from now on, in one move."""
        self._models = Catalogue(models)._models

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        return next(iter(self._models.values()))

    def find(self, name: str | None) -> Model:
        """The model of this id, None for the default. Raises: NotFoundError naming the models there are."""
        if name is None:
            return self.default
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise NotFoundError(
                "model_not_found", f"There is no such model here; model can be {known}.", param="model"
            )
        return model
