"""Guidance reuse: which guidance branch a step follows, and what it takes from it.

The guidance branch that is called first at a step is the reference of the others. If it computed the step, another
branch uses

    residual of the reference at this step + (own residual - residual of the reference)

in place of running its blocks. The difference in parentheses is that of the last step that both computed or, with a
forecaster, the forecast of it from such steps: it changes more slowly than the residuals, and almost linearly. If the
reference reused the step, the other branch takes its residual diff, so that both reuse. If only one of them computed,
guidance would multiply the error of the other one instead of cancelling a part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cachedit_fx.config.cache_config import CacheConfig, CacheType
from cachedit_fx.passes.analysis.runtime_plan import RegionPlan
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.policies import Decision, History, Progress, by_guidance
from cachedit_fx.policies.guided_steps import num_guidance_warmup_steps
from cachedit_fx.runtime.cached_values import CachedValue
from cachedit_fx.runtime.guidance_branch import LOOP_START, GuidanceBranchKey, LoopPosition
from cachedit_fx.runtime.scheduler_run import SchedulerRun
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.snapshot import Difference, RegionState

log = logging.getLogger(__name__)


class Reference(NamedTuple):
    """The first guidance branch of a step, as a later one sees it in one region.

    Attributes:
        session: The number of the first step of its session, which identifies the session.
        is_computed: Whether it computed the step.
        diff: Its residual diff at the step; None if it was not measured or if the step is computed.
        residuals: Its residuals at the step; empty if the step is reused.
    """

    session: int
    is_computed: bool
    diff: float | None
    residuals: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Unguided:
    """Why no step can follow another guidance branch.

    Attributes:
        name: The kind of reason; each is reported once per module.
        found: What was found, as a clause.
        cure: What the user can do.
    """

    name: str
    found: str
    cure: str


OFF = "set guidance_reuse='off' for this model"
ALONE = Unguided(
    "alone",
    "the model is called once per step: pipelines that pass both guidance branches in one batch (SD3, CogVideoX) and "
    "models without guidance have no second call",
    OFF,
)
AMBIGUOUS = Unguided(
    "ambiguous",
    "it is not known which calls are the guidance branches of one request",
    "give the calls labels (transformer.cache_context), or name the request (cachedit_fx.session); more than two "
    "guidance branches need labels",
)
OTHER_SIZES = Unguided("sizes", "the residuals of the guidance branches differ in shape or dtype", OFF)


def why_never(config: CacheConfig, name: str, roles: Sequence[str], groups: Sequence[object]) -> Unguided | None:
    """Why a region never follows another guidance branch, whatever calls there are; None if it may.

    Args:
        name: The name of the region.
        roles: The roles of its live-outs.
        groups: The process groups whose ranks decide alike about it.
    """
    if config.cache_type == CacheType.DBPrune:
        return Unguided("pruning", "cache_type='DBPrune' decides about every block on its own", OFF)
    if groups:
        return Unguided("ranks", "several ranks run the region, and have to decide alike", OFF)
    main = HIDDEN if HIDDEN in roles else next(iter(roles), HIDDEN)
    other = next((role for role in roles if role != main and not role.startswith("output")), None)
    if other is None:
        return None
    return Unguided(
        "streams",
        f"{other} leaves {name}, too, and one prompt's tokens say nothing about another's",
        f"{OFF}, or use one region and Bn_compute_blocks=0 if that leaves only hidden_states",
    )


def find_reference(
    mine: Session,
    sessions: Iterable[Session],
    loop_positions: Mapping[GuidanceBranchKey, LoopPosition],
    scheduler_run: SchedulerRun | None,
    timestep: float | None,
) -> Session | Unguided | None:
    """The session of the guidance branch that was called first at this step of the same request.

    Args:
        mine: The session of the running step.
        sessions: All sessions of the module.
        loop_positions: The loop positions of their guidance branches.
        scheduler_run: The scheduler's run that the step belongs to.
        timestep: The timestep of the step.

    Returns:
        None if no other branch has been called at this step yet, which is then the reference of the others.
    """
    key = mine.key.guidance_branch

    def position(session: Session) -> LoopPosition:
        return loop_positions.get(session.key.guidance_branch, LOOP_START)

    def is_partner(session: Session) -> bool:
        other = session.key.guidance_branch
        is_same = (other.owner, other.who, session.key.ordinal) == (key.owner, key.who, mine.key.ordinal)
        return is_same and other != key and position(session).continues_in(scheduler_run)

    def is_at_this_step(session: Session) -> bool:
        there = position(session)
        is_same_step = there.scheduler_run is None or not there.is_next_step(scheduler_run)
        has_index = scheduler_run is not None and scheduler_run.step_index is not None
        return is_same_step and session.snapshot.timestep == timestep and (timestep is not None or has_index)

    partners = [session for session in sessions if is_partner(session)]
    if not partners:
        return ALONE
    # Calls since the last call of this branch. Sessions of an earlier request may still exist.
    recent = [s for s in partners if s.last > mine.last and (mine.last or is_at_this_step(s))]
    labels = [key.label, *(session.key.guidance_branch.label for session in recent)]
    is_request_known = mine.is_named or scheduler_run is not None
    if len({*labels}) < len(labels) and not (is_request_known and labels == [None, None]):
        return AMBIGUOUS
    return min(filter(is_at_this_step, recent), key=lambda session: session.last, default=None)


class Report:
    """The reasons why steps of a module did not follow another guidance branch, each reported once."""

    def __init__(self) -> None:
        self._found: dict[str, Unguided] = {}

    def add(self, why: Unguided) -> None:
        """Warns of a reason, unless it was reported before."""
        if why.name in self._found:
            return
        self._found[why.name] = why
        log.warning(
            "cachedit_fx: guidance_reuse='difference' has no effect on steps of this model.\n"
            "  expected: a call for each of two guidance branches at every step, whose residuals can be compared\n"
            "  found:    %s\n"
            "What it costs: these steps are decided as with guidance_reuse='off'.\n"
            "What to do: %s.",
            why.found,
            why.cure,
        )

    @property
    def notes(self) -> list[str]:
        """One sentence for every reason."""
        return [
            f"guidance_reuse='difference' had no effect on some steps: {why.found}." for why in self._found.values()
        ]


@dataclass(slots=True)
class Following:
    """A region at a step that follows another guidance branch.

    Attributes:
        reference: The first guidance branch of the step.
        differences: The differences from it, one cached value per live-out. Empty if the two branches cannot be
            compared, because they have not computed one step together yet, or because their residuals differ in shape.
        residuals: The residuals of a guided step, once they are computed.
    """

    reference: Reference
    differences: tuple[CachedValue, ...] = ()
    residuals: tuple[torch.Tensor, ...] = ()

    def decide(
        self, config: CacheConfig, history: History, diff: float, progress: Progress | None = None
    ) -> Decision | None:
        """The decision for a step that the reference computed; None if the step is decided like any other."""
        return by_guidance(config, history, diff, progress) if self.differences else None


def follow(
    plan: RegionPlan,
    config: CacheConfig,
    state: RegionState,
    find: Callable[[], Session | Unguided | None],
    report: Report,
) -> Following | None:
    """How a region follows the guidance branch that was called first at this step; None if it does not.

    Args:
        state: The state of the region before the step.
        find: Finds the session of that branch (see `find_reference`).
        report: Receives the reasons, from the first step that might have followed another branch.
    """
    found = why_never(config, plan.name, plan.roles, plan.groups) or find()
    reference = _as_reference(found, plan.name) if isinstance(found, Session) else None
    differences = _differences(state.difference, reference) if reference is not None else ()
    for why in (found, differences):
        # At the first step of a generation, no branch has computed a difference yet, nor may its partner be known.
        if isinstance(why, Unguided) and state.history.num_steps >= max(1, num_guidance_warmup_steps(config)):
            report.add(why)
    if reference is None:
        return None
    return Following(reference, () if isinstance(differences, Unguided) else differences)


def _as_reference(session: Session, region: str) -> Reference | None:
    """What a session shows of its last step in a region; None if nothing can follow it."""
    state = session.snapshot.regions.get(region)
    if state is None or not state.decisions or state.decisions[-1].is_guided:
        return None
    decision = state.decisions[-1]
    diff = state.diffs[-1] if decision.probed and not decision.compute else None
    return Reference(session.first, decision.compute, diff, state.difference.own if decision.compute else ())


def _differences(difference: Difference, reference: Reference) -> tuple[CachedValue, ...] | Unguided:
    if not reference.is_computed or not difference.own:
        return ()
    if not are_alike(reference.residuals, difference.own):
        return OTHER_SIZES
    is_comparable = difference.session == reference.session
    return difference.values if is_comparable and are_alike(difference.lasts, difference.own) else ()


def are_alike(*streams: Sequence[torch.Tensor | None]) -> bool:
    """Whether the residuals of several branches can be added: every live-out has one shape, dtype and device."""
    return len({*map(len, streams)}) == 1 and all(map(_have_one_kind, zip(*streams, strict=True)))


def pairs_of(
    residuals: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The residuals of two branches that are alike, live-out by live-out."""
    pairs = zip(residuals, others, strict=True)
    return [(one, other) for one, other in pairs if one is not None and other is not None]


def _have_one_kind(tensors: Sequence[torch.Tensor | None]) -> bool:
    kinds = {(t.shape, t.dtype, t.device) if t is not None and t.is_floating_point() else None for t in tensors}
    return len(kinds) == 1 and None not in kinds
