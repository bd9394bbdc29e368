"""A request that names no method: what its level of quality puts in that place, by names alone."""

from __future__ import annotations

import math
from dataclasses import replace

from qkit.planning.quality_levels import SAMPLES, Setting, kind_of_schemes, settings_of
from qkit.planning.request import Request, recipe_of


def names_method(request: Request) -> bool:
    """Whether a request or its recipe file names a method."""
    if request.method is not None or request.recipe is None:
        return request.method is not None
    return "method" in recipe_of(replace(request, options={}, effort=None)).model_fields_set


def kind_of_request(request: Request) -> str:
    """The kind of what a request without a method asks for."""
    recipe = recipe_of(replace(request, options={}, effort=None))
    rules = [r for r in recipe.rules if r.skip is None and not r.keep]
    return kind_of_schemes([recipe.resolve(None)[0], *(recipe.resolve(r)[0] for r in rules)])


def preferred(request: Request, level: str) -> Request:
    """A request without a method, with the one that a level tries first."""
    return with_setting(request, settings_of(kind_of_request(request), level)[0])


def with_setting(request: Request, setting: Setting) -> Request:
    """The request with a setting; options that it has itself go over those of the setting.

    Where it asks for fewer samples of a text than usual, the setting adds fewer that the model writes, in proportion.
    """
    share = min(1, max(0, request.samples) / SAMPLES)
    asked = request.synthetic_samples
    return replace(
        request,
        method=setting.method,
        options={**setting.options, **request.options},
        synthetic_samples=math.ceil(setting.synthetic * share) if asked is None else asked,
    )
