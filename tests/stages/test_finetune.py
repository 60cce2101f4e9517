"""Supervised fine-tuning: what carries a loss, and that the one training loop does the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from helpers import models
from helpers.command import Command
from helpers.corpus import words
from helpers.processes import lines
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from doremi_train.config import UserError
from doremi_train.data import instructions
from doremi_train.data.chat import Encoder, Example, coded, padded
from doremi_train.data.instructions import Instructions, Picked
from doremi_train.data.options import DataOptions, Split
from doremi_train.data.tokens import tokenizer
from doremi_train.gradients import capture, products
from doremi_train.model import configs, folders, language_model, lora
from doremi_train.model.configs import ModelOptions
from doremi_train.model.lora import LoraOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """The answer is the question's last word three times: quickly learned."""
    stream = words(seed, "abcdefgh", 40)
    found = []
    for _ in range(count):
        question = [next(stream) for _ in range(5)]
        found.append(
            {"prompt": " ".join(question) + " ?", "completion": " ".join(question[-1:] * 3)}
        )
    return found


def chat(pair: dict[str, Any]) -> dict[str, Any]:
    """The same as messages."""
    said = {"user": pair["prompt"], "assistant": pair["completion"]}
    return {"messages": [{"role": role, "content": content} for role, content in said.items()]}


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    return path


def save_model(folder: Path, name: str = "tiny") -> Path:
    """A model of this project, initialised, as a run writes it."""
    spoken = tokenizer.learn([f"{one['prompt']} {one['completion']}" for one in pairs(1, 200)], 300)
    shape = configs.resolve(
        ModelOptions(**configs.preset(name, "model")), tokenizer.vocabulary_size(spoken), 0, 64
    )
    built = folders.build(shape, 0)
    folders.save(built, dict(built.named_parameters()), folder, spoken, 0)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, one of prompts and one of messages."""
    root = tmp_path_factory.mktemp("asked")
    write(root / "pairs" / "train.jsonl.zst", pairs(2, 120))
    write(root / "pairs" / "validation.jsonl", pairs(3, 12))
    for split, seed, count in (("train", 4, 60), ("validation", 5, 12)):
        write(root / "chats" / f"{split}.jsonl", [chat(one) for one in pairs(seed, count)])
    return root


@pytest.fixture
def tuning(base: Path, asked: Path, tmp_path: Path) -> list[str]:
    return [
        "stage=finetune", f"finetune.model={base}", f"data.root={asked}",
        f"run_dir={tmp_path / 'run'}",
        "finetune.lora.rank=4", "training.sequence_length=64", "training.batch_size=8",
        "training.steps=12", "training.learning_rate=0.01", "training.log_every=4",
        "training.threads=1", "evaluation.sequences=6", "evaluation.every=6",
        "training.checkpoint_every=4",
    ]  # fmt: skip


def result(run_dir: Path) -> Any:
    return json.loads((run_dir / "finetune" / "result.json").read_text())


# ── One example ─────────────────────────────────────────────────────────────────────


def shown(encoder: Encoder, example: Example) -> tuple[str, str]:
    """The text of the tokens that carry no loss, and of those that do."""
    return tuple(
        encoder.tokenizer.decode(example.ids[example.carries == carries].tolist())
        for carries in (False, True)
    )  # type: ignore[return-value]


def test_the_completion_and_its_end_alone_carry_a_loss(base: Path) -> None:
    encoder = Encoder(str(base), "finetune.model")
    example = encoder.encode({"prompt": "ab cd<|endoftext|> ?", "completion": " ef"}, "here")
    assert shown(encoder, example) == ("ab cd<|endoftext|> ?", " ef<|endoftext|>")
    assert example.ids.tolist().count(encoder.end) == 1  # what is written in a prompt is text
    alone = encoder.encode({"prompt": "", "completion": "ef"}, "here")
    # Nothing comes before the first.
    assert alone.carries.tolist() == [
        False,
        *[True] * (len(alone.ids) - 1),
    ]


def test_of_messages_the_answers_carry_a_loss(base: Path) -> None:
    encoder = Encoder(str(base), "finetune.model")
    talk = [
        ("system", "be brief"),
        ("user", "ab"),
        ("assistant", "cd"),
        ("user", "ef"),
        ("assistant", "gh"),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    plain = shown(encoder, encoder.encode({"messages": messages}, "here"))
    assert (
        plain[0]
        == "<|system|>\nbe brief\n<|user|>\nab\n<|assistant|>\n\n<|user|>\nef\n<|assistant|>\n"
    )
    assert plain[1] == "cd<|endoftext|>gh<|endoftext|>"
    encoder.tokenizer.chat_template = CHATML
    example = encoder.encode({"messages": messages}, "here")
    assert shown(encoder, example)[1] == "cd<|im_end|>\ngh<|im_end|>\n"
    whole = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoder.tokenizer.decode(example.ids.tolist()) == whole


def test_a_template_that_rewrites_answers_is_refused(base: Path) -> None:
    encoder = Encoder(str(base), "finetune.model")
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m.role }}{% if loop.last %}!{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    messages = [
        {"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")
    ]
    with pytest.raises(UserError, match="message 2.*an example of its own"):
        encoder.encode({"messages": messages}, "here")


THINKING = (  # opens the answer in the prompt, and strips reasoning from answers
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}"
    "{% else %}<a>{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a><think>\n{% endif %}"
)


def talk(*said: str, **more: str) -> dict[str, Any]:
    """A question, its answer, and so on; `more` fields of the last message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(said)]
    messages[-1] |= more
    return {"messages": messages}


@pytest.mark.parametrize(
    ("record", "answers", "told"),
    [
        (talk("ab", "cd"), "cd<|endoftext|>", {"opened": 1}),
        (talk("ab", "<b>cd"), "<b>cd<|endoftext|>", {"opened": 1}),  # begins as the opening does
        (talk("ab", "cd", "ef", "gh"), "cd<|endoftext|>gh<|endoftext|>", {"opened": 2}),
        (
            talk("ab", "<think>\nno\n</think>cd"),
            "cd<|endoftext|>",
            {"opened": 1, "parts_left_out": 1},
        ),
        (
            talk("cd no", "cd", reasoning_content="no"),
            "cd<|endoftext|>",
            {"opened": 1, "parts_left_out": 1},
        ),
    ],
)
def test_an_answer_follows_the_common_beginning_and_what_it_lacks_is_said(
    record: dict[str, Any], answers: str, told: dict[str, int], base: Path
) -> None:
    encoder = Encoder(str(base), "finetune.model")
    encoder.tokenizer.chat_template = THINKING
    encoded = encoder.encoded(record, "here")
    assert shown(encoder, encoded.example)[1] == answers and encoded.told == told
    whole = encoder.tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert encoder.tokenizer.decode(encoded.example.ids.tolist()) == whole


def test_reasoning_that_the_prompt_opens_or_the_template_lays_out_anew_is_not_left_out(
    base: Path,
) -> None:
    encoder = Encoder(str(base), "finetune.model")
    encoder.tokenizer.chat_template = THINKING.replace(
        "m.content.split('</think>')[-1]", "m.content.replace('</think>', ' </think> ')"
    )
    encoded = encoder.encoded(talk("ab", "<think>\nno</think>cd"), "here")
    assert shown(encoder, encoded.example)[1] == "no </think> cd<|endoftext|>"
    assert not encoded.told


def test_answers_that_nothing_ends_are_said(base: Path, tmp_path: Path) -> None:
    encoder = Encoder(str(base), "finetune.model")
    encoder.tokenizer.chat_template = THINKING.replace("<|endoftext|>", "<|end|>").replace(
        "<think>\n", ""
    )
    assert encoder.encoded(talk("ab", "cd", "ef", "gh"), "here").told == {"without_end": 2}
    assert not encoder.encoded({"prompt": "ab", "completion": "cd"}, "here").told
    # Which tokens end what is generated, the model's generation_config.json says too.
    shutil.copytree(base, tmp_path / "model")
    own = encoder.tokenizer(" d", add_special_tokens=False).input_ids[-1]
    (tmp_path / "model" / "generation_config.json").write_text(f'{{"eos_token_id": [{own}]}}')
    other = Encoder(str(tmp_path / "model"), "finetune.model")
    other.tokenizer.chat_template = "{% for m in messages %}<a> {{ m.content }}{% endfor %}"
    assert not other.encoded(talk("ab", "d"), "here").told


def test_what_a_template_leaves_out_is_said_once_with_its_count(
    base: Path, tuning: list[str], command: Command, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(THINKING)
    outcome = command(*tuning, f"finetune.model={tmp_path / 'model'}", "training.steps=2")
    assert outcome.code == 0, outcome
    assert "opens 72 answers with a text" in outcome.out and "a part of" not in outcome.out
    assert result(tmp_path / "run")["data"]["told"]["opened"]["answers"] == 72


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_lora_on_a_tied_weight_is_refused(target: str) -> None:
    tied = models.build("gpt2").float()
    with pytest.raises(UserError, match=rf"{target} has its weight in common with .*rank=null"):
        lora.add(tied, LoraOptions(targets=(target,)), 0, "finetune.lora")


@pytest.mark.parametrize("targets", [None, ("lm_head", "embed_tokens", "q_proj")])
def test_merged_adapters_are_the_model_that_was_trained(targets: tuple[str, ...] | None) -> None:
    inner = models.build("llama", tie_word_embeddings=False).float().eval()
    adapters = lora.add(inner, LoraOptions(rank=2, targets=targets), 0, "finetune.lora")
    for name, parameter in adapters.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        trained = inner(tokens).logits
        torch.testing.assert_close(adapters.merge_and_unload()(tokens).logits, trained)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, "give either prompt and completion, or messages; the keys there: text"),
        ({"prompt": "a"}, "completion must be text, not None"),
        ({"prompt": 1, "completion": "b"}, "prompt must be text, not 1"),
        (
            {"prompt": "a", "completion": "b", "messages": []},
            "give either prompt and completion, or messages",
        ),
        ({"messages": []}, "messages must be a list of role and content"),
        ({"messages": [{"role": "user"}]}, "message 1: needs role and content"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "allowed: system, user, assistant"),
        ([1], "a JSON object is needed"),
    ],
)
def test_a_malformed_record_is_named(record: Any, said: str, base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mine" / "train.jsonl", [*pairs(6, 3), record])
    with pytest.raises(UserError) as error:
        prepared(base, file, tmp_path / "store")
    assert f"{file}, line 4" in str(error.value) and said in str(error.value)


def test_a_file_of_another_kind_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("ab")
    with pytest.raises(UserError, match=r"not a file of JSON lines.*allowed are \.jsonl"):
        prepared(base, tmp_path / "mine" / "train.txt", tmp_path / "store")


def prepared(base: Path, file: Path, store: Path, held_out: float = 0.03) -> Instructions:
    where = DataOptions(embedded=None, root=str(file.parents[1]), validation_fraction=held_out)
    return Instructions(
        instructions.prepare(where, Encoder(str(base), "finetune.model"), 48, store)
    )


def test_what_has_no_loss_and_what_is_held_out_is_left_out_and_said(
    base: Path, tmp_path: Path
) -> None:
    held = pairs(7, 4)
    empty = {"prompt": "ab", "completion": ""}
    long = {"prompt": "ab " * 60, "completion": "cd"}
    unanswered = {"messages": [{"role": "user", "content": "ab"}]}
    file = write(
        tmp_path / "mine" / "train.jsonl", [empty, *pairs(8, 5), long, held[1], unanswered]
    )
    write(tmp_path / "mine" / "validation.jsonl", held)
    data = prepared(base, file, tmp_path.parent / "store")
    assert data.sequences("train", 48).tolist() == [5] and data.sequences(
        "validation", 48
    ).tolist() == [4]
    assert (
        data.manifest["without_loss"]["examples"] == 3 and data.manifest["also_in_validation"] == 1
    )
    named = [place.rpartition(" ")[2] for place in data.manifest["without_loss"]["first"]]
    assert named == ["1", "7", "9"]
    assert data.place("train", 0, 0) == (str(file), 2)
    rows = data.gather("train", np.zeros(5, int), np.arange(5), 48)
    assert (
        data.carrying("train", np.zeros(5, int), np.arange(5), 48).tolist()
        == (rows[:, 1:] >= 0).sum(1).tolist()
    )


def test_examples_picked_from_a_pool_are_those_of_a_file_of_their_records(
    base: Path, tmp_path: Path
) -> None:
    """Also where they are cut, or held out too; tokens of another length are read anew."""
    encoder, held = Encoder(str(base), "finetune.model"), pairs(7, 4)
    long = {"prompt": "ab cd ", "completion": "ef " * 60}
    records = [*pairs(8, 5), {"prompt": "ab", "completion": ""}, long, held[1]]
    write(tmp_path / "held.jsonl", held)
    write(tmp_path / "other.jsonl", pairs(9, 1))

    def where(file: str, held_out: str) -> DataOptions:
        split = Split((f"{tmp_path}/{file}",), (f"{tmp_path}/{held_out}",))
        return DataOptions(embedded=None, domains={"mine": split})

    write(tmp_path / "pool.jsonl", records)
    options = where("pool.jsonl", "other.jsonl")
    plain = instructions.prepare(options, encoder, 48, tmp_path / "store")
    made = {path.name: path.read_bytes() for path in plain.iterdir()}
    # A pool that was prepared without its records has them from now on, at the same address.
    assert plain == instructions.prepare(
        options, encoder, 48, tmp_path / "store", keep_records=True
    )
    assert made.items() < {path.name: path.read_bytes() for path in plain.iterdir()}.items()
    pool = Instructions(plain)
    kept = [json.loads(record) for record in pool.records()]
    assert kept == [one for one in records if one["completion"]]
    numbers = [6, 0, 5, 3]
    write(tmp_path / "picked.jsonl", [kept[number] for number in numbers])
    for length in (48, 40):
        given = (where("picked.jsonl", "held.jsonl"), encoder, length)
        one = instructions.prepare(*given, tmp_path / "one")
        two = instructions.prepare(*given, tmp_path / "two", picked=Picked(pool, numbers))
        assert Instructions(one).manifest["cut"] >= 1
        assert Instructions(one).manifest["also_in_validation"] == 1
        assert one.name == two.name
        for path in one.iterdir():
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_without_validation_files_the_same_examples_are_held_out_whatever_their_order(
    base: Path, tmp_path: Path
) -> None:
    def held(records: list[Any], name: str) -> set[bytes]:
        file = write(tmp_path / name / "mine" / "train.jsonl", records)
        data = prepared(base, file, tmp_path / name / "store", held_out=0.2)
        return {
            data.example("validation", 0, n).ids.tobytes()
            for n in range(data.sequences("validation", 48)[0])
        }

    records = pairs(9, 60)
    assert held(records, "one") == held([*records[::-1], records[0]], "two")


# ── The loss and its gradient ───────────────────────────────────────────────────────


def batch(base: Path) -> tuple[Tensor, list[tuple[list[int], list[bool]]]]:
    encoder = Encoder(str(base), "finetune.model")
    found = [encoder.encode(one, "here") for one in pairs(10, 5)]
    rows = padded([coded(one, 48) for one in found])
    return torch.from_numpy(rows), [(one.ids.tolist(), one.carries.tolist()) for one in found]


def test_losses_are_those_of_completions_alone(base: Path) -> None:
    tokens, examples = batch(base)
    inner = folders.read(base, "finetune.model")
    losses = language_model.CompletionModel(inner)(tokens).detach()
    for row, (ids, carries) in zip(losses, examples, strict=True):
        logits = inner(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = [
            -float(logits[t, ids[t + 1]]) if carries[t + 1] else 0.0 for t in range(len(ids) - 1)
        ]
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not row[len(expected) :].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_examples_through_lora_are_autograd_s(base: Path, dropout: float) -> None:
    """Masks, LoRA's scale and its dropout: what GREATS scores by is what training would do."""
    inner = folders.read(base, "finetune.model")
    lora.add(inner, LoraOptions(rank=3, alpha=7.0, dropout=dropout), 0, "finetune.lora")
    built = language_model.CompletionModel(inner.double())
    named = {name: p for name, p in built.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for parameter in named.values():  # LoRA begins with B = 0
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
        )
    tokens, _ = batch(base)

    def losses() -> Tensor:
        torch.manual_seed(1)
        return built(tokens)

    examples = capture.capture(
        built, losses, (len(tokens), tokens.shape[1] - 1), verify=True
    ).examples
    rows = []
    for row in losses():
        parts = torch.autograd.grad(row.sum(), list(named.values()), retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    expected = torch.stack(rows)
    torch.testing.assert_close(products.gram(examples), expected @ expected.T, rtol=1e-5, atol=1e-6)


# ── The command ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tuned(
    base: Path, asked: Path, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of the overrides of `tuning`."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    own = tuning.__wrapped__(base, asked, run_dir.parent)  # type: ignore[attr-defined]
    outcome = command(*own)
    assert outcome.code == 0, outcome
    return run_dir


def test_it_learns_and_writes_what_transformers_and_peft_load(tuned: Path, base: Path) -> None:
    from peft import PeftModel

    found = result(tuned)
    assert found["evaluation"]["mean_loss"] < found["before"]["mean_loss"] - 0.2
    assert found["data"]["examples"]["pairs"] == {"train": 120, "validation": 12}
    merged = AutoModelForCausalLM.from_pretrained(tuned / "finetune" / "model")
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(20)[None]
    before = plain(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(plain, str(tuned / "finetune" / "adapter"))
    torch.testing.assert_close(
        merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    assert float((merged(input_ids=ids).logits - before).abs().max()) > 0.01
    assert AutoTokenizer.from_pretrained(tuned / "finetune" / "model")("ab").input_ids
    names = [name for name, _ in adapted.named_parameters() if "lora" in name]
    assert names and not any("lm_head" in name or "embed" in name for name in names)


def test_a_second_command_finds_it_done(tuned: Path, tuning: list[str], command: Command) -> None:
    outcome = command(*tuning, f"store={tuned / 'store'}")
    assert outcome.code == 0 and "in the store already" in outcome.out


def test_a_stopped_run_continues_with_the_same_bits(
    tuned: Path,
    tuning: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from doremi_train.storage import checkpoint
    from doremi_train.storage.runs import stop
    from doremi_train.training.step import Step, Taken
    from doremi_train.training.task import Position

    really = Step.take

    def take(self: Step, position: Position) -> Taken:
        stop.requested = position.step == 6
        return really(self, position)

    monkeypatch.setattr(Step, "take", take)
    assert command(*tuning).code == 75
    path = checkpoint.paths(tmp_path / "run" / "finetune" / "checkpoints")[-1]
    assert all("lora" in name for name in checkpoint.read(path).shapes if "values/" not in name)
    # What a kill leaves of a model that is being saved: peft reads the README that it finds.
    run = (tmp_path / "run" / "finetune").resolve()
    for name in ("adapter/README.md", "model/model-00001-of-00002.safetensors"):
        (run / name).parent.mkdir()
        (run / name).touch()
    assert command(*tuning).code == 0
    written = [path for path in run.glob("*/*") if path.is_file()]
    names = {path.relative_to(run).as_posix() for path in written}
    assert names >= {"model/model.safetensors", "adapter/adapter_model.safetensors"}
    for name in (*names, "evaluations.jsonl"):
        assert (run / name).read_bytes() == (tuned / "finetune" / name).read_bytes(), name


def same_numbers(one: Path, two: Path) -> None:
    for name in ("metrics", "evaluations"):
        loss = "loss" if name == "metrics" else "mean_loss"
        for a, b in zip(
            *(lines(run / "finetune" / f"{name}.jsonl") for run in (one, two)), strict=True
        ):
            assert a["step"] == b["step"] and a[loss] == pytest.approx(b[loss], abs=1e-4)


def test_micro_batches_change_nothing(
    tuned: Path, tuning: list[str], command: Command, tmp_path: Path
) -> None:
    assert command(*tuning, "training.micro_batch_size=3").code == 0
    same_numbers(tuned, tmp_path / "run")


@pytest.mark.acceptance
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_give_the_numbers_of_one(
    engine: str, tuned: Path, tuning: list[str], doremi: Command, tmp_path: Path
) -> None:
    """Sharded too, where adapters and what is frozen around them are in parts."""
    outcome = doremi(*tuning, f"engine={engine}", processes=2)
    assert outcome.code == 0, outcome.err
    assert f"{engine}, 2 processes" in result(tmp_path / "run")["engine"]
    same_numbers(tuned, tmp_path / "run")
    one, two = (
        load_file(run / "finetune/adapter/adapter_model.safetensors")
        for run in (tuned, tmp_path / "run")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


WHOLE = ("finetune.lora.rank=null", "training.learning_rate=0.003")


@pytest.fixture(scope="module")
def whole(
    base: Path, asked: Path, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    own = tuning.__wrapped__(base, asked, run_dir.parent)  # type: ignore[attr-defined]
    outcome = command(*own, *WHOLE)
    assert outcome.code == 0, outcome
    return run_dir


def test_all_parameters_are_trained_without_lora(whole: Path, base: Path) -> None:
    found = result(whole)
    assert found["evaluation"]["mean_loss"] < found["before"]["mean_loss"] - 0.2
    assert not (whole / "finetune" / "adapter").exists()
    model = whole / "finetune" / "model"
    assert AutoTokenizer.from_pretrained(model).get_vocab() == (
        AutoTokenizer.from_pretrained(base).get_vocab()
    )
    trained, before = (AutoModelForCausalLM.from_pretrained(f) for f in (model, base))
    for one, other in zip(trained.parameters(), before.parameters(), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.acceptance
def test_all_parameters_are_saved_from_where_they_are_divided(
    whole: Path, tuning: list[str], doremi: Command, tmp_path: Path
) -> None:
    outcome = doremi(*tuning, *WHOLE, "engine=zero3", processes=2)
    assert outcome.code == 0, outcome.err
    same_numbers(whole, tmp_path / "run")
    one, two = (
        load_file(run / "finetune/model/model.safetensors") for run in (whole, tmp_path / "run")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)


SELECTING = (
    "batch_selection=greats", "batch_selection.candidates=16", "batch_selection.verify=true",
    "batch_selection.validation_sequences=6", "evaluation.sequences=4", "training.steps=6",
)  # fmt: skip


def same_picks(one: Path, two: Path) -> None:
    same_numbers(one, two)
    for a, b in zip(
        *(lines(run / "finetune" / "batch_selection.jsonl") for run in (one, two)), strict=True
    ):
        assert (a["picked"], a["highest"]["sequence"]) == (b["picked"], b["highest"]["sequence"])
        assert a["highest"]["score"] == pytest.approx(b["highest"]["score"], rel=1e-3)


@pytest.fixture(scope="module")
def selected(
    base: Path, asked: Path, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("selected") / "run"
    own = tuning.__wrapped__(base, asked, run_dir.parent)  # type: ignore[attr-defined]
    outcome = command(*own, *SELECTING)
    assert outcome.code == 0, outcome
    assert "greats picks 8 of 16, one pass" in result(run_dir)["engine"]
    return run_dir


@pytest.mark.slow
def test_two_passes_pick_the_same(
    selected: Path, tuning: list[str], command: Command, tmp_path: Path
) -> None:
    assert command(*tuning, *SELECTING, "training.micro_batch_size=5").code == 0
    assert "two passes" in result(tmp_path / "run")["engine"]
    same_picks(selected, tmp_path / "run")


@pytest.mark.acceptance
def test_two_processes_pick_the_same(
    selected: Path, tuning: list[str], doremi: Command, tmp_path: Path
) -> None:
    outcome = doremi(*tuning, *SELECTING, processes=2)
    assert outcome.code == 0, outcome.err
    same_picks(selected, tmp_path / "run")


@pytest.mark.parametrize("policy", ["max_loss", "grad_norm"])
def test_other_policies_train(
    policy: str, tuning: list[str], command: Command, tmp_path: Path
) -> None:
    assert (
        command(*tuning, *SELECTING[1:], f"batch_selection={policy}", "training.steps=2").code == 0
    )
    for line in lines(tmp_path / "run" / "finetune" / "batch_selection.jsonl"):
        assert (
            sum(line["picked"].values()) == 8
            and line["highest"]["score"] >= line["lowest"]["score"]
        )


def test_a_given_target_is_of_examples_and_not_evaluated(
    tuning: list[str], command: Command, asked: Path, tmp_path: Path
) -> None:
    chosen = [
        *tuning,
        "batch_selection=topk",
        "batch_selection.validation_sequences=6",
        "training.steps=2",
    ]
    own = write(tmp_path / "target.jsonl", pairs(11, 6))
    assert command(*chosen, f"batch_selection.validation=[{own}]").code == 0
    reported = asked / "pairs" / "validation.jsonl"
    more = [f"run_dir={tmp_path / 'two'}", f"batch_selection.validation=[{reported}]"]
    outcome = command(*chosen, *more)
    assert outcome.code == 2 and "shares examples with the reported evaluation" in outcome.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.model=null", "give a local transformers folder"),
        ("finetune.model=/nowhere", "finetune.model=/nowhere: has no tokeniser"),
        ("finetune.lora.targets=[nothing]", "this model's layers end in"),
        ("training.sequence_length=4000", "positions; shorten it"),
    ],
)
def test_a_mistake_is_named(override: str, said: str, tuning: list[str], command: Command) -> None:
    outcome = command(*tuning, override)
    assert outcome.code == 2 and said in outcome.err, outcome


def test_weights_that_are_a_pickle_are_refused(
    base: Path, tuning: list[str], command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    outcome = command(*tuning, f"finetune.model={folder}")
    assert outcome.code == 2 and "only safetensors" in outcome.err
