"""Costs of the runs that a command would make: FLOPs, memory and time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train.config import fingerprint, judged
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import configs, costs, folders
from doremi_train.stages.planning.losses_from import Way
from doremi_train.stages.runs import reference_losses, targets, weighting
from doremi_train.stages.runs.ahead import Ahead
from doremi_train.stages.session import Session
from doremi_train.training.batch_selection import Effort, effort


class Bill:
    """Costs of runs on these processes; FLOPs and seconds are those of the part that is still to be
    done, and whole_flops those of all of it."""

    def __init__(
        self, session: Session, store: TokenStore, paces: Mapping[str, costs.Pace | str]
    ) -> None:
        self.session, self.training, self.world, self.paces = (
            session,
            session.config.training,
            session.world,
            paces,
        )
        batch, micro = self.training.batch_size, self.training.micro_batch_size
        share = max(batch, self.world.size)  # a plan of too many processes warns of it
        self.length, self.rows = self.training.sequence_length, self.world.largest(share, micro)
        self.parts = len(self.world.rows(share, micro))  # micro-batches of a process and step
        self.live = reference_losses.needed(session) and not reference_losses.cached(session)
        # Every forward of a proxy.
        self.twice = self.parts > 1 and session.config.proxy.accumulation == "exact"
        self.store, self.domains = store, len(store.domains)
        self.models = weighting.models(session)  # frozen ones beside a main run
        # Of a step that picks.
        candidates = session.config.batch_selection.candidates or 2 * batch
        self.candidates = max(candidates, self.world.size)
        checked = np.minimum(
            store.sequences("validation", self.length), session.config.evaluation.sequences
        )
        self.checked = int(checked.sum())  # sequences of one evaluation
        # Forwards of a process for it.
        self.calls = -(-self.checked // (self.world.size * self.rows))

    def run(self, run: Ahead) -> dict[str, Any]:
        training, shape = self.training, costs.shape(run.config)
        proxy, weighed = (
            run.kind == "proxy",
            run.kind == "main" and training.loss_weighting != "none",
        )
        frozen = self._frozen(shape) if weighed or (proxy and (self.live or run.missing)) else None
        looks = (
            self._looks(shape, self.twice) if proxy else self._weighing(shape) if weighed else 0.0
        )
        evaluations = self._evaluations(run.steps)
        tokens = run.steps * training.batch_size * self.length
        held = frozen.parameters * (self.models if weighed else 1) if frozen else 0
        if run.kind == "doge":
            aimed = targets.given(self.session) or bool(targets.weighed(self.session, self.store))
            tokens += run.steps * self.session.config.doge.target_batch * self.length * aimed
            held = shape.parameters * self.domains  # a gradient of each
        needed = self._effort(run)
        forwards = needed.look + looks  # alone
        # Per token that is trained on.
        step = needed.learn * self._step(shape, 0.0) + forwards * self._forward(shape)
        flops = tokens * step + evaluations * self.checked * self.length * self._forward(shape)
        pace, seconds, whole = self._pace(run), None if run.left else 0.0, flops
        if pace is not None:
            steps = run.steps * self.parts * (needed.learn * pace.learn + forwards * pace.look)
            seconds = run.left * (steps + evaluations * self.calls * pace.look)
        flops *= run.left
        if frozen is not None and run.missing:
            flops += run.missing * self.length * self._forward(frozen)
            if pace is not None and seconds is not None:
                ratio = self._forward(frozen) / self._forward(shape)
                seconds += run.missing / (self.world.size * self.rows) * pace.look * ratio
        divided = frozen if reference_losses.divided(self.session) else None
        memory = self._memory(
            shape,
            held if divided is None else -(-held // self.world.size),
            divided,
            self.world.largest(self.candidates, training.micro_batch_size)
            if self._selects(run)
            else self.rows,
        )
        return {
            "kind": run.kind,
            "state": run.state,
            "same_as": run.same_as,
            "parameters": shape.parameters,
            "tokens": tokens,
            "candidates": run.steps * self.candidates * self.length
            if self._selects(run)
            else tokens,  # tokens too
            "flops": flops,
            "whole_flops": 0.0 if run.same_as else whole,
            "seconds": seconds,
            "memory": memory._asdict() | {"total": sum(memory)},
            "checkpoint": self._checkpoint(shape),
        }

    def _memory(
        self, shape: costs.Shape, held: int, beside: costs.Shape | None, rows: int
    ) -> costs.Memory:
        training = self.training
        return costs.memory(
            shape,
            strategy=self.session.strategy,
            processes=self.world.size,
            optimizer=training.optimizer,
            rows=rows,
            length=self.length,
            precision=training.precision,
            checkpointing=training.activation_checkpointing,
            parts=self.parts,
            reference=held,
            beside=beside,
            device=self.session.device_type,
        )

    def ways_to_losses(self, runs: Sequence[Ahead], losses: Mapping[str, int]) -> list[Way]:
        """What each way to the reference's losses takes of the proxies that are left; `losses` is
        the plan's of the table."""
        proxies = [run for run in runs if run.kind == "proxy"]
        proxy = costs.shape(proxies[0].config)
        frozen, size = self._frozen(proxy), self.world.size
        whole, part = frozen.parameters, -(-frozen.parameters // size)
        steps = sum(run.left * run.steps for run in proxies)
        # All but its own part, at every forward of a micro-batch.
        gathers = 4 * (whole - part)
        live = round(steps * self.training.batch_size)
        once = losses.get("missing", losses["sequences"] * losses["rounds"])
        divided = reference_losses.divided(self.session)
        alone = 4 * part + costs.looked_at(frozen) if divided else 4 * whole  # ahead
        rows = self.rows
        ahead = divided * gathers * once / (size * rows * reference_losses.LARGER)
        ways = [
            Way(
                "live, whole on each process",
                "reference.losses=live reference.sharded=false",
                sum(self._memory(proxy, whole, None, rows)), live, 0, 0,
            ),
            Way(
                "live, divided",
                "reference.losses=live reference.sharded=true",
                sum(self._memory(proxy, part, frozen, rows)), live,
                round(steps * self.parts * gathers), 0,
            ),
            Way(
                "cached",
                "reference.losses=cached",
                max(sum(self._memory(proxy, 0, None, rows)), alone), once,
                round(ahead), losses["bytes"],
            ),
        ]  # fmt: skip
        return [ways[0], *ways[2:]] if size == 1 else ways

    def _selects(self, run: Ahead) -> bool:
        return run.name == "main" and self.session.config.batch_selection.method != "none"

    def _effort(self, run: Ahead) -> Effort:
        options, training = self.session.config.batch_selection, self.training
        if not self._selects(run):
            return Effort(1.0, 0.0)
        together = len(self.world.rows(self.candidates, training.micro_batch_size)) == 1
        one_pass = together and not training.activation_checkpointing
        return effort(
            options, self.candidates, training.batch_size, options.validation_sequences, one_pass
        )

    def evaluation(self, runs: Sequence[Ahead]) -> dict[str, Any]:
        """The last stage, which takes what trainers measured at their end: the reference on
        training text too, and an existing one, which had no trainer here, on both."""
        passes = [
            (costs.shape(run.config), self._pace(run), 1)
            for run in runs
            if run.name == "reference" and run.left
        ]
        if self.session.config.reference.path is not None:
            first = next(run for run in runs if run.kind == "main" or run.name == "proxy")
            shape, pace = costs.shape(first.config), self._pace(first)
            frozen = self._frozen(shape)
            ratio = self._forward(frozen) / self._forward(shape)
            passes.append(
                (frozen, costs.Pace(pace.learn * ratio, pace.look * ratio) if pace else None, 2)
            )
        flops = (
            sum(times * self._forward(shape) for shape, _, times in passes)
            * self.checked
            * self.length
        )
        paces = [times * pace.look for _, pace, times in passes if pace is not None]
        return {
            "models": len(passes),
            "flops": float(flops),
            "seconds": self.calls * sum(paces) if len(paces) == len(passes) else None,
        }

    def accumulation(self, runs: Sequence[Ahead]) -> dict[str, Any] | None:
        """Price of proxy.accumulation=exact over lagged: one forward more, where a batch comes in
        several parts."""
        proxies = [run for run in runs if run.kind == "proxy"]
        if not proxies:
            return None
        shape, pace, several = (
            costs.shape(proxies[0].config),
            self._pace(proxies[0]),
            self.parts > 1,
        )
        exact, lagged = (self._step(shape, self._looks(shape, twice)) for twice in (several, False))
        steps = sum(run.left * run.steps for run in proxies)
        return {
            "micro_batches": self.parts,
            "exact_over_lagged": exact / lagged,
            "seconds": steps * self.parts * pace.look * several if pace is not None else None,
        }

    def _checkpoint(self, shape: costs.Shape) -> dict[str, float]:
        """Bytes of a run's checkpoint, those that each process copies and writes, and how long that
        takes, in the background."""
        size = costs.checkpoint(shape, self.training.optimizer)
        own = -(-size // self.world.size)
        seconds = own / self.session.config.engine.write_speed
        return {"bytes": size, "process": own, "seconds": seconds}

    def _pace(self, run: Ahead) -> costs.Pace | None:
        pace = self.paces.get(fingerprint(run.config))
        return pace if isinstance(pace, costs.Pace) else None

    def _forward(self, shape: costs.Shape) -> int:
        return costs.forward(shape, self.length)

    def _step(self, shape: costs.Shape, looks: float) -> float:
        """FLOPs per token of a step with so many forwards more than a language model's."""
        device = self.session.device_type
        backward = costs.backward(
            shape, self.rows, self.length, self.training.activation_checkpointing, device
        )
        return (1 + looks) * self._forward(shape) + backward

    def _looks(self, shape: costs.Shape, twice: bool) -> float:
        """Forwards without gradient in every step of a proxy, in forwards of the proxy."""
        return (
            self._forward(self._frozen(shape)) / self._forward(shape) if self.live else 0.0
        ) + twice

    def _weighing(self, shape: costs.Shape) -> float:
        """The same of a main run that weighs its tokens."""
        whole = self.session.config.weighting.normalize or self.training.loss_weighting == "rho"
        live = not reference_losses.weighing_cached(self.session)
        return live * self.models * self._forward(self._frozen(shape)) / self._forward(shape) + (
            whole and self.parts > 1
        )

    def _frozen(self, proxy: costs.Shape) -> costs.Shape:
        """The reference beside a proxy."""
        path = self.session.config.reference.path
        if path is None:
            return proxy
        given = f"reference.path={path}"
        values = configs.read(Path(path), "reference.path")
        kind, text = configs.of_text(values, given, folders.REMEDY)
        with judged(given, folders.REMEDY):
            return costs.shape(text | {"model_type": kind})

    def _evaluations(self, steps: int) -> int:
        """Evaluations of one run: while it trains, at its end, and once more for its result."""
        every = self.session.config.evaluation.every or max(1, steps // 20)
        return -(-steps // every) + 1
