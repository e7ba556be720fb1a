"""Every knob, in the order of the method. One frozen section a step; a step receives its own section only.

The texts under the fields are also what `ipd-ray config` prints. The defaults are the full size (one GPU); the presets
in `ipd_ray/presets/` change what they name.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ipd_ray.errors import UserError, near_name

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Reach = Annotated[float, Field(gt=0.0, le=2.0)]
Precision = Literal["float32", "bfloat16"]
"""bfloat16 rounds each factor to 3 digits, and is fast where the hardware knows it: AVX512-BF16, AMX, GPUs."""

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABELS = re.compile(rf"(?:(?:{_LABEL}/)?{_LABEL}={_LABEL}(?:,(?!$)|$))*")

SLICES = 64
"""Equal shares of what is distilled, in order; each belongs to one worker as a whole, so there are no more workers."""


class Section(BaseModel):
    """One step's knobs: frozen, no unknown fields, documented by the text under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _auto_or_fraction(value: Any) -> Any:
    """One message, where a union would have one for each of its types."""
    try:
        if value == "auto" or 0.0 < float(value) < 1.0:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(f"data.discount={value!r} must be auto, or a number above 0 and below 1, such as 0.99.")


class DataConfig(Section):
    """Step 0, how the log is read."""

    reward_transform: Literal["auto", "range", "std", "none"] = "auto"
    """Scale that rewards are multiplied by everywhere but in reported scores. range: 1000 / (best - worst episode
    return); std: 1 / std(reward); auto: range, or std where all episodes return the same; none: 1. Never a shift."""
    discount: Annotated[OpenFraction | Literal["auto"], BeforeValidator(_auto_or_fraction)] = "auto"
    """gamma, per step: of returns, values, the planner's score and acceptance. auto: the smallest of 0.99, 0.995, 0.997
    and 0.999 by which the best episodes of the log are as good as those that return most (docs/notes.md)."""
    holdout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of whole episodes that no value and no world model is trained on. They serve the diagnostics, and pick the
    world model's weights, its elites and what counts as known (kappa)."""


class ValuesConfig(Section):
    """Step 1, implicit Q-learning: V, twin Q and an advantage-weighted behaviour policy."""

    updates: PositiveInt = 200_000
    """Gradient updates; one updates V, Q and the behaviour policy."""
    batch_size: PositiveInt = 256
    """Transitions an update."""
    width: PositiveInt = 256
    """Hidden units a layer, of every network here."""
    layers: PositiveInt = 2
    """Hidden layers of every network here."""
    learning_rate: PositiveFloat = 3e-4
    """Adam's step size; the behaviour policy's falls to zero along a cosine."""
    n_step: PositiveInt = 10
    """Logged rewards that a target sums before it asks V. 1 is IQL's own; more learn faster and trust V less."""
    expectile: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.7
    """tau of V. 0.5 is the value of the behaviour; towards 1 it nears the best action in the data, and
    overestimates."""
    prompt_expectile: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.9
    """Expectile of the return-to-go that the `outcome` prompt asks for at run time."""
    loss: Literal["square", "huber"] = "square"
    """Shape of the expectile loss of V; huber is linear beyond one standard deviation of the returns."""
    polyak: OpenFraction = 0.005
    """Step of the target critics towards the critics."""
    advantage_temperature: NonNegativeFloat = 1.0
    """beta: behaviour-policy weights are min(exp(beta * A / mean|A|), 100). 0 is plain behaviour cloning; 3 follows few
    steps of the log, which made policies fall (docs/notes.md)."""
    layer_norm: bool = True
    """LayerNorm in Q and V: bounds how far values run away off the data (Ball et al. 2023)."""
    precision: Precision = "float32"
    """Of the hidden layers' matrix products while they learn."""


class WorldModelConfig(Section):
    """Step 2, an ensemble of Gaussian dynamics models, its uncertainty, and termination."""

    members: Annotated[int, Field(ge=2)] = 7
    """Networks, each trained on its own bootstrap of the transitions."""
    elites: Annotated[int, Field(ge=2)] = 5
    """Members kept, by error on held-out episodes."""
    width: PositiveInt = 200
    """Hidden units a layer."""
    layers: PositiveInt = 4
    """Hidden layers."""
    learning_rate: PositiveFloat = 3e-3
    """Adam's step size; falls to a tenth along a cosine over max_updates."""
    variance_power: Fraction = 0.5
    """Each error's likelihood is weighed by its predicted variance to this power (beta-NLL). 0 is plain likelihood,
    which neglects what it once found hard; 1 is squared error for the means."""
    weight_decay: NonNegativeFloat = 1e-5
    """Decoupled weight decay."""
    batch_size: PositiveInt = 256
    """Transitions an update and member."""
    max_updates: PositiveInt = 60_000
    """Gradient updates at most; every member takes one in each."""
    eval_every: PositiveInt = 1000
    """Updates between looks at the held-out episodes."""
    patience: PositiveInt = 8
    """Looks without a better hold-out error of any member after which training stops."""
    precision: Precision = "float32"
    """Of the hidden layers' matrix products while they learn."""
    termination: str = "learned"
    """`learned`: by bounds of single observations beyond which every logged episode ended and, for what they do not
    explain, by a network of its own, of (s, s'); `never`; `hopper` or `walker2d`: the environment's known rule; or
    `package.module:function`, taking next observations (B, O) to a boolean (B,), known by its name alone: give a
    function that has changed another one, or what was learned with it is reused."""

    @model_validator(mode="after")
    def _check(self) -> WorldModelConfig:
        if self.elites > self.members:
            raise ValueError(
                f"world_model.elites={self.elites} must be at most world_model.members={self.members}: "
                "lower elites or raise members."
            )
        return self


class SelectConfig(Section):
    """Step 3, which states of the log to plan from."""

    starts: PositiveInt = 20_000
    """Start states wanted; fewer where the spacing (imagine.length steps within an episode) and the cap leave fewer."""
    regret_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Starts come from this share of the steps, the ones with the highest V(s_t) - G_t."""
    frontier_share: Fraction = 0.5
    """Share of the starts drawn from the states of highest V instead, from a part of the log as large: where a good
    policy will be, which seldom sees states of high regret."""
    control_share: Fraction = 0.1
    """Share of the starts drawn uniformly instead: the control group."""
    episode_cap: Fraction = 0.05
    """Share of the starts that one episode may hold at most; never less than one start."""


    @model_validator(mode="after")
    def _check(self) -> SelectConfig:
        if self.frontier_share + self.control_share > 1.0:
            raise ValueError(
                f"select.frontier_share={self.frontier_share:g} and select.control_share={self.control_share:g} must "
                "add up to at most 1: lower one of them."
            )
        return self


class PlannerConfig(Section):
    """Step 4, MPC inside the world model."""

    kind: Literal["actor", "gradient", "mpc", "greedy_q"] = "mpc"
    """mpc: the paper's, plans are sampled; gradient: MPC whose plans climb the gradient of the score, through world
    model and V; actor: a network climbs that score for all states at once, beforehand (section actor); greedy_q: the
    sample with the best Q(s, a), no look-ahead (the control). What an actor does, a policy can learn; gradient plans
    are too jagged for that where episodes can end early (docs/notes.md)."""
    iterations: PositiveInt = 6
    """Steps of the climb (gradient)."""
    reach: Reach = 0.3
    """How far a plan's actions may lie from the behaviour policy's, in units of what the log's actions
    use of their bounds (gradient)."""
    candidates: PositiveInt = 256
    """N, action sequences a step and state (mpc, greedy_q). Rounded up to a multiple of world_model.elites."""
    horizon: PositiveInt = 5
    """H, model steps a plan looks ahead. Longer sees further and compounds model error."""
    noise_std: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Std of the Gaussian noise around the behaviour policy's actions, in units of what the log's actions use of their
    bounds (mpc, greedy_q)."""
    temperature: PositiveFloat = 0.1
    """lambda of MPPI, on scores standardised over the candidates: near 0 takes the best, large averages all (mpc)."""
    disagreement_penalty: NonNegativeFloat = 0.0
    """Multiple of the std over the elites that is taken off a score: of the whole plan's (gradient) or of the value of
    its first step (mpc)."""
    precision: Precision = "float32"
    """Of the matrix products inside a plan; bfloat16 is nearly twice as fast. Imagined steps themselves are float32."""

    def read_by_kind(self) -> dict[str, Any]:
        """Return the fields that plans of this kind depend on: another's change nothing."""
        return self.model_dump(mode="json", include={"kind", *_READ_BY_KIND[self.kind]})


_READ_BY_KIND = {
    "mpc": {"candidates", "horizon", "noise_std", "temperature", "disagreement_penalty", "precision"},
    "gradient": {"iterations", "reach", "horizon", "disagreement_penalty", "precision"},
    "actor": {"horizon"},
    "greedy_q": {"candidates", "noise_std", "precision"},
}


class ActorConfig(Section):
    """Step 3, the actor that learns the planner's score by heart inside the world model (planner.kind=actor)."""

    reaches: Annotated[tuple[Reach, ...], Field(min_length=1)] = (0.075, 0.15, 0.3)
    """How far its actions may lie from the behaviour policy's, in units of what the log's actions use of their bounds.
    An actor learns for each; the largest is kept where it gains nearly as much as the best inside the world model,
    else the best. Large ones leave what a narrow log lets the world model know; small ones cannot mend a behaviour
    policy that fails."""
    rounds: PositiveInt = 20
    """Times for each reach that the actor is rolled out, V learns what came of it, and the actor climbs the score with
    that V."""
    starts: PositiveInt = 1000
    """States rolled out a round, rounded up to a multiple of world_model.elites."""
    length: PositiveInt = 100
    """Imagined steps of each."""
    discount: OpenFraction = 0.997
    """gamma of the actor's score and of its V; data.discount where that is larger. An end that is 400 steps away costs
    next to nothing at 0.99, and speed pays at once."""
    carried: Fraction = 0.5
    """Share of the roll-outs that go on where others of the round before ended, so that the actor learns where it gets
    to; the others start at states of the log."""
    noise_std: Fraction = 0.1
    """Std of Gaussian noise on the actions of every second roll-out, in units of what the log's actions use of their
    bounds."""
    trace: Fraction = 0.98
    """lambda of the returns that V learns: 0 asks V after one step, 1 only at the end."""
    value_updates: PositiveInt = 300
    """Gradient updates of V a round."""
    updates: PositiveInt = 200
    """Gradient updates of the actor a round."""
    batch_size: PositiveInt = 256
    """States an update of the actor, shared among the elites."""
    learning_rate: PositiveFloat = 3e-4
    """Adam's step size for the actor."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.998
    """Decay of the moving average of the actor's weights, which is what is rolled out."""
    episodes: PositiveInt = 60
    """Whole episodes that each round's actor plays inside the world model; the best round is kept."""


class ImagineConfig(Section):
    """Step 4, imagined segments and the files they lie in."""

    length: PositiveInt = 10
    """L, imagined steps a segment at most."""
    uncertainty: Literal["spread", "primal", "dual"] = "spread"
    """U of a step. primal, dual: mean geometric Jensen-Shannon divergence over elite pairs (the paper's); spread: the
    error to expect, the elites' own predicted variance included."""
    shard_size: PositiveInt = 500
    """Segments a shard: one shard is one task for an actor and one file."""


class AcceptConfig(Section):
    """Step 4, which imagined segments count. Applied when shards are read: a sweep over these imagines nothing anew."""

    survival: OpenFraction = 0.5
    """Share of the held-out real L-step windows from states of high regret that the uncertainty threshold kappa lets
    pass whole; sets kappa."""
    threshold: PositiveFloat | None = None
    """kappa itself, in units of U; overrides survival. Carries over to no other task."""
    min_length: PositiveInt = 3
    """Steps that must be left after the cut, in [1, imagine.length]."""
    margin: NonNegativeFloat | None = 0.2
    """An accepted segment beats the data and V(s_0) by this many standard deviations of V. null: none has to, which
    suits an actor, whose worth whole imagined episodes have shown."""
    range_margin: NonNegativeFloat = 0.05
    """Imagined observations and rewards may leave the log's range by this share of it."""
    share: Fraction = 1.0
    """Share of the accepted segments that are used, drawn at random: for a curve of gain against volume."""


class PolicyConfig(Section):
    """Step 5, the causal Transformer."""

    context: PositiveInt = 20
    """K, steps the policy sees: prompt, observation and action of each."""
    tokens: Literal["step", "separate"] = "step"
    """step: one token a step, of prompt, observation and the action before; separate: three (the paper's), at three
    times the cost."""
    layers: PositiveInt = 4
    """Blocks."""
    heads: PositiveInt = 4
    """Attention heads a block."""
    width: PositiveInt = 256
    """Model width; must be a multiple of heads."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout in training, of the sum into each block."""
    timesteps: Literal["window", "episode"] = "window"
    """From where a step's learned embedding counts. window: from the start of the K steps; episode (the paper's): from
    the start of the episode, of which late steps are learned from the few episodes that reach them."""
    max_timestep: PositiveInt = 1000
    """Embeddings at most where timesteps=episode; later steps share the last one, as do those that hardly an episode of
    the log reaches."""

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        if self.width % self.heads:
            raise ValueError(
                f"policy.width={self.width} must be a multiple of policy.heads={self.heads}: change one of them."
            )
        if self.timesteps == "episode" and self.context > self.max_timestep:
            raise ValueError(
                f"policy.context={self.context} must be at most policy.max_timestep={self.max_timestep}: lower "
                "policy.context or raise policy.max_timestep."
            )
        return self

    @property
    def told_apart(self) -> int:
        """Timesteps with an embedding of their own."""
        return self.context if self.timesteps == "window" else self.max_timestep


class DistillConfig(Section):
    """Step 5, distilling the log and the plans into the policy."""

    updates: PositiveInt = 50_000
    """Gradient updates."""
    batch_size: PositiveInt = 128
    """Windows an update, over all workers."""
    learning_rate: PositiveFloat = 3e-4
    """AdamW's step size after warm-up; falls to a tenth along a cosine."""
    warmup: NonNegativeInt = 500
    """Updates over which the step size rises from zero."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Norm that the gradient is clipped to."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the moving average of the weights, which is the policy that is kept; 0 keeps the last weights."""
    snapshots: PositiveInt = 4
    """Policies kept along the way, at equal distances, the last one included; evaluation scores each."""
    eta: NonNegativeFloat = 0.0
    """Weight of the value term - eta * Q(s, pi) / scale, for a log whose actions use their bounds (it falls with the
    square of what they use); 0 leaves it out. Pays where Q is good on every action, as on small tasks (0.2), harms
    where it is not (docs/notes.md): sweep 0.02, 0.1, 0.5."""
    eta_warmup: Fraction = 0.2
    """Share of the updates over which eta rises from zero: a random policy asks Q where no data lies."""
    critic_scale: Literal["std", "mean_abs"] = "std"
    """What Q is divided by: the spread of Q(s, .) over actions as far from one another as the log's, or mean |Q| (the
    paper's; not shift-invariant)."""
    imagined_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    """Share of the imitated positions that are imagined; no more than the share of segments that pass the tests, since
    where few pass, most of these pass by the errors of model and values. Of the loss it is more where plans weigh
    more (data_temperature)."""
    reuse_cap: PositiveFloat = 10.0
    """An imagined step is drawn at most this many times as often as a real one; lowers imagined_ratio where
    few passed."""
    data_temperature: NonNegativeFloat = 1.0
    """Real steps are imitated with weight min(exp(this * A / mean|A|), 20) / mean; 0 weighs all alike (the paper)."""
    advantage_lambda: Fraction = 0.9
    """lambda of that advantage: 0 looks one step ahead and trusts V there, 1 takes the return the episode came to."""
    prompt: Literal["value", "outcome", "fixed", "none"] = "value"
    """What the policy is conditioned on. value: V(s); outcome: the return-to-go that followed, V's upper expectile when
    acting; fixed: raw return-to-go and a hand-set target, as Decision Transformer; none: nothing."""
    target_return: float | None = None
    """Raw return asked for at run time by prompt=fixed; the log's best episode where not given. Like every prompt it is
    clipped to the range that training saw, up to 99.9 % of the log's returns-to-go."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.target_return is not None and self.prompt != "fixed":
            raise ValueError(
                f"distill.target_return={self.target_return:g} is asked for by distill.prompt=fixed alone, but it is "
                f"{self.prompt}: set distill.prompt=fixed, or leave distill.target_return out."
            )
        return self


class CorrectConfig(Section):
    """Step 5, where planner.kind=actor: the distilled policy walks inside the world model, the actor says what it would
    do there, and the policy learns that too (DAgger, arXiv:1011.0686)."""

    rounds: NonNegativeInt = 2
    """Times that it does so. 0: what was distilled first is kept, whose errors come back with each stride and lead to
    where no plan has been."""
    walks: PositiveInt = 200
    """Episodes a round, from first observations of the log, every second one with the actor's noise; rounded up to a
    multiple of world_model.elites."""
    length: PositiveInt = 500
    """Imagined steps of each at most."""
    updates: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Gradient updates after each round, as a share of distill.updates."""


class ChooseConfig(Section):
    """Step 6, which policy is kept: the first that does as well as the best inside the world model; first come those
    distilled with plans, the latest before earlier ones."""

    episodes: NonNegativeInt = 200
    """Episodes that each candidate plays inside the world model. 0: the last policy of distillation is kept."""
    length: PositiveInt = 1000
    """Imagined steps of each; no more than the log's limit of time, where it shows one. Whole episodes: half of one
    prefers who is fast and falls later."""
    noise_std: Fraction = 0.1
    """Std of Gaussian noise on each action, in units of what the log's actions use of their bounds."""
    known: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999
    """Share of held-out steps that the world model knows: a step more uncertain than these, and than 1.5 medians, halts
    an imagined episode, and the rest of it earns as little as the worst hundredth of the log, never more than 0."""
    tolerance: NonNegativeFloat = 2.0
    """Standard errors by which a policy may fall short of the best, in pairs of imagined episodes that begin alike, and
    still be kept if it comes first. 0: the best."""
    without_imagination: bool = True
    """Also distil from the log alone, and keep that policy where plans did harm; twice the cost of distillation."""


class FittedQConfig(Section):
    """Step 7, the policy's value on held-out episodes, by fitted-Q evaluation: what is left without an environment."""

    updates: NonNegativeInt = 0
    """Gradient updates of Q under the policy, from the values' Q and in networks of its size; 0: not done. As many as
    values.updates is ample."""


class EvaluateConfig(Section):
    """Step 7, the policy in the real environment."""

    episodes: PositiveInt = 20
    """Episodes, all advancing together."""
    environment: str | None = None
    """A Gymnasium id (`Name-v0`, or `package:Name-v0`, which imports the package first) or `package.module:function`
    that makes the environment, known by its name alone; the log's own where not given."""
    seed: NonNegativeInt = 1000
    """First seed of the environments; episode i uses seed + i."""
    max_steps: PositiveInt | None = None
    """Steps an episode at most; where not given the environment's own limit, or the log's where it has none."""
    candidates: PositiveInt = 1
    """Actions that Q ranks at every step: the policy's own, and noisy ones around it. 1: the policy's own is taken."""
    candidate_std: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Std of that noise, in halves of the bounds' width."""


class RuntimeConfig(Section):
    """How the work is carried out. In no key: changes nothing that is computed, but for the rounding of sums, which go
    by the threads and workers of distillation."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine, no ray needed; ray: actors and Ray Train workers."""
    address: str | None = None
    """Ray cluster to join (`auto`, `ray://...`, host:port); a cluster of this machine where not given."""
    device: str = "auto"
    """Torch device of every step; auto: cuda where there is one, else cpu."""
    workers: Annotated[int, Field(ge=1, le=SLICES)] = 1
    """Distillation workers of the ray engine; batch and data are shared among them."""
    min_workers: Annotated[int, Field(ge=0, le=SLICES)] = 0
    """Distillation goes on with as few as these while nodes are missing, and with up to `workers` once they are back;
    0: never with fewer than `workers`."""
    actors: NonNegativeInt = 0
    """Imagination actors (ray) or processes (local; on cuda always one) at most; 0: as many as there are cores, or on a
    cluster GPUs on cuda, and on an autoscaled one as many again, as often as they find room. Never more than shards
    wait."""
    min_actors: NonNegativeInt = 0
    """Imagination actors (ray) that are kept until the last shard is done; 0: each goes when no shard waits."""
    gpus_per_actor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU an imagination actor takes, on cuda."""
    threads: PositiveInt = 1
    """CPU threads of a values, world-model and imagination worker. Fixed, since the order of sums depends on it."""
    train_threads: NonNegativeInt = 0
    """CPU threads a distillation worker; 0: all cores over the workers."""
    actor_labels: str = ""
    """Ray node labels, `name=value` with commas between, that a node must have for any step but distillation, such as
    `ray.io/market-type=spot`; any node where empty."""
    worker_labels: str = ""
    """The same for distillation workers, and for the trials of a sweep, which a lost node sets back by more."""
    store: str | None = None
    """Where artifacts shared by runs lie; `store` beside the runs where not given."""
    checkpoint_seconds: PositiveFloat = 30.0
    """Seconds between checkpoints of a training: what a kill can cost."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases logging."""
    wandb_project: str = "ipd_ray"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group, such as a sweep's; the dataset's name where not given."""
    tensorboard: bool = False
    """TensorBoard event files in the run folder."""

    @model_validator(mode="after")
    def _check(self) -> RuntimeConfig:
        if self.address and self.engine == "local":
            raise ValueError(
                f"runtime.address={self.address!r} names a Ray cluster, but runtime.engine=local: set "
                "runtime.engine=ray, or leave runtime.address out."
            )
        return self

    @field_validator("actor_labels", "worker_labels")
    @classmethod
    def _check_labels(cls, labels: str, info: ValidationInfo) -> str:
        if not _LABELS.fullmatch(labels):
            raise ValueError(
                f"runtime.{info.field_name}={labels!r} must be name=value pairs with commas and no spaces between, "
                "such as ray.io/market-type=spot: `ray start --labels` and the files in cluster/ give nodes theirs."
            )
        return labels


class RunConfig(Section):
    """A whole run. `ipd-ray config` prints this with every bound."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is learned or sampled."""
    ablations: tuple[Literal["bc", "no_imagination"], ...] = ()
    """Also distilled and evaluated: bc (imitation alone, no prompt), no_imagination (the policy without D_aug)."""
    data: DataConfig = DataConfig()
    values: ValuesConfig = ValuesConfig()
    world_model: WorldModelConfig = WorldModelConfig()
    select: SelectConfig = SelectConfig()
    planner: PlannerConfig = PlannerConfig()
    actor: ActorConfig = ActorConfig()
    imagine: ImagineConfig = ImagineConfig()
    accept: AcceptConfig = AcceptConfig()
    policy: PolicyConfig = PolicyConfig()
    distill: DistillConfig = DistillConfig()
    correct: CorrectConfig = CorrectConfig()
    choose: ChooseConfig = ChooseConfig()
    fitted_q: FittedQConfig = FittedQConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.accept.min_length > self.imagine.length:
            raise ValueError(
                f"accept.min_length={self.accept.min_length} must lie in [1, imagine.length={self.imagine.length}]: "
                "lower accept.min_length or raise imagine.length."
            )
        if 0 < self.runtime.actors < self.runtime.min_actors:
            raise ValueError(
                f"runtime.min_actors={self.runtime.min_actors} must be at most runtime.actors={self.runtime.actors}: "
                "lower runtime.min_actors, or raise runtime.actors (0: no limit)."
            )
        if self.runtime.workers > self.distill.batch_size:
            raise ValueError(
                f"runtime.workers={self.runtime.workers} must be at most distill.batch_size="
                f"{self.distill.batch_size}: every worker needs a window of the batch."
            )
        if self.runtime.min_workers > self.runtime.workers:
            raise ValueError(
                f"runtime.min_workers={self.runtime.min_workers} must be at most runtime.workers="
                f"{self.runtime.workers}: lower runtime.min_workers or raise runtime.workers."
            )
        if self.runtime.engine == "local" and self.runtime.workers > 1:
            raise ValueError(
                f"runtime.workers={self.runtime.workers} needs runtime.engine=ray: the local engine distils in one "
                "worker."
            )
        return self


def label_selector(labels: str) -> dict[str, str]:
    """Return `runtime.actor_labels` or `runtime.worker_labels` as {name: value}."""
    return dict(pair.split("=") for pair in labels.split(",") if pair)


def preset_names() -> list[str]:
    """Return the names that `--preset` takes."""
    folder = importlib.resources.files("ipd_ray") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def preset(name: str) -> dict[str, Any]:
    """Return what a preset changes, as a nested mapping. Raises UserError for an unknown name."""
    if name not in preset_names():
        raise UserError(
            f"--preset {name!r} must be one of {', '.join(preset_names())}.{near_name(name, preset_names())}"
        )
    text = (importlib.resources.files("ipd_ray") / "presets" / f"{name}.yaml").read_text()
    return from_yaml(text) or {}


def field_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every knob, in order."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from field_names(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: off and no are text, 3e-4 is a number. A name stands once in a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def from_yaml(text: str) -> Any:
    """Return what a YAML text holds, scalars read as YAML 1.2 does."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of a nested mapping of sections; a section without any field changes nothing."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if not isinstance(name, str):
            raise UserError(f"{prefix}{name!r} is {type(name).__name__}, but fields are named by text.")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif value is None and any(known.startswith(f"{prefix}{name}.") for known in field_names()):
            continue
        else:
            flat[prefix + name] = value
    return flat


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return {dotted name: value} of `name=value` words; values are read as YAML."""
    flat: dict[str, Any] = {}
    for word in overrides:
        name, sep, text = word.partition("=")
        if not sep:
            raise UserError(f"{word!r} is not an override: write it as section.field=value, such as planner.horizon=8.")
        try:
            flat[name] = from_yaml(text) if text else None
        except yaml.YAMLError as error:
            raise UserError(f"{name}={text!r} is not a YAML value: {str(error).splitlines()[0]}.") from error
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a config file's content as a nested mapping. Raises UserError where it cannot be read as one."""
    try:
        content = from_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--config {path} does not exist: `ipd-ray config > {path}` writes one to edit.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold a mapping of sections, not {type(content).__name__}.")
    return content


def build(*layers: Mapping[str, Any]) -> RunConfig:
    """Merge layers of {dotted name: value}, later ones winning, and check the whole.

    Raises:
        UserError: an unknown name (with the near name), or a value out of its bounds.
    """
    valid = list(field_names())
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in valid:
                section = name.split(".")[0]
                raise UserError(
                    f"{name!r} is no field of the config.{near_name(name, valid)} "
                    f"`ipd-ray config` lists all of them"
                    + (
                        f"; {section} is a section, its fields are named {section}.<field>."
                        if "." not in name and any(v.startswith(section + ".") for v in valid)
                        else "."
                    )
                )
            merged[name] = value
    nested: dict[str, Any] = {}
    for name, value in merged.items():
        *sections, leaf = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        errors = error.errors()
        inside = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
        # A list is called too short where what it holds is wrong: only the latter is said.
        raise UserError("\n".join(_explain(e, merged) for e in errors if e["loc"] not in inside)) from None


def load(preset_name: str | None = None, path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of a preset, a file over it, and dotted overrides over both."""
    return build(given(preset_name, path, overrides))


def given(
    preset_name: str | None = None, path: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Return {dotted name: value} of what a user said: a preset, a file over it, and overrides over both."""
    return {
        **(flatten(preset(preset_name)) if preset_name else {}),
        **(flatten(read_yaml(path)) if path else {}),
        **parse_overrides(overrides),
    }


def _explain(error: Any, given: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    value = given.get(name, error.get("input"))
    return f"{name}={value!r} is not valid: {error['msg'].lower()}. `ipd-ray config` shows its meaning and bounds."


def as_yaml(config: RunConfig) -> str:
    """Return the config as YAML, each field under its meaning and bounds, ready to edit and to pass to --config."""
    lines: list[str] = []

    def add(section: BaseModel, indent: str) -> None:
        for name, info in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, Section):
                lines.extend(["", f"{indent}{name}:  # {_oneline(type(value).__doc__)}"])
                add(value, indent + "  ")
                continue
            for text in (info.description or "").splitlines():
                lines.append(f"{indent}# {text.strip()}")
            plain = section.model_dump(mode="json")[name]
            dumped = (
                f"{name}: " + yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            )
            bounds = _bounds(info.annotation, info.metadata)
            lines.append(f"{indent}{dumped}" + (f"  # {bounds}" if bounds else ""))

    add(config, "")
    return "\n".join(lines).strip() + "\n"


def _oneline(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _bounds(annotation: Any, metadata: Sequence[Any]) -> str:
    parts = []
    for item in [*metadata, *getattr(annotation, "__metadata__", ())]:
        for sign, attribute in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
            bound = getattr(item, attribute, None)
            if bound is not None:
                parts.append(f"{sign} {bound:g}")
        parts.extend(
            _bounds(None, getattr(item, "metadata", ())).split(", ") if getattr(item, "metadata", None) else []
        )
    choices = getattr(annotation, "__args__", ())
    if not parts and choices and all(isinstance(c, str) for c in choices):
        parts.append("one of " + " | ".join(choices))
    return ", ".join(parts)
