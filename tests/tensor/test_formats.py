"""The tables of formats and schemes, and how a format is fitted to a width."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import Unsupported, UsageError
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, SCHEMES, Format, did_you_mean, fit_group, scheme


def test_every_scheme_that_was_asked_for_is_there():
    wanted = {f"W{b}A16{suffix}" for b in range(2, 9) for suffix in ("", "_ASYM")}
    wanted |= {"W8A8", "W4A8", "W4A8-FP8", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"}
    assert wanted <= SCHEMES.keys()


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_names_go_in_any_case(name):
    assert scheme(name.lower()) is scheme(name.upper()) is SCHEMES[name]


@pytest.mark.parametrize(("alias", "name"), [("int8", "W8A8"), ("w4afp8", "W4A8-FP8"), ("fp8_static", "FP8")])
def test_names_of_other_tools(alias, name):
    assert scheme(alias) is SCHEMES[name]


def test_unknown_scheme_names_the_nearest():
    with pytest.raises(UsageError, match=r"unknown scheme 'w4a61'; did you mean W4A16\?"):
        scheme("w4a61")
    assert did_you_mean("zzzzzz", list(SCHEMES)) == ""


@pytest.mark.parametrize("fmt", [*FORMATS.values(), *ACTIVATION_FORMATS.values()], ids=lambda f: f.name)
def test_json_round_trip(fmt):
    assert Format.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt


def test_group_size_option():
    assert FORMATS["int4"].with_group(64).group == 64
    channel = FORMATS["int4"].with_group(-1)
    assert (channel.strategy, channel.group) == ("channel", None)
    assert FORMATS["int8_channel"].with_group(32).strategy == "group"
    for bad in (0, -2):
        with pytest.raises(UsageError, match="group size"):
            FORMATS["int4"].with_group(bad)
    for fixed in ("nvfp4", "mxfp4", "mxfp8", "fp8", "fp8_channel", "fp8_block"):
        with pytest.raises(UsageError, match="fixed scale layout"):
            FORMATS[fixed].with_group(64)


@pytest.mark.parametrize(
    ("columns", "group"),
    [(256, 128), (128, 128), (192, 64), (64, 64), (96, 32), (320, 64), (4304, None), (8, None), (97, None), (1, None)],
)
def test_common_groups(columns, group):
    fitted = fit_group(FORMATS["int4"], columns)
    assert fitted.group == group
    assert fitted.strategy == ("group" if group else "channel")


@given(columns=st.integers(1, 5000), group=st.sampled_from([16, 32, 64, 96, 100, 128, 256]))
def test_a_fitted_group_divides_and_is_common(columns, group):
    fitted = fit_group(FORMATS["int4"].with_group(group), columns)
    if columns % group == 0:
        assert fitted.group == group
    else:
        expected = next((g for g in (64, 32) if columns % g == 0), None)
        assert (fitted.group, fitted.strategy) == (expected, "group" if expected else "channel")


@given(widths=st.lists(st.integers(1, 100).map(lambda n: 16 * n), min_size=2, max_size=4))
def test_widths_that_share_a_group(widths):
    fitted = fit_group(FORMATS["int4"], *widths)
    assert fitted.group in (128, 64, 32, None)
    assert all(w % (fitted.group or 1) == 0 for w in widths)
    assert fitted.group is not None or any(w % 32 for w in widths)


def test_strict_and_fixed_groups_refuse():
    with pytest.raises(Unsupported, match=r"100 input columns .* 128 .*--strict"):
        fit_group(FORMATS["int4"], 100, strict=True)
    with pytest.raises(Unsupported, match=r"24 input columns .* 16 of nvfp4"):
        fit_group(FORMATS["nvfp4"], 24)
    assert fit_group(FORMATS["fp8"], 97, strict=True) is FORMATS["fp8"]
