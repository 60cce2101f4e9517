"""Documentation that is made from the code is current, and says every key once."""

import re

import pytest
import yaml
from helpers import keys, pages

from doremi_train.config import conf_dir, flatten


@pytest.fixture(scope="module")
def known() -> dict[str, keys.Key]:
    return {key.name: key for key in keys.every_key()}


def test_generated_pages_are_current() -> None:
    """Tables of docs/, and in conf/ the comment of every key, are what the fields say."""
    due = pages.generated()
    stale = [str(path.relative_to(pages.ROOT)) for path in due if path.read_text() != due[path]]
    assert not stale, (
        f"{', '.join(stale)}: stale; what a key is stands in the docstring below its field, what "
        "it may be in its type or registry; `python tests/helpers/pages.py` writes the rest anew"
    )


def test_every_key_is_documented_below_its_field(known: dict[str, keys.Key]) -> None:
    assert len(known) > 200
    for key in known.values():
        assert re.fullmatch(r"[A-ZΑ-Ω].*[.]", key.doc), f"{key.name}: {key.doc!r}"


def test_every_key_has_its_comment_in_conf(known: dict[str, keys.Key]) -> None:
    given = set()
    for name in pages.COMMENTED:
        values = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text())
        group = name.rpartition("/")[0]
        given |= set(flatten(values, f"{group}." if group else ""))
    given |= {"model.config"}  # whose own keys are transformers'
    assert {key.name for key in known.values() if key.takes} <= given


def test_keys_have_inherited_fields_types_and_registries(known: dict[str, keys.Key]) -> None:
    assert known["proxy.step_size"].doc.startswith("Step size η")  # of methods.doremi
    assert known["proxy.absent"][1:4] == ("`zero`, `hold` or `null`", ("zero", "hold"), "null")
    assert known["training.learning_rate"][1:4] == ("number > 0", (), "0.002")  # of the YAML
    assert known["selection.less.epochs"].default == "4"  # of the field
    assert known["swarm.prior"].values == ("natural", "uniform", "temperature", "unimax")
    assert {"doremi", "swarm"} < set(known["compare.methods"].values)
    assert known["data.text_key"].values == ()


LONG = "x" + " x" * 59
ABOVE = f"g:\n  # x{' x' * 47}\n  # x{' x' * 11}\n  b: 1\n"


@pytest.mark.parametrize(
    ("text", "everywhere", "due"),
    [
        ("a: 1 # old\n", False, "a: 1 # new; and so on\n"),
        ("a: 1\n", False, "a: 1\n"),
        ("a: 1\n", True, "a: 1 # new; and so on\n"),
        ("# top\n# old\na: 1\n", False, "# top\n# old\na: 1\n"),
        ("# top\n\n# old\na: 1\n", False, "# top\n\na: 1 # new; and so on\n"),
        ("g:\n  # old\n  b: 1\n", False, ABOVE),
        ("g:\n  c: 1 # other\n# another\nz: 2\n", True, "g:\n  c: 1 # other\n# another\nz: 2\n"),
    ],
)  # fmt: skip
def test_comments_are_put_beside_or_above_a_key(text: str, everywhere: bool, due: str) -> None:
    known = {
        "a": keys.Key("a", "text", (), "null", "New; and so on. More."),
        "g.b": keys.Key("g.b", "text", (), "null", f"{LONG}."),
    }
    assert keys.commented(text, "", known, everywhere) == due
