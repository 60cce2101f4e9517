"""Costs of a run: FLOPs and memory counted from shapes, and the time of a micro-step, measured.

F is one forward of a model; its backward is 2 F. A step of a language model costs 3 F, a proxy's
with a live reference 4 F, and 5 F where `exact` accumulation does every forward twice.
Recomputation comes on top: of the layers under activation checkpointing, of the output projection
where it is fused with the loss. Attention counts all T × T pairs.

B sequences of a micro-batch, T tokens, V vocabulary, d hidden size, f width of the MLP.
"""

import functools
import gc
import json
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from doremi_train.model import configs, folders, language_model

_SECONDS = 0.5  # spent on repeating a micro-step
_REPETITIONS = 8
_CPU_FLOPS = 1e12  # of a micro-step that is still tried on a CPU: some ten seconds


class Shape(NamedTuple):
    """Sizes of a model that decide its cost."""

    parameters: int
    matrices: int  # weights that multiply a token inside the layers
    head: int  # those of the output projection, d V
    attention: int  # heads times their width, summed over layers
    layers: int
    hidden: int  # d
    inner: int  # f
    vocabulary: int
    factors: int  # numbers that Adafactor keeps
    kind: str  # transformers' model_type
    # Parameters that are gathered together where they are divided (`language_model.groups`).
    block: int  # of the largest layer
    ends: int  # of the embedding or the output projection, whichever has more
    outside: int  # of all the rest, with tied embeddings: gathered from first to last


def shape(config: dict[str, Any]) -> Shape:
    """Shape of a complete transformers config of any kind; in a mixture of experts, those count
    that a token passes."""
    return _shape(json.dumps(config))


@functools.lru_cache(maxsize=64)  # a plan asks again for every run
def _shape(config: str) -> Shape:
    whole = configs.skeleton(json.loads(config))
    text = whole.config.get_text_config()
    output = whole.get_output_embeddings()
    head = output.weight.numel() if output is not None else 0
    aside = {id(m.weight) for m in whole.modules() if isinstance(m, nn.Embedding)} | {
        id(getattr(output, "weight", 0))
    }
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    used = (getattr(text, "num_experts_per_tok", None) or 1) / max(experts, 1)
    matrices = sum(
        p.numel() * (used if p.ndim == 3 and p.shape[0] == experts else 1)
        for p in whole.parameters()
        if p.ndim >= 2 and id(p) not in aside
    )
    layers, heads = text.num_hidden_layers, getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    ends, blocks = [0], [0]
    for group in language_model.groups(whole):
        to = ends if group[0] in (whole.get_input_embeddings(), output) else blocks
        to.append(sum(p.numel() for module in group for p in module.parameters()))
    every = sum(p.numel() for p in whole.parameters())
    return Shape(
        parameters=every,
        matrices=round(matrices),
        head=head,
        attention=layers * heads * width,
        layers=layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        factors=sum(
            p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()
            for p in whole.parameters()
        ),
        kind=text.model_type,
        block=max(blocks),
        ends=max(ends),
        outside=every - sum(blocks) - sum(ends),
    )


# ── FLOPs ───────────────────────────────────────────────────────────────────────────


def forward(of: Shape, length: int) -> int:
    """F: FLOPs of one forward, per token of sequences of `length`."""
    return 2 * (of.matrices + of.head) + 4 * length * of.attention


def backward(of: Shape, rows: int, length: int, checkpointing: bool, device: str = "cpu") -> int:
    """FLOPs of one backward with what it computes again, per token, in micro-batches of `rows`
    sequences. Of a layer that is computed again torch leaves out the last matrix where nothing
    follows it: up to 8 % less of a step."""
    layers = 2 * of.matrices + 4 * length * of.attention
    again = layers * checkpointing + 2 * of.head * language_model.fuses(
        rows * length, of.vocabulary, of.hidden, device
    )
    return 2 * forward(of, length) + again


# ── Memory ──────────────────────────────────────────────────────────────────────────


class Memory(NamedTuple):
    """Bytes on one process, where it computes, at the fullest moment. Activations, and what is
    gathered of parameters that are divided, are estimates; the rest is counted."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    gathered: int  # whole layers, or the rest, and their gradients, beside all of the others
    activations: int


def memory(
    of: Shape,
    *,
    strategy: str,
    processes: int,
    optimizer: str,
    rows: int,
    length: int,
    precision: str,
    checkpointing: bool,
    parts: int = 1,
    reference: int = 0,
    beside: Shape | None = None,
    device: str = "cpu",
) -> Memory:
    """Memory of a run in `parts` micro-batches of `rows` sequences a step, with so many parameters
    of a frozen reference, and what is gathered of it where it is divided and has the shape
    `beside`.

    `strategy` is an engine's: FSDP2 and ZeRO 3 divide all states among the processes, ZeRO 2 keeps
    whole parameters, ZeRO 1 also whole gradients; and ZeRO updates a copy of the parameters.
    """
    whole, moments = (
        4 * of.parameters,
        4 * (of.factors if optimizer == "adafactor" else 2 * of.parameters),
    )
    zero = int(strategy[-1]) if strategy.startswith("zero") else 0
    # Parameters, gradients, optimiser.
    divided = [strategy == "fsdp2" or zero >= least for least in (3, 2, 1)]
    states = [whole, whole, moments + whole * (zero > 0)]
    parameters, gradients, kept_states = (
        -(-state // processes) if cut else state for state, cut in zip(states, divided, strict=True)
    )
    activated = activations(of, rows, length, precision, checkpointing, device)
    gathered = 0
    if divided[0]:
        bare = of._replace(vocabulary=0)
        kept = activations(bare, rows, length, precision, checkpointing, device)  # less the logits
        before, layer, rest = gradients * (parts > 1), 4 * of.block, 8 * of.outside
        # Each with its gradient: the projection at the loss; a layer, while the next one comes and
        # the gradient of the last one goes; the embedding after all.
        fullest = max(
            before + activated + 8 * of.ends,
            before + kept + 4 * layer,
            gradients + kept // max(of.layers, 1) + 4 * layer,
            gradients + 8 * of.ends + layer,
        )
        gathered = max(0, fullest + rest - gradients - activated)
    if beside is not None:  # meanwhile the model keeps the projection, and what is in no layer
        meanwhile = 4 * (of.ends + of.outside) * divided[0]
        gathered = max(gathered, looked_at(beside) + meanwhile)
    return Memory(parameters, gradients, kept_states, 4 * reference, gathered, activated)


def looked_at(of: Shape) -> int:
    """Bytes that a forward without backward gathers of a divided model: a layer, or another group,
    and what it is made from, while what the last one was made from is still there."""
    layer, ends, rest = of.block, of.ends, of.outside
    return 4 * max(2 * rest + 2 * layer, rest + 3 * layer, rest + ends + 2 * layer, rest + 2 * ends)


def checkpoint(of: Shape, optimizer: str) -> int:
    """Bytes of a checkpoint, which has parameters and moments once whatever the engine, about: it
    has the state of the objective and of the data too."""
    return 4 * (of.parameters + (of.factors if optimizer == "adafactor" else 2 * of.parameters))


# Bytes that a layer keeps for its backward: for each token a d + b f, in fp32 and in bf16. Those of
# GPT-NeoX (with residuals one after the other) and Llama are what autograd keeps, counted
# (2026-11-30); other kinds are near the last.
_KEPT = {
    "gpt_neox": {"fp32": (44, 8), "bf16": (26, 4)},
    "llama": {"fp32": (40, 16), "bf16": (34, 8)},
}
_OTHER = {"fp32": (48, 16), "bf16": (36, 12)}


def activations(
    of: Shape, rows: int, length: int, precision: str, checkpointing: bool, device: str = "cpu"
) -> int:
    """The most bytes that a micro-batch needs beyond parameters and their gradients. Good to 10 %
    for GPT-NeoX and Llama on a CPU, beside the peak of torch's allocator; for others to a factor of
    about 1.5.

    All layers keep what their backward needs until the loss is known; where they are computed
    again, their input alone, and one at a time has the rest, and gradients of its MLP. In bf16
    autograd keeps a copy of every matrix. Beside them stand the logits that exist at once: their
    log-softmax and two gradients, in narrow models on a CPU tiles of them.
    """
    tokens, d, f = rows * length, of.hidden, of.inner
    for_d, for_f = _KEPT.get(of.kind, _OTHER)[precision]
    layer, half = tokens * (for_d * d + for_f * f), precision == "bf16"
    copies = 2 * (of.matrices + of.head) * half
    narrow = device == "cpu" and d <= language_model.NARROW_ON_CPU
    logits = (5 + 2 * half if narrow else 12) * language_model.logits_at_once(
        tokens, of.vocabulary, device
    )
    inputs = 4 * tokens * d * of.layers
    at_the_loss = (inputs if checkpointing else layer * of.layers) + copies + logits
    again = inputs + layer + 6 * tokens * f + 4 * d * f
    return max(at_the_loss + 8 * tokens * d, again * checkpointing)


# ── Time ────────────────────────────────────────────────────────────────────────────


class Pace(NamedTuple):
    """Seconds of a micro-batch on this process's device."""

    learn: float  # forward and backward
    look: float  # forward alone


def measure(
    config: dict[str, Any],
    rows: int,
    length: int,
    precision: str,
    checkpointing: bool,
    device: torch.device,
) -> Pace | str:
    """The pace of a micro-batch of `rows` sequences, from a few that are really computed; or why it
    was not measured.

    The bare model is taken, without engine and optimiser, so that every process can do this by
    itself. On a CPU fewer rows are tried where all would take too long. The random state stays as
    it was, and no memory is held.
    """
    of = shape(config)
    # Of one sequence.
    cost = length * (forward(of, length) + backward(of, rows, length, checkpointing, device.type))
    tried = rows
    if device.type == "cpu":
        tried = min(rows, int(_CPU_FLOPS / cost))
        if tried == 0:
            return f"one sequence is {cost:.1e} FLOPs, too many to try on a CPU"
    else:
        needed = 8 * of.parameters + activations(
            of, rows, length, precision, checkpointing, device.type
        )
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            return (
                f"the whole model needs about {needed / 1e9:.0f} GB and {free / 1e9:.0f} are free"
            )
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            pace = _try(config, tried, length, precision, checkpointing, device)
    except torch.OutOfMemoryError:
        return "the whole model does not fit into the memory that is free"
    finally:
        gc.collect()  # a model refers to itself
        if devices:
            torch.cuda.empty_cache()
    return Pace(*(seconds * rows / tried for seconds in pace))


def _try(
    config: dict[str, Any],
    rows: int,
    length: int,
    precision: str,
    checkpointing: bool,
    device: torch.device,
) -> Pace:
    built = folders.build(config, 0, checkpointing, precision).to(device).train()
    tokens = (
        torch.arange(rows * (length + 1), device=device).view(rows, length + 1)
        % config["vocab_size"]
    )

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    paces: list[Pace] = []
    start = clock()
    # The first one warms up; it counts only where a second one would take too long.
    while len(paces) <= _REPETITIONS and (not paces or clock() - start < _SECONDS):
        before = clock()
        built(tokens).sum().backward()
        learned = clock()
        with torch.no_grad():
            built(tokens)
        paces.append(Pace(learned - before, clock() - learned))
        built.zero_grad(set_to_none=True)
    later = paces[1:] or paces
    return Pace(
        statistics.median(pace.learn for pace in later),
        statistics.median(pace.look for pace in later),
    )
