"""What every entry of exports.FORMATS keeps, whatever its form: tests ask it of all of them."""

import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest

from doremi_train.config import UserError
from doremi_train.exports import convert, formats
from doremi_train.exports import form as forms

WEIGHTS = {"web": 0.62, "code & co": 0.3, "tiny": 3e-7, "none": 0.0, "rest": 0.08 - 3e-7}
LATER = {"web": 0.2, "code & co": 0.5, "tiny": 0.1, "none": 0.0, "rest": 0.2}
MEANS = {"web": 900.0, "code & co": 4000.0, "tiny": 20.0, "none": 5.0, "rest": 77.7}
EPOCHS = {"web": 0.4, "code & co": 3.2, "tiny": 1.0, "none": 0.0, "rest": 1.0}
PATHS = {name: f"/d/{name.replace(' & ', '_')}_text_document" for name in WEIGHTS}
AWKWARD = (
    "/d/a b",
    "/d/it's",
    '/d/"a"',
    "/d/a: b #c",
    "s3://bücket/{a}",
    "C:\\d\\a",
    "1e3",
    "null",
)


def check(to: str) -> None:
    """Assert all of the contract of the target `to`."""
    described(to)
    there_and_back(to)
    paths_as_it_says(to)
    awkward_paths(to)
    stages_as_it_says(to)


def described(to: str) -> None:
    """Everything that the table and the file's name are made of is there."""
    form = formats.FORMATS[to]
    assert form.draws in get_args(forms.Unit)
    for cell in (form.trainer, form.file, form.because):
        assert cell == cell.strip() != "" and not set(cell) & set("|\n"), f"{to}: {cell!r}"
    assert Path(f"mixture.{form.ending}").suffix == f".{form.ending}"


def there_and_back(to: str) -> None:
    """What is written is read back to the last digit, sums to exactly 1, and is in its unit."""
    means = means_of(to)
    zeros = formats.FORMATS[to].zeros
    drawn = convert.shares(WEIGHTS, means, zeros)
    text = convert.write(to, drawn, PATHS, EPOCHS)
    read = _read(to, text)
    assert {name: weight for name, weight in read.items() if weight or zeros} == drawn
    assert sum(Decimal(repr(weight)) for weight in read.values() if weight) == 1
    back = convert.weights(read, means)
    assert all(
        math.isclose(back[name], WEIGHTS[name], abs_tol=1e-9, rel_tol=1e-4) for name in WEIGHTS
    )
    assert (PATHS["none"] in text) == zeros  # what has no weight is left out, or is there


def paths_as_it_says(to: str) -> None:
    """Without paths it is refused, or goes by name."""
    drawn = convert.shares({"a": 0.3, "b": 0.7}, None)
    if formats.FORMATS[to].paths:
        with pytest.raises(UserError, match="no path for b") as error:
            convert.write(to, drawn, {"a": "/d/a"}, {})
        assert f"export.to={to} needs one" in str(error.value)
    else:
        read = convert.read(to, convert.write(to, drawn, {}, {}), ["a", "b"], {}, "x")
        assert read == {"a": 0.3, "b": 0.7}


def awkward_paths(to: str) -> None:
    """A path with signs in it is read back, or refused; never read as another."""
    drawn = convert.shares({"a": 0.3, "b": 0.7}, None)
    for path in AWKWARD:
        paths = {"a": path, "b": "/d/b"}
        source = forms.Source("a", path, 0.3, 1.0)
        refuses = formats.FORMATS[to].refuses
        if refuses and refuses(source):
            with pytest.raises(UserError, match=r"export\.paths\.a="):
                convert.write(to, drawn, paths, {})
        else:
            text = convert.write(to, drawn, paths, {})
            assert convert.read(to, text, ["a", "b"], paths, "x") == {"a": 0.3, "b": 0.7}, path


def stages_as_it_says(to: str) -> None:
    """A staged mixture is written as stages, and several are refused on the way back; or the whole
    run's mixture is written."""
    means = means_of(to)
    whole, first, later = (convert.shares(w, means) for w in (WEIGHTS, WEIGHTS, LATER))
    plain = convert.write(to, whole, PATHS, EPOCHS)
    staged = convert.write(to, whole, PATHS, EPOCHS, [(0, first), (100, later)])
    if not formats.FORMATS[to].write_stages:
        assert staged == plain
        return
    assert staged != plain and all(repr(part) in staged for part in later.values())
    with pytest.raises(UserError, match="it has 2 stages"):
        _read(to, staged)
    alone = _read(to, convert.write(to, whole, PATHS, EPOCHS, [(0, later)]))
    assert {name: part for name, part in alone.items() if part} == later


def means_of(to: str) -> Mapping[str, float] | None:
    """Tokens per document of each domain, where the target draws documents."""
    return MEANS if formats.FORMATS[to].draws == "documents" else None


def _read(to: str, text: str) -> dict[str, float]:
    return convert.read(to, text, list(WEIGHTS), PATHS, "mixture.path=x")
