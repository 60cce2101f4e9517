"""What a run trains on where it makes a choice itself: the data options with the choice in them."""

from dataclasses import replace

from doremi_train.config import UserError
from doremi_train.data import options as data_options
from doremi_train.data.instructions import Picked
from doremi_train.data.options import DataOptions
from doremi_train.stages import choice
from doremi_train.stages.choice import less, less_choice, target_files
from doremi_train.stages.session import Session


def data(session: Session) -> DataOptions:
    """The data options of this run: with its own selection, where it makes one."""
    options = session.config.data
    if session.config.selection.method == "none":
        return options
    if session.config.selection.method == "less":
        raise UserError(
            "selection=less: chooses examples for stage=finetune, and "
            f"stage={session.config.stage} reads text; take another selection"
        )
    if options.selection is not None:
        raise UserError(
            f"data.selection={options.selection}: this run selects by itself (selection.method="
            f"{session.config.selection.method}); remove one of them"
        )
    target = target_files.trained(session)  # wrong before the work, and not after it
    return replace(options, selection=str(choice.run(session) / target / "sidecar.parquet"))


def examples(session: Session) -> tuple[Session, Picked | None]:
    """(the same with a choice as its data, for stage=finetune; where its examples are in the pool);
    with selection=none as it is."""
    options = session.config.selection
    if options.method == "none":
        return session, None
    if options.method != "less":
        raise UserError(
            f"selection={options.method}: chooses documents, and stage=finetune reads examples; "
            f"take selection=less selection.less.train_on={options.method}"
        )
    target = target_files.trained(session)
    assert options.targets is not None
    folder = choice.run(session) / target
    chosen = folder / f"{options.less.train_on}.jsonl"
    split = data_options.Split((str(chosen),), options.less.test or options.targets[target])
    where = replace(
        session.config.data,
        embedded=None,
        root=None,
        files=None,
        domain_key=None,
        domains={target: split},
    )
    trained = replace(session, config=replace(session.config, data=where))
    return trained, less_choice.picked(folder, options.less.train_on, less.pool(session))
