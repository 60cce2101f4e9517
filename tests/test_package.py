"""What a user installs: the wheel works outside the checkout, and the files around it say what they
must."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    pytest.importorskip(
        "hatchling", reason="builds without isolation, so that no network is needed"
    )
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md yet, which the wheel's metadata needs")
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = wheels.glob("doremi_train-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300
    )
    return target


def outside(installed: Path, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The installed command, where no checkout is in sight."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "doremi_train", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_wheel_carries_configuration_template_and_licence(installed: Path) -> None:
    package = installed / "doremi_train"
    for source in sorted((ROOT / "conf").rglob("*.yaml")):
        assert (
            package / "conf" / source.relative_to(ROOT / "conf")
        ).read_bytes() == source.read_bytes()
    assert (package / "reports" / "templates" / "report.html.jinja").exists()
    assert list(installed.glob("doremi_train-*.dist-info/licenses/LICENSE"))
    assert not (installed / "tests").exists()


@pytest.mark.slow
def test_the_installed_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    shown = outside(installed, tmp_path, "--help")
    assert shown.returncode == 0 and "Examples" in shown.stdout and "280m" in shown.stdout, (
        shown.stderr
    )
    refused = outside(installed, tmp_path, "stage=foo", f"run_dir={tmp_path / 'run'}")
    assert (
        refused.returncode == 2
        and "stage=foo" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    preset = outside(installed, tmp_path, "model=enormous")
    assert preset.returncode == 2 and "280m" in preset.stderr  # the groups are the wheel's own
    assert list(tmp_path.iterdir()) == []


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_the_image_has_its_base_by_argument_its_own_user_and_the_command() -> None:
    assert [base for base in instructions("ARG") if re.fullmatch(r"BASE=\S*cuda\S*", base)]
    assert instructions("FROM") == ["${BASE}"]
    (user,) = instructions("USER")
    assert user.split(":")[0] not in ("root", "0")
    assert instructions("ENTRYPOINT") == ['["doremi-train"]']
    assert all(
        "-c constraints.txt" in run or "--no-deps" in run
        for run in instructions("RUN")
        if "pip install" in run
    )


def test_everything_the_image_copies_exists_and_is_let_through() -> None:
    let_through = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for copy in instructions("COPY"):
        for source in copy.split()[:-1]:
            assert source.split("/")[0] in let_through
            assert (ROOT / source).exists() or source == "README.md"


def test_constraints_pin_every_dependency_exactly() -> None:
    import tomllib

    pins = re.findall(
        r"^([A-Za-z0-9._-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in wanted}
    assert names <= {pin.lower() for pin in pins}
    others = [
        n
        for n in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" not in n and n[:1] != "#"
    ]
    assert others == []


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
