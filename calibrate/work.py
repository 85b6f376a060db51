"""The stages of a calibration: ceilings, profile, adapters, trained exits, exit traces, answers, predictors, drafters.

It also finds the available labelled texts, and how much of them can be traced in the time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

from calibrate.exits.texts import TASKS, Split, documents, passages
from calibrate.inputs import Inputs, measured_by
from calibrate.schema import DRAFTERS, POTENTIAL, PREDICTORS, TRAIN_EXITS
from calibrate.stages import SHORT, NotEnoughTime, Stage, StageRun
from helios_sim import files
from helios_sim.errors import HardwareError, UserError
from helios_sim.profile.resolve import profile_of
from helios_sim.profile.shapes import Shape
from helios_sim.provenance import command_given

CEILINGS, PROFILE, ADAPTERS, TRACES, ANSWERS = "ceilings", "profile", "adapters", "traces", "answers"
ENERGY = "energy"  # stage of a campaign, once for the device
JOINT = "joint"  # folder in a stage: traces of the same answers by model
KEPT = "kept"  # folder in a stage: files from which it continues
SPEC = "spec"  # key of a stage's result: the model's spec
STAGES_OF = {
    "all": (CEILINGS, PROFILE, TRACES, ANSWERS),
    "latency": (CEILINGS, PROFILE),
    "adapters": (ADAPTERS, TRACES),
    "traces": (TRACES, ANSWERS),
    TRAIN_EXITS: (TRAIN_EXITS,),
    PREDICTORS: (PREDICTORS, TRACES),
    DRAFTERS: (ANSWERS, DRAFTERS),
    POTENTIAL: (POTENTIAL,),
}
Run = Callable[[StageRun], Mapping[str, Any]]
PROBE_CHARS = 1_500  # characters of each task from which the mean length of a token is estimated
FILL_SHARE = 0.06  # of the time that is left, for filling the KV memory with noise
SAFETY = 0.75  # share of the allowed time that is planned with, since a shared machine varies
# Shares of the layers. Deep exits agree more often but save little; a changed token saves most at a low exit, so the
# candidates lie low (SmolLM2: 6, 8, 12, 18, 24, of which training keeps those that pay).
CANDIDATES = (0.2, 0.27, 0.4, 0.6, 0.8)
BATCH_TEXTS, BATCH_TEXTS_OF_CARD = 2, 64  # texts per training step of the trunk
CALIBRATION_TOKENS = 8_000  # tokens to calibrate trained exits
QUICK_STEPS = 4


@dataclass(frozen=True, slots=True)
class Effort:
    """Seconds that a stage takes without a budget, and the least with which it is worth beginning."""

    estimate_s: float
    least_s: float


# For a model of 0.1 billion weights on two cores. Larger models take longer, so their stages are cut short.
EFFORTS = {
    CEILINGS: Effort(10, 3),
    PROFILE: Effort(600, 10),
    ADAPTERS: Effort(1500, 120),
    TRACES: Effort(400, 30),
    ANSWERS: Effort(100, 30),
    TRAIN_EXITS: Effort(5400, 120),
    PREDICTORS: Effort(300, 20),
    DRAFTERS: Effort(60, 10),
    POTENTIAL: Effort(180, 20),
}
QUICK = Effort(2, 0.5)


def stages_of(inputs: Inputs) -> list[Stage]:
    """The stages of the chosen task. Traces need the whole model, since exits are compared with full depth."""
    makers = {
        CEILINGS: _ceilings, PROFILE: _profile, ADAPTERS: _adapters, TRAIN_EXITS: _train_exits, TRACES: _traces,
        ANSWERS: _answers, PREDICTORS: _predictors, DRAFTERS: _drafters, POTENTIAL: _potential,
    }  # fmt: skip
    names = [name for name in STAGES_OF[inputs.config.task] if inputs.whole or name in (CEILINGS, PROFILE)]
    if not names:
        allowed = "exits are compared with full depth, so every layer must be loaded"
        raise UserError("model.layers", inputs.layers, allowed, "leave model.layers out, or use task=latency")
    if not inputs.config.answers:
        names = [name for name in names if name != ANSWERS]
    return [makers[name](inputs) for name in names]


def _stage(
    inputs: Inputs, name: str, run: Run, worth: float, needs: tuple[str, ...], settings: dict[str, Any]
) -> Stage:
    effort = QUICK if inputs.config.quick else EFFORTS[name]
    return Stage(name, memory_named(run), effort.estimate_s, worth, effort.least_s, needs, settings)


def _ceilings(inputs: Inputs) -> Stage:
    quick = inputs.config.quick

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.measure.ceilings import measure_ceilings

        sizes = {"buffer_bytes": 16 << 20, "matrix_rows": 256} if quick else {}
        found = measure_ceilings(inputs.device, inputs.dtype, **sizes)
        return {"facts": asdict(inputs.device.facts), "ceilings": found.to_json()}

    facts, threads = inputs.device.facts, inputs.config.threads
    settings = {"device": facts.name, "dtype": inputs.dtype, "threads": threads, "quick": quick, **measured_by()}
    return _stage(inputs, CEILINGS, run, 100, (), settings)


def _profile(inputs: Inputs) -> Stage:
    config = inputs.config

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.measure.profile import BudgetSpent, MeasurePlan, ProfileOrigin, in_words, measure_profile
        from calibrate.measure.subject import Subject
        from helios_sim.profile.store import write_profile

        model, loaded_bytes = inputs.loaded
        fill_s = None if stage.most_s is None else FILL_SHARE * stage.most_s
        subject = Subject(model, inputs.device, inputs.limits(), inputs.heads, config.seed, fill_s)
        command, chars = command_given("calibrate"), chars_per_token(inputs)
        about = ProfileOrigin(inputs.spec(chars), command, _today(), settings["weights"], _details(inputs))
        samples = 2 if config.quick else 5
        allowance_s, spent_before_s = stage.allowance_s, stage.spent_s()
        folder = stage.folder / "measurements"
        # the same ceilings as in the report
        files.write_json(folder / "ceilings.json", stage.finished[CEILINGS].result["ceilings"])

        def progress(what: str, spent_s: float) -> None:
            stage.tell(what, None if allowance_s is None else (spent_before_s + spent_s) / allowance_s)

        try:
            profile = measure_profile(
                subject, about, folder,
                MeasurePlan(stage.left_s, stage.most_s, samples, seed=config.seed, energy=config.energy),
                loaded_bytes=loaded_bytes, reload=None if inputs.checkpoint.is_random else inputs.reload_layer,
                progress=progress,
            )  # fmt: skip
        except BudgetSpent as error:
            raise NotEnoughTime(error.allowed) from error
        write_profile(profile, stage.folder / "profile" / profile.name)
        short = profile.provenance.details["short"]
        return {"name": profile.name, SHORT: "" if short is None else in_words(short)}

    settings = {
        **inputs.identity(), "limits": asdict(inputs.limits()), "heads": inputs.heads_digest(),
        "exits": list(inputs.exits), "quick": config.quick, "seed": config.seed, "energy": config.energy,
    }  # fmt: skip
    return _stage(inputs, PROFILE, run, 90, (CEILINGS,), settings)


def _adapters(inputs: Inputs) -> Stage:
    config = inputs.config

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.adapters import AdapterConfig, train_heads
        from calibrate.exits.training import Recipe

        chars = config.tokens_to_train * chars_per_token(inputs)
        shares = available_texts(inputs).shares()
        plan = AdapterConfig(
            config.model.name, _candidates(inputs), round(chars), round(chars * 0.28), shares=shares,
            recipe=Recipe(config.adapter_width, config.check_width, epochs=config.epochs, seed=config.seed),
            budget_s=None if stage.allowance_s is None else 0.4 * stage.allowance_s, command=command_given("calibrate"),
        )  # fmt: skip
        folder = stage.folder / "heads"
        heads = train_heads(
            inputs.model, inputs.tokenizer, plan, folder, stage.folder / "scratch", lambda text: stage.tell(text, None)
        )
        return {"exits": list(heads.exits)}

    settings = {**inputs.identity(), "train_tokens": config.tokens_to_train, "exits": list(_candidates(inputs))}
    settings |= {"tasks": config.tasks, "seed": config.seed, "epochs": config.epochs}
    settings |= {"adapter_width": config.adapter_width, "check_width": config.check_width}
    return _stage(inputs, ADAPTERS, run, 95, (), settings)


def _predictors(inputs: Inputs) -> Stage:
    """The stage that trains predictors of a few words, in place of the head, on texts that are not traced."""
    config = inputs.config

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.hidden import tokenized_passages
        from calibrate.exits.predictors import PredictorPlan, train_predictors
        from calibrate.exits.traces import PASSAGE_CHARS

        if not inputs.exits:
            raise UserError("model.exits", list(inputs.exits), "an exit below the last layer", "name some")
        chars, shares = config.tokens_to_train * chars_per_token(inputs), available_texts(inputs).shares()
        wanted = {task: max(1, round(chars * share / 1000)) for task, share in shares.items()}
        passages = tokenized_passages(inputs.tokenizer, wanted, Split.TRAIN, PASSAGE_CHARS)
        plan = PredictorPlan(
            config.check_width, config.seed, None if stage.allowance_s is None else SAFETY * stage.allowance_s
        )
        found, reached = train_predictors(
            inputs.model, inputs.tokenizer, inputs.heads, passages, plan, stage.tell, stage.spent_s
        )
        found.write(stage.folder)
        return {"exits": list(found.exits), "reached": reached, "width": found.width}

    settings = {**inputs.identity(), "train_tokens": config.tokens_to_train, "exits": list(inputs.exits)}
    settings |= {"tasks": config.tasks, "seed": config.seed, "check_width": config.check_width}
    settings |= {"heads": inputs.heads_digest()}
    return _stage(inputs, PREDICTORS, run, 95, (), settings)


def _train_exits(inputs: Inputs) -> Stage:
    """The stage that trains the model for early exit, beside the frozen one with exits attached."""
    config, own = inputs.config, inputs.config.train_exits
    steps = QUICK_STEPS if config.quick and own.steps is None else own.steps
    batch = own.batch_texts or (BATCH_TEXTS if inputs.device.facts.kind == "cpu" else BATCH_TEXTS_OF_CARD)

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.layer_skip import Curriculum, LayerSkip
        from calibrate.exits.trained import TrainedPlan
        from calibrate.exits.trunk import TrunkPlan
        from calibrate.train_exits import train_exits

        chars = chars_per_token(inputs)
        skip = LayerSkip(own.drop_most, own.loss_scale, Curriculum(own.curriculum), own.every)
        trunk = TrunkPlan(
            _candidates(inputs), own.rank, skip=skip, width=config.adapter_width, learning_rate=own.learning_rate,
            adapter_learning_rate=own.adapter_learning_rate, batch_texts=batch, steps=steps, seed=config.seed,
        )  # fmt: skip
        available = available_texts(inputs)
        plan = TrainedPlan(
            config.model.name, trunk, round(config.tokens_to_train * chars), own.text_tokens,
            round(own.check_tokens * chars), round(CALIBRATION_TOKENS * chars), config.check_width,
            available.shares(), command_given("calibrate"),
        )  # fmt: skip
        result = train_exits(inputs, stage, plan, lambda run, share: chars_that_fit(inputs, run, share)[0])
        return {**result, "left_out": dict(available.left_out)}

    settings = {**inputs.identity(), "train_exits": asdict(own), "exits": list(_candidates(inputs)), "batch": batch}
    settings |= {"train_tokens": config.tokens_to_train, "trace_tokens": config.tokens_to_trace, "seed": config.seed}
    settings |= {"tasks": config.tasks, "heads": inputs.heads_digest(), "quick": config.quick}
    settings |= {"adapter_width": config.adapter_width, "check_width": config.check_width}
    return _stage(inputs, TRAIN_EXITS, run, 85, (), settings)


def _traces(inputs: Inputs, name: str = TRACES) -> Stage:
    config = inputs.config
    trains, predicts = config.task == "adapters", config.task == PREDICTORS

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.traces import TimeSpent, TraceOrigin, reference_trace
        from helios_sim.exits.store import write_trace
        from helios_sim.live.model.predictors import read_predictors

        if trains:
            inputs.use_heads(stage.finished[ADAPTERS].part("heads"))
        words = read_predictors(stage.finished[PREDICTORS].folder, inputs.model.device) if predicts else None
        _ = inputs.model  # loading it takes time of its own
        chars, left_out = chars_that_fit(inputs, stage)
        origin = TraceOrigin(config.model.name, inputs.checkpoint.sha256, command_given("calibrate"))
        try:
            trace, cut = reference_trace(
                inputs.model, inputs.tokenizer, inputs.heads, origin, stage.folder / "batches", chars, stage.tell,
                None if stage.left_s is None else lambda: stage.left_s or 0.0, words,
            )  # fmt: skip
        except TimeSpent as error:
            raise NotEnoughTime(str(error)) from error
        write_trace(trace, stage.folder / "trace")
        if words is not None:
            words.write(stage.folder / "trace")
        wanted = config.tokens_to_trace * chars_per_token(inputs)
        if not cut and sum(chars.values()) < 0.98 * wanted:
            cut = f"{trace.n_tokens:,} tokens in place of about {config.tokens_to_trace:,}"
        spec = asdict(inputs.spec(chars_per_token(inputs)))
        return {"tokens": trace.n_tokens, "tasks": list(trace.tasks), "left_out": left_out, SPEC: spec, SHORT: cut}

    settings = {**inputs.identity(), "tasks": config.tasks, "trace_tokens": config.tokens_to_trace}
    settings |= {} if trains else {"heads": inputs.heads_digest(), "exits": list(inputs.exits)}
    needs = {"adapters": (ADAPTERS,), PREDICTORS: (PREDICTORS,)}.get(config.task, ())
    return _stage(inputs, name, run, 80, needs, settings)


def _potential(inputs: Inputs) -> Stage:
    """The stage that traces the model's own head at evenly spaced depths, or at the depths of `model.exits`."""
    from calibrate.exits.potential import full_queue

    try:
        full_queue(profile_of(Shape(inputs.spec(1.0), inputs.config.model.name), inputs.config.priced_for))
    except HardwareError as error:
        raise error.about("card") from error
    return _traces(inputs, POTENTIAL)


def _answers(inputs: Inputs) -> Stage:
    config = inputs.config

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.answers import GENERATED_TASKS, generated_trace
        from calibrate.exits.traces import TimeSpent, TraceOrigin
        from helios_sim.exits.store import write_trace

        available = available_texts(inputs)
        tasks = [task for task in GENERATED_TASKS if task in available.tasks]
        if not tasks:
            raise UserError("tasks", config.tasks, f"some of {', '.join(GENERATED_TASKS)}", "add one, or set answers=0")
        origin = TraceOrigin(config.model.name, inputs.checkpoint.sha256, command_given("calibrate"))
        tokens, prompt_chars = (12, 60) if config.quick else (64, 400)
        try:
            trace, cut = generated_trace(
                inputs.model, inputs.tokenizer, inputs.heads, origin, stage.folder / KEPT, tasks, config.answers,
                tokens, stage.tell, prompt_chars, None if stage.left_s is None else lambda: stage.left_s or 0.0,
            )  # fmt: skip
        except TimeSpent as error:
            raise NotEnoughTime(str(error)) from error
        write_trace(trace, stage.folder / "trace")
        return {"tokens": trace.n_tokens, "tasks": list(trace.tasks), SHORT: cut}

    settings = {**inputs.identity(), "tasks": config.tasks, "answers": config.answers, "quick": config.quick}
    settings |= {"heads": inputs.heads_digest(), "exits": list(inputs.exits)}
    return _stage(inputs, ANSWERS, run, 40, (), settings)


def _drafters(inputs: Inputs) -> Stage:
    """The stage of the drafters' predictions for the tokens of the answers, and their joint trace."""

    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.exits.answers import read_answers
        from calibrate.exits.drafters import drafters_trace, joint_trace, predictions
        from calibrate.exits.traces import TimeSpent
        from helios_sim.exits.store import read_trace, write_trace

        before = stage.finished[ANSWERS]
        trace = read_trace(before.part("trace"))
        answers = read_answers(before.part(KEPT), trace.tasks)
        found, shas = {}, {}
        for number, (name, checkpoint) in enumerate(inputs.drafters.items()):

            def tell(text: str, share: float | None, name: str = name, number: int = number) -> None:
                stage.tell(f"{name}, {text}", None if share is None else (number + share) / len(inputs.drafters))

            left_s = None if stage.left_s is None else lambda: stage.left_s or 0.0
            try:
                found[name] = predictions(inputs.drafter(name), answers, stage.folder / KEPT / name, tell, left_s)
            except TimeSpent as error:
                raise NotEnoughTime(f"{name}: {error}") from error
            shas[name] = checkpoint.sha256
            alone = drafters_trace(
                trace, name, checkpoint.architecture.n_layers, found[name], shas[name], command_given("calibrate")
            )
            write_trace(alone, stage.folder / JOINT / name)
        write_trace(joint_trace(trace, found, shas, command_given("calibrate")), stage.folder / JOINT / trace.model)
        return {"tokens": trace.n_tokens, "right": {name: float(it.right.mean()) for name, it in found.items()}}

    settings = {**inputs.identity(), "drafters": {name: it.digest for name, it in inputs.drafters.items()}}
    return _stage(inputs, DRAFTERS, run, 38, (ANSWERS,), settings)


def _candidates(inputs: Inputs) -> tuple[int, ...]:
    """Depths at which adapters are tried: `model.exits`, else the shares `CANDIDATES` of the layers."""
    if inputs.config.model.exits is not None:
        return inputs.exits
    n = inputs.layers
    return tuple(sorted({min(max(1, round(n * share)), max(1, n - 1)) for share in CANDIDATES}))


def _details(inputs: Inputs) -> dict[str, Any]:
    checkpoint = inputs.checkpoint
    found: dict[str, Any] = {"weights": checkpoint.source, "weights_sha256": checkpoint.sha256}
    found |= {"licence": checkpoint.licence, "heads": inputs.heads_sha256(), "quick": inputs.config.quick}
    if not inputs.device.asynchronous:
        return found
    from helios_sim.live.kernels.choice import described

    return {**found, "kernels": described(inputs.model.kernels)}


def memory_named(run: Run) -> Run:
    """Wrap a stage so that any out-of-memory error of torch becomes a MemoryError."""

    @wraps(run)
    def renamed(stage: StageRun) -> Mapping[str, Any]:
        try:
            return run(stage)
        except RuntimeError as error:
            from helios_sim.live.device import oom_message

            reason = oom_message(error)
            if reason is not None:
                raise MemoryError(reason) from error
            raise

    return renamed


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True, slots=True)
class AvailableTexts:
    """Tasks with available texts, and why the other tasks have none."""

    tasks: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def shares(self) -> dict[str, int]:
        """The training shares of these tasks alone, which add up to 1,000."""
        from calibrate.exits.adapters import SHARES

        total = sum(SHARES[task] for task in self.tasks)
        return {task: round(1000 * SHARES[task] / total) for task in self.tasks}


def available_texts(inputs: Inputs) -> AvailableTexts:
    """The available texts. Raises UserError if a task that the settings name is not available."""
    named = inputs.config.tasks
    found, left_out = [], {}
    for task in TASKS if named is None else named:
        try:
            documents(task)
        except UserError as error:
            if named is not None:
                raise
            left_out[task] = str(error)
        else:
            found.append(task)
    return AvailableTexts(tuple(found), left_out)


def chars_per_token(inputs: Inputs) -> float:
    """Mean over some held-out text of every available task; for random weights, the value assumed for the family."""
    from helios_sim.live.checkpoint.random_weights import RandomWeights

    if isinstance(inputs.checkpoint.storage, RandomWeights):
        return inputs.checkpoint.storage.chars_per_token
    pieces = [p for t in available_texts(inputs).tasks for p in passages(t, Split.HELDOUT, PROBE_CHARS, PROBE_CHARS)]
    tokens = sum(len(ids) for ids in inputs.tokenizer(pieces, add_special_tokens=False)["input_ids"])
    return sum(map(len, pieces)) / tokens


def chars_that_fit(inputs: Inputs, stage: StageRun, share: float = 1.0) -> tuple[dict[str, int], dict[str, str]]:
    """How many characters to trace of each task, and the tasks that are left out with the reasons.

    Together they give `trace_tokens`, or fewer if the share of the time left is too short, estimated from the time of a
    little text. Raises NotEnoughTime if no time is left.
    """
    available = available_texts(inputs)
    from calibrate.exits.traces import HELDOUT_CHARS

    of_all = {task: HELDOUT_CHARS[task] for task in available.tasks}
    wanted = inputs.config.tokens_to_trace * chars_per_token(inputs)
    if stage.left_s is not None:
        wanted = min(wanted, _chars_per_s(inputs, available) * max(0.0, stage.left_s) * SAFETY * share)
        if stage.left_s <= 0:
            raise NotEnoughTime("no time is left for one passage")
    scale = wanted / sum(of_all.values())
    return {task: max(1, round(n * scale)) for task, n in of_all.items()}, dict(available.left_out)


def _chars_per_s(inputs: Inputs, available: AvailableTexts) -> float:
    from calibrate.exits.traces import TraceOrigin, reference_trace

    origin = TraceOrigin(inputs.config.model.name, "", "")
    speeds = []
    for chars in (1, 2 * PROBE_CHARS):  # the first run warms up
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            trace, _ = reference_trace(
                inputs.model, inputs.tokenizer, inputs.heads, origin, Path(scratch), {available.tasks[0]: chars}
            )
            speeds.append(int(trace.chars.sum()) / (time.monotonic() - began))
    return speeds[-1]
