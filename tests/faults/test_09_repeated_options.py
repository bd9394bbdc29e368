"""An option that has one value and is used twice: refused, for every verb and option, with both values."""

import click
import pytest

from qkit.commands import VERBS, cli


def options(verb):
    command = cli.get_command(click.Context(cli), verb)
    return [p for p in command.params if isinstance(p, click.Option)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_with_one_value(verb, run):
    for option in options(verb):
        flag = option.opts[0]
        once = [flag] if option.is_flag else [flag, "A"]
        again = [flag] if option.is_flag else [f"{flag}=B"]
        code, _, err = run(verb, *once, *again)
        if option.multiple:
            assert "used twice" not in err
            continue
        assert code == 2 and err.startswith(f"qkit: {flag} is used twice") and err.count("\n") == 1, err
        assert option.is_flag or "with A and B" in err


def test_three_times_the_first_is_not_lost_without_a_word(run):
    code, _, err = run("quantize", "--recipe", "a b", "--recipe", "B", "--recipe", "C", "--model", "m", "--out", "o")
    assert code == 2 and "--recipe is used 3 times, with 'a b' and B and C: use it once" in err


def test_an_option_of_the_program_itself(run):
    code, _, err = run("--version", "--version")
    assert code == 2 and "--version is used twice" in err


def test_values_that_look_like_options(run, tmp_path):
    """What is the value of another option is not counted."""
    code, _, err = run("eval", "--text", "--json", "--json", tmp_path / "x.json", "no-such-model")
    assert code != 2 or "used twice" not in err
