"""The choice of documents or of examples that a run trains on, by whichever method was asked for."""

from pathlib import Path

from doremi_train import comm
from doremi_train.config import UserError
from doremi_train.runs import Run
from doremi_train.stages import Session, once, select_report
from doremi_train.stages.choice import documents


@once
def run(session: Session) -> Path:
    """The folder of the choices, one for every target.

    Raises UserError for everything wrong with targets, budgets and sources.
    """
    if session.config.selection.method == "none":
        raise UserError("selection=none: nothing to select; give selection=ngram selection.targets={NAME: [FILES]}")
    if session.config.selection.method == "less":
        from doremi_train.stages.choice import less

        return less.run(session)
    recipe = comm.on_first(lambda: documents.recipe(session))
    choice = Run(session.store, "selection", recipe)
    with session.computing(choice, "select") as todo:
        if todo:
            comm.on_first(lambda: choice.finish(documents.select(session, choice.folder, recipe)))
    if session.config.stage == "select":
        page = session.run_dir / "select" / "report.html"
        comm.on_first(lambda: select_report.write(page, choice.folder, session.config.selection.vocabulary))
        session.say(f"{documents.summary(choice.result(), choice.folder)}\nreport: {page}")
    return choice.folder
