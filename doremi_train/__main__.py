"""The command: Hydra composes the configuration, a stage does the work, a mistake is one message
and exit code 2."""

import locale
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from doremi_train import command
from doremi_train.config import MAPPINGS, conf_dir
from doremi_train.redaction import veil


def main() -> None:
    """Entry point of `doremi-train` and `python -m doremi_train`."""
    _speak_utf8()
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Errors reach us whole, and we say them in one message.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Hydra writes and prints what it was given, and pickles it for jobs.
    sys.argv = [sys.argv[0], *map(veil, sys.argv[1:])]
    sys.excepthook = _bug
    see = "see `doremi-train --help` for the keys and groups that exist"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
            command.task
        )()
    except (HydraException, OmegaConfBaseException) as error:
        command.die(f"{error}{_of_names(error)}\n{see}", 2)
    except Exception as error:
        if hasattr(error, "exit_code"):  # of a sweep's job in another process
            command.die(str(error), error.exit_code)
        # Such a job was killed, or could not be submitted.
        if type(error).__module__.startswith("submitit."):
            command.die(str(error), 1)
        if not hasattr(error, "begun"):  # Hydra fails in more ways than it has errors for
            said = " ".join(f"{type(error).__name__}: {error}".split())
            command.die(f"Hydra refuses the command: {said:.400}; {see}", 2)
        raise


def _speak_utf8() -> None:
    """Begin anew where names of files, the command line and texts would be taken for another
    encoding, as under a Latin-1 locale; what is printed stays in the terminal's own."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        own = f"{locale.getencoding()}:backslashreplace"
        os.environ.setdefault("PYTHONIOENCODING", own)
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as all else is printed."""
    from doremi_train import console

    whole = "".join(traceback.format_exception(kind, error, trace))
    console.say(*whole.splitlines(), error=True)


def _of_names(error: Exception) -> str:
    """How to write a mapping by names that Hydra's grammar does not take as they are."""
    given = str(getattr(error, "override", None) or error)
    for key in MAPPINGS:
        if f"{key}=" in given:
            return (
                "\nin names write \\( \\) \\, \\: for ( ) , : and quote what is no word; or "
                f'give {key}=FILE.json or FILE.yaml, of {{"NAME": VALUE}}, where any name may stand'
            )
    return ""


class SweepReport(Callback):
    """What Hydra calls around a sweep: when all its runs are done, the report over them is
    written."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        if config.stage != "pipeline":
            return
        plain: Any = OmegaConf.to_container(config, resolve=False)
        del plain["hydra"]
        try:
            command.run(plain | {"stage": "report"})
        except Exception as error:  # Hydra would swallow it
            command.say(f"the report over {plain['run_dir']}: {error}")


if __name__ == "__main__":
    main()
