"""What is fine-tuned: the examples, tokenised, and the model as it is before the first step."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from doremi_train.config import UserError
from doremi_train.data import instructions
from doremi_train.data.chat import TOLD, Encoder
from doremi_train.data.instructions import Instructions, Picked
from doremi_train.model import folders, lora
from doremi_train.parallel import comm
from doremi_train.stages.session import Session
from doremi_train.storage.runs import stop


class Built(NamedTuple):
    inner: Any  # the transformers model, with adapters in it where there are any
    adapters: Any  # peft's view of them


def prepared(
    session: Session,
    encoder: Encoder,
    keep_records: bool = False,
    picked: Picked | None = None,
) -> Instructions:
    """The examples; tokenised on the first process, opened on all. The rest as in
    `instructions.prepare`."""
    length = session.config.training.sequence_length

    def make() -> Path:
        check = partial(stop.check, "finetune")
        return instructions.prepare(
            session.config.data,
            encoder,
            length,
            session.store / "data",
            check,
            keep_records,
            picked,
        )

    data = Instructions(comm.on_first(make))
    counts, empty = data.manifest["examples"], data.manifest["without_loss"]
    total = {
        split: sum(count[split] for count in counts.values()) for split in ("train", "validation")
    }
    such = f", such as {empty['first'][0]}" if empty["examples"] else ""
    session.say(
        f"examples               {total['train']} to train on, {total['validation']} held out, "
        f"{data.manifest['cut']} of them cut to {length + 1} tokens; left out: "
        f"{data.manifest['also_in_validation']} that are held out too, "
        f"{empty['examples']} without a token that carries a loss{such}"
    )
    for what, of in data.manifest.get("told", {}).items():
        place = f" (the first: {of['first']})"
        session.say(f"examples               {TOLD[what].format(count=of['answers'], place=place)}")
    return data


def build(session: Session) -> Built:
    """The model as it is before the first step."""
    inner, options = (
        folders.read(Path(model_folder(session)), "finetune.model"),
        session.config.finetune.lora,
    )
    if options.rank is None:
        return Built(inner, None)
    return Built(inner, lora.add(inner, options, session.config.seed, "finetune.lora"))


def model_folder(session: Session) -> str:
    folder = session.config.finetune.model
    if folder is None:
        raise UserError(
            "finetune.model: missing; give a local transformers folder, or a model folder of an "
            "earlier run such as runs/mine/main/model"
        )
    return folder
