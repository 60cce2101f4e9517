"""What would run, and at what cost, before anything does: plan.json, and the same in a terminal.

K domains, T tokens a sequence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from doremi_train import files
from doremi_train.batch_selection import Effort, effort
from doremi_train.config import fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import detectors
from doremi_train.methods import simplex
from doremi_train.model import costs
from doremi_train.parallel import comm
from doremi_train.reports import plan_text
from doremi_train.stages import ahead, language_model, main, prepare, reference, reference_losses, weighting
from doremi_train.stages.ahead import Ahead
from doremi_train.stages.session import Session

# Measured at 400 and 800 steps of `tiny`: for some 200 steps α follows which domain is learned first, not which has
# most left to learn. A step size of 0.1 hardly lets it.
START_UP = 200  # steps
START_UP_SHARE = 0.1  # part of ᾱ that they may be
SMALL_STEP = 0.1
# The losses of a domain's sequences spread by some 0.3 nats per token: so many tell 0.01 apart.
SEQUENCES = 1000
TINY = 20  # training sequences of a domain below which they cannot stand for it


def run(session: Session) -> dict[str, Any]:
    """Sizes, epochs, FLOPs, memory and time of every run, and warnings.

    Raises UserError where there are more processes than sequences in a batch.
    """
    store = prepare.run(session)
    training = session.config.training
    rows = comm.world().largest(training.batch_size, training.micro_batch_size)
    runs, learned = comm.on_first(lambda: ahead.runs(session, store))
    shape = (rows, training.sequence_length, training.precision, training.activation_checkpointing)
    paces = {  # on all processes at once, since they may share a machine
        address: costs.measure(config, *shape, session.place.device)
        for address, config in {fingerprint(run.config): run.config for run in runs if run.left}.items()
    }
    return comm.on_first(lambda: _write(session, store, runs, learned, paces))


def _write(
    session: Session,
    store: TokenStore,
    runs: Sequence[Ahead],
    learned: Tensor | None,
    paces: Mapping[str, costs.Pace | str],
) -> dict[str, Any]:
    bill = Bill(session, store, paces)
    stages, evaluation = {run.name: bill.run(run) for run in runs}, bill.evaluation(runs)
    seconds = [part["seconds"] for part in (*stages.values(), evaluation)]
    domains = _domains(session, store, learned)
    warned = warnings(session, domains)
    plan = {
        "domains": domains,
        "stages": stages,
        "evaluation": evaluation,
        "total_flops": sum(part["flops"] for part in (*stages.values(), evaluation)),
        "total_seconds": None if None in seconds else sum(seconds),
        "not_measured": sorted({pace for pace in paces.values() if isinstance(pace, str)}),
        "place": str(session.place),
        "processes": comm.world().size,
        "accumulation": bill.accumulation(runs),
        "reference_losses": _reference_losses(session, store, runs),
        "absent": _absent(session, len(store.domains)),
        "warnings": [message for messages in warned.values() for message in messages],
    }
    files.write_json(session.run_dir / "plan.json", plan)
    plan_text.show(plan, warned, session.store, session.config.main.tokens)
    return plan


# ── Runs ────────────────────────────────────────────────────────────────────────────


class Bill:
    """Costs of runs on these processes; FLOPs and seconds are those of the part that is still to be done."""

    def __init__(self, session: Session, store: TokenStore, paces: Mapping[str, costs.Pace | str]) -> None:
        self.session, self.training, self.world, self.paces = session, session.config.training, comm.world(), paces
        batch, micro = self.training.batch_size, self.training.micro_batch_size
        self.length, self.rows = self.training.sequence_length, self.world.largest(batch, micro)
        self.parts = len(self.world.rows(batch, micro))  # micro-batches of a process and step
        self.live = reference_losses.needed(session) and not reference_losses.cached(session)
        self.twice = self.parts > 1 and session.config.proxy.accumulation == "exact"  # every forward of a proxy
        self.domains = len(store.domains)
        self.models = weighting.models(session)  # frozen ones beside a main run
        self.candidates = session.config.batch_selection.candidates or 2 * batch  # of a step that picks
        checked = np.minimum(store.sequences("validation", self.length), session.config.evaluation.sequences)
        self.checked = int(checked.sum())  # sequences of one evaluation
        self.calls = -(-self.checked // (self.world.size * self.rows))  # forwards of a process for it

    def run(self, run: Ahead) -> dict[str, Any]:
        training, of = self.training, costs.shape(run.config)
        proxy, weighed = run.kind == "proxy", run.kind == "main" and training.loss_weighting != "none"
        frozen = self._frozen(of) if weighed or (proxy and (self.live or run.missing)) else None
        looks = self._looks(of, self.twice) if proxy else self._weighing(of) if weighed else 0.0
        evaluations = self._evaluations(run.steps)
        tokens = run.steps * training.batch_size * self.length
        held = frozen.parameters * (self.models if weighed else 1) if frozen else 0
        if run.kind == "doge":
            target = self.session.config.target
            aimed = target.files is not None or target.domains is not None
            tokens += run.steps * self.session.config.doge.target_batch * self.length * aimed
            held = of.parameters * self.domains  # a gradient of each
        needed = self._effort(run)
        forwards = needed.look + looks  # alone
        step = needed.learn * self._step(of, 0.0) + forwards * self._forward(of)  # per token that is trained on
        flops = tokens * step + evaluations * self.checked * self.length * self._forward(of)
        pace, seconds = self._pace(run), None if run.left else 0.0
        if pace is not None:
            steps = run.steps * self.parts * (needed.learn * pace.learn + forwards * pace.look)
            seconds = run.left * (steps + evaluations * self.calls * pace.look)
        flops *= run.left
        if frozen is not None and run.missing:
            flops += run.missing * self.length * self._forward(frozen)
            if pace is not None and seconds is not None:
                ratio = self._forward(frozen) / self._forward(of)
                seconds += run.missing / (self.world.size * self.rows) * pace.look * ratio
        memory = costs.memory(
            of,
            strategy=self.session.place.strategy,
            processes=self.world.size,
            optimizer=training.optimizer,
            rows=self.world.largest(self.candidates, training.micro_batch_size) if self._selects(run) else self.rows,
            length=self.length,
            precision=training.precision,
            checkpointing=training.activation_checkpointing,
            reference=held,
            device=self.session.place.device.type,
        )
        return {
            "kind": run.kind,
            "state": run.state,
            "same_as": run.same_as,
            "parameters": of.parameters,
            "tokens": tokens,
            "candidates": run.steps * self.candidates * self.length if self._selects(run) else tokens,  # tokens too
            "flops": flops,
            "seconds": seconds,
            "memory": memory._asdict() | {"total": sum(memory)},
        }

    def _selects(self, run: Ahead) -> bool:
        return run.name == "main" and self.session.config.batch_selection.method != "none"

    def _effort(self, run: Ahead) -> Effort:
        options, training = self.session.config.batch_selection, self.training
        if not self._selects(run):
            return Effort(1.0, 0.0)
        together = len(self.world.rows(self.candidates, training.micro_batch_size)) == 1
        one_pass = together and not training.activation_checkpointing
        return effort(options, self.candidates, training.batch_size, options.validation_sequences, one_pass)

    def evaluation(self, runs: Sequence[Ahead]) -> dict[str, Any]:
        """The last stage: every model once more, and the reference on training text too; in every command."""
        found = [
            (run, costs.shape(run.config)) for run in runs if run.kind == "main" or run.name in ("reference", "proxy")
        ]
        passes = [(of, self._pace(run), 1 + (run.name == "reference")) for run, of in found]
        if self.session.config.reference.path is not None:
            of, pace = found[0][1], self._pace(found[0][0])
            frozen = self._frozen(of)
            ratio = self._forward(frozen) / self._forward(of)
            passes.append((frozen, costs.Pace(pace.learn * ratio, pace.look * ratio) if pace else None, 2))
        flops = sum(times * self._forward(of) for of, _, times in passes) * self.checked * self.length
        paces = [times * pace.look for _, pace, times in passes if pace is not None]
        return {
            "models": len(passes),
            "flops": float(flops),
            "seconds": self.calls * sum(paces) if len(paces) == len(passes) else None,
        }

    def accumulation(self, runs: Sequence[Ahead]) -> dict[str, Any] | None:
        """Price of proxy.accumulation=exact over lagged: one forward more, where a batch comes in several parts."""
        proxies = [run for run in runs if run.kind == "proxy"]
        if not proxies:
            return None
        of, pace, more = costs.shape(proxies[0].config), self._pace(proxies[0]), self.parts > 1
        exact, lagged = (self._step(of, self._looks(of, twice)) for twice in (more, False))
        steps = sum(run.left * run.steps for run in proxies)
        return {
            "micro_batches": self.parts,
            "exact_over_lagged": exact / lagged,
            "seconds": steps * self.parts * pace.look * more if pace is not None else None,
        }

    def _pace(self, run: Ahead) -> costs.Pace | None:
        pace = self.paces.get(fingerprint(run.config))
        return pace if isinstance(pace, costs.Pace) else None

    def _forward(self, of: costs.Shape) -> int:
        return costs.forward(of, self.length)

    def _step(self, of: costs.Shape, looks: float) -> float:
        """FLOPs per token of a step with so many forwards more than a language model's."""
        device = self.session.place.device.type
        backward = costs.backward(of, self.rows, self.length, self.training.activation_checkpointing, device)
        return (1 + looks) * self._forward(of) + backward

    def _looks(self, of: costs.Shape, twice: bool) -> float:
        """Forwards without gradient in every step of a proxy, in forwards of the proxy."""
        return (self._forward(self._frozen(of)) / self._forward(of) if self.live else 0.0) + twice

    def _weighing(self, of: costs.Shape) -> float:
        """The same of a main run that weighs its tokens."""
        whole = self.session.config.weighting.normalize or self.training.loss_weighting == "rho"
        live = not reference_losses.weighing_cached(self.session)
        return live * self.models * self._forward(self._frozen(of)) / self._forward(of) + (whole and self.parts > 1)

    def _frozen(self, proxy: costs.Shape) -> costs.Shape:
        """The reference beside a proxy."""
        path = self.session.config.reference.path
        return proxy if path is None else costs.shape(files.read_json(Path(path) / "config.json"))

    def _evaluations(self, steps: int) -> int:
        """Of one run: while it trains, at its end, and once more for its result."""
        every = self.session.config.evaluation.every or max(1, steps // 20)
        return -(-steps // every) + 1


# ── Data ────────────────────────────────────────────────────────────────────────────


def _domains(session: Session, store: TokenStore, learned: Tensor | None) -> dict[str, Any]:
    """For each domain its size, and how often every run passes over it: those here, and the one of `main.tokens`."""
    training, count = session.config.training, len(store.domains)
    length, sizes, validation = training.sequence_length, store.sizes("train"), store.sizes("validation")
    sampler = reference_losses.sampler(session, store, 0)
    proxy_epochs = reference_losses.draws(session, sampler) / sampler.sizes
    known = learned.numpy() if learned is not None else None
    here = {name: weights.numpy() for name, weights in main.comparisons(session, store).items()}
    final = {"natural": sizes / sizes.sum(), "uniform": simplex.uniform(count).numpy()}
    if known is not None:
        here, final = {"main": known} | here, final | {"learned": known}
    once = store.sequences("train", length) * length  # (K,) tokens of one pass
    tokens = language_model.main_steps(session) * training.batch_size * length
    reference_weights = reference.mixture(session, store)
    proxies = session.config.mixture.method in ("doremi", "doge")
    return {
        name: {
            "training_tokens": int(sizes[k]),
            "validation_tokens": int(validation[k]),
            "training_sequences": int(once[k] // length),
            "natural_weight": float(final["natural"][k]),
            "reference_weight": float(reference_weights[k]),
            "proxy_sequences": int(sampler.sizes[k]) if proxies else None,  # that it may read
            "proxy_epochs": float(proxy_epochs[k]) if proxies else None,
            "main_epochs": {way: float(weights[k] * tokens / once[k]) for way, weights in here.items()},
            "final_epochs": {
                way: float(weights[k] * language_model.final_tokens(session) / once[k])
                for way, weights in final.items()
            },
        }
        for k, name in enumerate(store.domains)
    }


def _reference_losses(session: Session, store: TokenStore, runs: Sequence[Ahead]) -> dict[str, int] | None:
    """Size of the reference's losses in fp16 on all sequences that the proxies of all seeds read, for every round;
    where they are cached, also for how many sequences of any run they are missing.

    What seeds have in common is an expectation, since they draw independently; draws from α are taken for uniform.
    """
    options, length = session.config.proxy, session.config.training.sequence_length
    if session.config.mixture.method != "doremi" or not reference_losses.needed(session):
        return None
    sampler = reference_losses.sampler(session, store, 0)
    read = np.minimum(reference_losses.draws(session, sampler) / sampler.sizes, 1)  # (K,) part that one seed reads
    sequences = round(float((sampler.sizes * (1 - (1 - read) ** options.seeds)).sum()))
    size = {"sequences": sequences, "rounds": options.rounds, "bytes": 2 * length * sequences * options.rounds}
    if reference_losses.cached(session):
        size["missing"] = round(sum(run.missing for run in runs))
    return size


def _absent(session: Session, domains: int) -> dict[str, float | None] | None:
    """Probability that a batch of the proxy misses a domain: where draws are uniform; and where they are from α, for a
    domain that has only the weight that smoothing leaves it."""
    options, batch = session.config.proxy, session.config.training.batch_size
    if session.config.mixture.method != "doremi":
        return None
    uniform, floor = detectors.missing_by_quota(batch, [1 / domains, options.smoothing / domains]).tolist()
    return {"uniform": uniform, "at_floor": floor if options.objective == "resample" else None}


# ── Warnings ────────────────────────────────────────────────────────────────────────


def warnings(session: Session, domains: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What makes domain weights worth less, seen before anything runs, by kind."""
    names = list(domains)
    found = {
        "tiny": [
            f"Domain {name} has only {domain['training_sequences']} training sequences ({domain['training_tokens']:,} "
            "tokens), which cannot stand for it; add text, or merge it with a like one."
            for name, domain in domains.items()
            if domain["training_sequences"] < TINY
        ]
    }
    if session.config.mixture.method != "doremi":
        return found
    options, training = session.config.proxy, session.config.training
    epochs = [domain["proxy_epochs"] for domain in domains.values()]
    ways = [domain["final_epochs"] for domain in domains.values()]
    mismatched = detectors.mismatched(names, epochs, [way.get("learned", way["uniform"]) for way in ways])
    absent = detectors.missing_by_quota(training.batch_size, simplex.uniform(len(names)).numpy())
    for finding in [*detectors.absent(names, absent), *detectors.repeated(names, epochs), *mismatched]:
        found.setdefault(finding.kind, []).append(finding.message)
    longer = language_model.final_tokens(session) > training.steps * training.batch_size * training.sequence_length
    if mismatched and longer and not options.match_repetition:
        hint = "proxy.match_repetition=true lets reference and proxy repeat their data as the final run will."
        found["mismatched"].insert(0, hint)
    left_out = max(options.warmup, options.average_from)
    found["short"] = too_short(training.steps, training.batch_size, len(names), options.step_size, left_out)
    return found


def too_short(steps: int, batch: int, domains: int, step_size: float, average_from: float) -> list[str]:
    """Whether a proxy of so many steps can tell its domains apart, in sentences."""
    found = []
    left_out = int(average_from * steps)
    share = max(0, min(START_UP, steps) - left_out) / (steps - left_out)
    if share > START_UP_SHARE and step_size > SMALL_STEP:
        found.append(
            f"The proxy has {steps} steps. For about the first {START_UP} α follows which domain is learned first, and "
            f"they are {share:.0%} of its average; take mixture=doremi_steady (step size {SMALL_STEP}, uniform "
            f"reference), or training.steps={round(START_UP / START_UP_SHARE)} or more."
        )
    seen = steps * batch / domains
    if seen < SEQUENCES:
        enough = -(-SEQUENCES * domains // batch)
        found.append(
            f"The proxy sees {seen:.0f} sequences of each domain. Fewer than about {SEQUENCES} do not tell losses "
            f"apart that differ by 0.01 nats per token; take training.steps={enough} or more, a larger "
            "training.batch_size, or fewer domains."
        )
    return found
