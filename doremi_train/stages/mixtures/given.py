"""Weights that train nothing: given in the command, in a file of ours or of another trainer, or
computed from sizes."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from doremi_train import mixture
from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.exports import convert, formats
from doremi_train.mixture import Mixture
from doremi_train.stages import prepare
from doremi_train.stages.runs import budget, targets
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.runs.budget import main_steps
from doremi_train.stages.session import Session


class Given(NamedTuple):
    """A way that trains nothing."""

    HOW: str

    def run(self, session: Session) -> Mixture:
        """The mixture, from the command, a file or sizes."""
        return given(session, prepare.run(session))

    def ahead(self, session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor:
        """Nothing is run; the mixture (K,)."""
        return given(session, store).tensor(store.domains)


file = Given("The weights are given, in the command, in a weights.json or in a trainer's file.")
natural = Given("Weights in proportion to the sizes of the domains.")
uniform = Given("The same weight for every domain, whatever its size.")
temperature = Given("Weights in proportion to size^(1/τ).")
unimax = Given(
    "The same number of tokens of every domain, but none repeated for more than "
    "`mixture.max_epochs`."
)
target = Given(
    "Nothing but the domains that the objective is for, in its shares, as far as "
    "`mixture.max_epochs` allows; what is left is of the others, by their sizes."
)


def given(session: Session, store: TokenStore) -> Mixture:
    """The weights of the command, of a file, or those that sizes make."""
    options = session.config.mixture
    if options.weights is not None:
        weights = mixture.checked(
            options.weights, store.domains, "mixture.weights", options.normalize
        )
        return Mixture("file", weights)
    if options.path is not None and options.format is not None:
        return imported(session, store, Path(options.path), options.format)
    if options.path is not None:
        return mixture.load(Path(options.path), store.domains, options.normalize)
    if options.method == "target":
        return Mixture("target", store.named(_alone(session, store)))
    sized = budget.heuristic(session, store, options.method, main_steps(session))
    return Mixture(options.method, store.named(sized))


def _alone(session: Session, store: TokenStore) -> Tensor:
    alone = targets.alone(session, store, budget.caps(session, store, 0.0, ""))
    if alone is None:
        raise UserError(
            "mixture=target: the objective is for no domain more than for others; name some with "
            "objective=target 'target.domains=[…]', or weigh them in objective.metrics"
        )
    return alone


def imported(session: Session, store: TokenStore, path: Path, form: str) -> Mixture:
    """The mixture of a file that was written for a trainer."""
    where = f"mixture.path={path}"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    drawn = convert.read(form, text, store.domains, session.config.export.paths or {}, where)
    drawn = mixture.checked(drawn, store.domains, where, normalize=True)
    return Mixture("file", convert.weights(drawn, tokens_per_document(session, store, form)))


def tokens_per_document(
    session: Session, store: TokenStore | None, form: str
) -> dict[str, float] | None:
    """The mean of each domain; None where the trainer draws sequences, whose weights need none.
    Raises UserError where it is needed, and there is no store that knows it."""
    if (session.config.export.unit or formats.FORMATS[form].draws) == "sequences":
        return None
    if store is None:
        raise UserError(
            f"export.to={form}: draws documents, and how long those of each domain are is not "
            "known without the data; give export.unit=sequences if all are of one length, or "
            "stage=export mixture=file mixture.path=weights.json with data.*"
        )
    return store.named(store.sizes("train") / store.documents("train"))
