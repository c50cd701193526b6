"""Every case with its expected outcome: `str(CASES[name].outcome)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cachedit_fx.patterns import Cause
from tests.researchers import audio, dit, dit_blocks, dit_calls, dit_loops, feature_maps, mmdit, uvit, video
from tests.researchers.case import BATCH, Cached, Case, Refused, text
from tests.researchers.port_reference import BRANCH, PAIR, Port


def found(path: str, depth: int, pattern: str) -> Cached:
    """The outcome in which all blocks are in one list."""
    return Cached(f"{path}[1:{depth}]", f"{path}[2:{depth - 1}]", pattern)


def keyed(*, like: bool) -> Port:
    """Both streams are entries of the first argument and of the result; `like` if these have other entries."""
    return Port(((0, "img"), (0, "txt")), (("img",), ("txt",)), like=(0,) if like else None)


FOUR = found("blocks", dit.DEPTH, "3")
# With a graph break, no graph contains the whole loop. The bare backend gets one graph after the other and cannot say
# where the break is; `enable_cache` observes the whole call.
BROKEN = Refused(Cause.NO_CHAIN, r"Dynamo ended the graph at .* change the code at this place|TORCH_LOGS=graph_breaks")


def stops_at(where: str) -> Refused:
    found = rf"Dynamo captured \d graphs instead of one \(the first graph ends at {where}, "
    return Refused(None, rf"{found}.*write a patch functor")


# Sizes that depend on the data. `enable_cache` sets this option itself.
CAPTURE_SIZES = (("capture_dynamic_output_shape_ops", True),)

dit_case = partial(Case, outcome=FOUR)
# The return statement does not define an order for the entries of a dict or a list.
UNORDERED = found("double_blocks", mmdit.DEPTH, "0 or 1")
mmdit_case = partial(
    Case,
    outcome=found("double_blocks", mmdit.DEPTH, "0"),
    latents=(BATCH, mmdit.TOKENS, mmdit.CHANNELS),
    prompt=text,
    port=PAIR,
)
uvit_case = partial(Case, latents=(BATCH, dit.CHANNELS, dit.SIDE, dit.SIDE))
video_case = partial(Case, prompt=text, latents=(BATCH, video.CHANNELS, video.FRAMES, video.SIDE, video.SIDE))
audio_case = partial(
    Case, outcome=found("layers", audio.DEPTH, "2"), prompt=text, latents=(BATCH, audio.MELS, audio.LENGTH)
)
maps_case = partial(Case, outcome=found("stages", feature_maps.DEPTH, "3"))


def by_keywords(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Any:
    return model(sample=x, sigma=t, class_labels=y, guidance=None)


HOLDERS = {
    "dit": Case(dit.DiT, FOUR),
    "dit-setattr-and-plain-list": Case(dit.SetattrDiT, found("_blocks", 4, "3")),
    "dit-getattr-of-numbered-names": Case(dit.GetattrDiT, found("layer", 4, "3")),
    "dit-module-dict": Case(dit.ModuleDictDiT, found("blocks.block", 4, "3")),
    "dit-sequential-iterated": dit_case(dit.IteratedSequentialDiT),
    "dit-trunk": Case(dit.TrunkDiT, found("trunk.layers", 4, "3")),
    "dit-in-a-wrapper": Case(dit.EDMPrecond, found("model.blocks", 4, "3")),
    "dit-one-block-for-all": Case(dit.AlbertDiT, found("shared_block", 4, "3")),
    "dit-same-object-in-list": dit_case(dit.RepeatedDiT),
    "dit-blocks-run-twice": Case(dit.TwiceDiT, found("blocks", 8, "3")),
    "dit-shared-modulation": dit_case(dit.SharedModulationDiT),
}
BLOCKS = {
    "dit-augmented-assignment": dit_case(dit_blocks.AugmentedDiT),
    "dit-add-in-place": dit_case(dit_blocks.InPlaceDiT),
    "dit-second-addition-in-place": dit_case(dit_blocks.HalfInPlaceDiT),
    "dit-loop-adds-in-place": dit_case(dit_blocks.LoopAddsDiT, port=BRANCH, tolerance=1e-6),
    "dit-loop-adds": dit_case(dit_blocks.LoopAddsAnewDiT, port=BRANCH, tolerance=1e-6),
    "dit-checkpoint": dit_case(dit_blocks.CheckpointedDiT),
    "dit-checkpoint-reentrant": dit_case(dit_blocks.ReentrantDiT),
    "dit-checkpoint-of-a-closure": dit_case(dit_blocks.ClosureCheckpointedDiT),
    "dit-checkpoint-in-training-only": dit_case(dit_blocks.TrainingCheckpointedDiT),
    "dit-checkpoint-wrapper": dit_case(dit_blocks.WrappedDiT),
    "dit-checkpoint-of-segments": dit_case(dit_blocks.SegmentedDiT),
    "dit-forward-hooks": dit_case(dit_blocks.ScaledByHooksDiT),
    "dit-pre-hooks": dit_case(dit_blocks.PreHooksDiT),
    "dit-recording-hooks": Case(
        dit_blocks.RecordingDiT,
        found("blocks", 4, "4 or 5"),
        # A reused step does not compute the last block's output, which a hook recorded.
        call=lambda model, x, t, y: (model(x, t, y), *[*model.features.values()][:-1]),
    ),
    "dit-autocast-in-blocks": dit_case(dit_blocks.AutocastDiT),
    "dit-autocast-around-blocks": dit_case(dit_blocks.AutocastAroundDiT),
    "dit-autograd-function": dit_case(dit_blocks.FunctionDiT),
    "dit-custom-op": dit_case(dit_blocks.CustomOpDiT),
    "dit-weight-norm": dit_case(dit_blocks.WeightNormDiT),
    "dit-special-ends": dit_case(dit_blocks.SpecialEndsDiT),
    "dit-local-and-global": dit_case(dit_blocks.LocalGlobalDiT),
    "dit-registers": dit_case(dit_blocks.RegisterDiT),
    "dit-blocks-compiled": dit_case(dit_blocks.CompiledBlocksDiT),
    "dit-blocks-wrapped-by-compile": dit_case(dit_blocks.WrappedByCompileDiT),
    "dit-blocks-disabled": Case(dit_blocks.DisabledDiT, stops_at(r"dit\.py:\d+"), bare=BROKEN),
    "dit-reads-a-number-between-blocks": Case(dit_blocks.PrintingDiT, stops_at(r"dit_blocks\.py:\d+"), bare=BROKEN),
}
CALLS = {
    "dit-tuple-out": dit_case(dit_calls.TupleDiT),
    "dit-dict-out": dit_case(dit_calls.DictDiT),
    "dit-dataclass-out": dit_case(dit_calls.DataclassDiT),
    "dit-model-output": dit_case(dit_calls.ModelOutputDiT),
    "dit-features-out": dit_case(dit_calls.FeaturesDiT),
    "dit-decorated": dit_case(dit_calls.DecoratedDiT),
    "dit-no-grad-decorator": dit_case(dit_calls.InferenceModeDiT),
    "dit-keywords-only": dit_case(dit_calls.KeywordsDiT, call=by_keywords),
    "dit-args-kwargs": dit_case(dit_calls.VariadicDiT, call=lambda model, x, t, y: model(x, t=t, y=y)),
    "dit-all-by-args": dit_case(dit_calls.VariadicDiT),
    "dit-batch-dict": dit_case(dit_calls.BatchDiT, call=lambda model, x, t, y: model(dict(x=x, t=t, y=y))),
    "dit-guidance-inside": dit_case(dit_calls.GuidedDiT),
    "dit-scalar-time": dit_case(dit_calls.ScalarTimeDiT, timestep=torch.tensor),
    # Dynamo treats a number as a constant at first: only the second graph has it as an input.
    "dit-number-time": dit_case(
        dit_calls.NumberTimeDiT, timestep=float, decisions=("warmup", "timestep-still", "threshold-one")
    ),
    "dit-averaged-weights": Case(dit_calls.AveragedDiT, found("model.blocks", 4, "3")),
    "dit-unconditional": dit_case(dit_calls.UnconditionalDiT, call=lambda model, x, t, y: model(x, t)),
    "dit-positional-only": dit_case(dit_calls.PositionalDiT),
    "dit-keyword-only-blocks": dit_case(dit_calls.KeywordBlocksDiT, port=Port((("x",),))),
}
LOOPS = {
    # The first block has one input stream and two outputs; all later blocks have two streams.
    "dit-branch-and-residual": Case(
        dit_loops.FusedNormDiT, Refused(Cause.STREAM_COUNT, r"from block 0 to block 1 of blocks; found: no output")
    ),
    # In a reused step the loss is new only for the blocks that ran; it is not used without gradients.
    "dit-loss-summed": dit_case(
        dit_loops.SummedLossDiT, port=Port(((0,),), ((0,),)), call=lambda model, x, t, y: model(x, t, y)[0]
    ),
    "dit-loss-dropped": dit_case(dit_loops.DroppedLossDiT, port=Port(((0,),), ((0,),))),
    "dit-second-list-of-conditions": dit_case(dit_loops.ZippedDiT),
    "dit-conditions-handed-on": Case(dit_loops.RefinedConditionDiT, found("blocks", 4, "3")),
    "dit-stages": Case(dit_loops.StagesDiT, found("stages", 4, "3")),
    "dit-first-input-added": dit_case(dit_loops.FirstInputDiT),
    "dit-rolled": dit_case(dit_loops.ShiftedDiT),
    "dit-hyper-connections": dit_case(dit_loops.HyperDiT, port=BRANCH, tolerance=1e-6),
    "dit-slices": dit_case(dit_loops.SlicedDiT),
    "dit-norms-beside-blocks": dit_case(dit_loops.NormsBesideDiT, port=BRANCH, tolerance=1e-6),
    "dit-controls": dit_case(dit_loops.ControlledDiT, call=lambda m, x, t, y: m(x, t, y, dit_loops.CONTROLS)),
    "dit-bfloat16": dit_case(dit_loops.HalfPrecisionDiT),
    "dit-tokens-left-out": Case(
        dit_loops.EarlyTokensDiT,
        Refused(Cause.STREAM_COUNT, r"no output of block 0 has the same shape as any of its inputs"),
    ),
}
CONTAINERS = {
    "mmdit-dict": mmdit_case(mmdit.DictMMDiT, outcome=UNORDERED, port=keyed(like=False)),
    "mmdit-sequential-of-a-dict": mmdit_case(mmdit.BatchMMDiT, outcome=UNORDERED, port=keyed(like=True)),
    "mmdit-dataclass": mmdit_case(mmdit.DataclassMMDiT, outcome=UNORDERED, port=keyed(like=True)),
    "mmdit-named-tuple": mmdit_case(mmdit.NamedTupleMMDiT, outcome=UNORDERED, port=keyed(like=False)),
    "mmdit-list": mmdit_case(mmdit.ListMMDiT, outcome=UNORDERED, port=Port(((0, 0), (0, 1)), ((0,), (1,)))),
    "mmdit-kwargs-handed-on": mmdit_case(
        mmdit.PipelineOfKwargsMMDiT, outcome=UNORDERED, port=Port((("img",), ("txt",)), (("img",), ("txt",)), like=())
    ),
}
OTHERS = {
    "mmdit": mmdit_case(mmdit.MMDiT),
    "mmdit-both-streams-leave": mmdit_case(mmdit.BothLeaveMMDiT),
    "mmdit-joint": mmdit_case(mmdit.JointMMDiT, outcome=found("double_blocks", 4, "3"), port=Port()),
    "mmdit-batch-second": mmdit_case(mmdit.BatchSecondMMDiT, outcome=UNORDERED),
    "uvit": uvit_case(uvit.UViT, Cached("in_blocks[1:2]+out_blocks", "out_blocks[0:1]", "3"), ran={"f2b1": (3, 1)}),
    "uvit-one-list": uvit_case(uvit.OneListUViT, found("blocks", 5, "3")),
    "uvit-sequential-called": uvit_case(uvit.PlainViT, FOUR),
    # Pattern 2 would require that all blocks attend to the text.
    "video": video_case(video.Video, found("blocks", video.DEPTH, "3")),
    "video-two-lists-in-turns": video_case(
        video.TwoListVideo,
        found("spatial_blocks", video.TwoListVideo.pairs, "3"),
        ran={"f1b0": (2, 0), "f2b1": (4, 2)},
    ),
    "video-list-of-lists": video_case(
        video.PairedVideo,
        found("layers", video.PairedVideo.pairs, "3"),
        port=BRANCH,
        tolerance=1e-6,
        ran={"f1b0": (2, 0), "f2b1": (4, 2)},
    ),
    # One list whose blocks alternate between two shapes of the stream: no two neighbours have the same shape.
    "video-folded": video_case(
        video.FoldedVideo,
        Refused(Cause.STREAM_COUNT, r"no output of block 0 has the same shape as any of its inputs"),
    ),
    "audio": audio_case(audio.Audio),
    "audio-dense-experts": audio_case(audio.DenseExpertsAudio),
    "audio-top-k-dense": audio_case(audio.TopKDenseAudio),
    "audio-top-k-index-add": audio_case(audio.IndexAddAudio, bare=BROKEN),
    "audio-top-k-mask": audio_case(audio.MaskAudio, bare=BROKEN),
    "audio-top-k-mask-captured": audio_case(audio.MaskAudio, dynamo=CAPTURE_SIZES),
    "audio-written-back": audio_case(audio.WrittenBackAudio),
    "maps": maps_case(feature_maps.Maps),
    "maps-channels-last": maps_case(feature_maps.ChannelsLastMaps),
    "maps-hourglass": maps_case(feature_maps.HourglassMaps, outcome=found("stages", feature_maps.DEPTH + 2, "3")),
}
# The outcome of these does not depend on the surface, and hardly on the number of blocks that run.
TAKE_TURNS = {
    *BLOCKS,
    *CONTAINERS,
    *(name for name in CALLS if name.endswith("-out")),
    *("dit-loss-summed", "dit-loss-dropped", "dit-second-list-of-conditions", "dit-stages", "dit-rolled"),
    *("dit-controls", "dit-bfloat16", "dit-tokens-left-out"),
    *("audio-dense-experts", "audio-top-k-dense", "audio-top-k-mask-captured", "maps-channels-last"),
}
# With `enable_cache` the first step is a separate generation: its graph has the timestep as a constant, so the
# arguments of the call identify the generation, and class labels do not count as a conditioning. This costs one step.
BARE_ONLY = {"dit-number-time"}
CASES: dict[str, Case] = {**HOLDERS, **BLOCKS, **CALLS, **LOOPS, **CONTAINERS, **OTHERS}
