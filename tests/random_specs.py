"""The random properties of a model (`Spec`), and strategies that draw them: a transformer with some odd features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

BATCH, WIDTH = 2, 8
END = 99  # A skip with this target ends after the last block.
IMAGE_HOLDERS = ("all", "image", "joint")  # The values of `Blocks.holds` of lists that the image runs through.


@dataclass(frozen=True)
class Blocks:
    """A module list and the properties of its blocks.

    Attributes:
        holds: The streams that run through it: "all", the "image", the "text", the "joint" stream, or a "side" signal
            that is added to the image.
        body: How a block changes its streams: "add", "attention", "concat" (one map over all), "post-norm", "in-place",
            "expression" (the returned expression has no name), "branch" (one stream only: the model adds what it
            returns to what it took).
        looks: The streams that depend on the others: "each", "image", "text".
        takes_reversed, returns_reversed: Streams are taken or returned with the image last.
        emits: What a block returns beside its streams: nothing, a tensor made of its "stream", or of the "time" only.
        emits_first: The emitted tensor is the first one that is returned.
    """

    path: str
    depth: int = 3
    holds: str = "image"
    body: str = "add"
    looks: str = "each"
    takes_reversed: bool = False
    returns_reversed: bool = False
    emits: str = ""
    emits_first: bool = False


@dataclass(frozen=True)
class Work:
    """A line after image block `after` (counted over all lists).

    Attributes:
        kind: "control" adds an input that is new at every step, "in-place" does so with `+=`, "time" scales by the
            time embedding, "norm" normalizes, "adapter" adds the output of a module of another list for the image,
            "gate" scales by a number that is computed here from the time embedding and used again after the last
            block, "overwrite" replaces a part of the text.
    """

    after: int
    kind: str


@dataclass(frozen=True)
class Skip:
    """A skip connection: the image after block `source` is used before block `target`, or after the last block.

    Attributes:
        how: "add", "merge" (concatenated and projected) or "argument" (given to the block, which merges it).
    """

    source: int
    target: int
    how: str = "add"


@dataclass(frozen=True)
class Spec:
    """All random properties of a model.

    Attributes:
        names: Names of the streams in the model's code, the image first.
        tokens: Lengths of the streams.
        lists: In execution order.
        inner: The streams have other names in the blocks' code.
        context: All blocks read a sequence that is computed before them.
        time: All blocks read the time embedding.
        keywords: Blocks are called with keyword arguments.
        raw: The streams are the unchanged inputs of the model.
        late: The image is embedded as late as possible.
        joint_name: Name of the stream that the others are joined into; empty for the image's.
        text_first: The text is the first part of the joined stream.
        apart: How the joined stream is split: "image" (a slice), "both" (two slices), "split", "" (not at all).
        uses_text: The output also depends on the text.
        returns: What is returned beside the output: "" or "text" or "emitted".
        hints: The outputs of side lists are added before the image's blocks or between them.
        side_of_image: Side lists also start from the image.
        cast: The dtype of the blocks if it differs from the model's.
        again: "twice" calls the second block twice in a row, "loop" calls all blocks of the last list twice, "after"
            calls a part of the first block after the last, "shared" gives two blocks one weight, "same" uses one
            block in two positions.
    """

    names: tuple[str, ...] = ("hidden_states",)
    tokens: tuple[int, ...] = (6, 5, 4)
    lists: tuple[Blocks, ...] = (Blocks("blocks"),)
    works: tuple[Work, ...] = ()
    skips: tuple[Skip, ...] = ()
    inner: bool = False
    context: bool = False
    time: bool = True
    keywords: bool = False
    raw: bool = False
    late: bool = False
    joint_name: str = ""
    text_first: bool = True
    apart: str = "image"
    uses_text: bool = False
    returns: str = ""
    hints: str = "before"
    side_of_image: bool = False
    cast: str = ""
    again: str = ""

    @property
    def image(self) -> str:
        return self.names[0]

    @property
    def text(self) -> str | None:
        return self.names[1] if len(self.names) > 1 else None

    @property
    def image_lists(self) -> tuple[Blocks, ...]:
        """The lists that the image runs through."""
        return tuple(blocks for blocks in self.lists if blocks.holds in IMAGE_HOLDERS)

    @property
    def depth(self) -> int:
        """The number of blocks of these lists, each counted once."""
        return sum(blocks.depth for blocks in self.image_lists)

    @property
    def joint(self) -> str:
        return self.joint_name or self.image

    @property
    def parts(self) -> tuple[str, str]:
        """Names of the joined streams, in order."""
        text = self.text or ""
        return (text, self.image) if self.text_first else (self.image, text)

    def streams(self, blocks: Blocks) -> tuple[str, ...]:
        """Names of the streams that the blocks of a list take and return."""
        held = {"all": self.names, "image": self.names[:1], "text": self.names[1:2], "joint": (self.joint,)}
        return held.get(blocks.holds, ("side",))

    def reads(self, blocks: Blocks) -> str:
        """Name of the sequence that the blocks of a list read and do not change; empty if there is none."""
        if blocks.holds == "image" and len(self.names) == 2:
            return self.names[1]
        return "context" if self.context and blocks.holds != "side" else ""

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arguments of the model's forward."""
        names = ("hidden_states", "encoder_hidden_states", "audio_states")[: len(self.names)]
        shapes = {name: (BATCH, length, WIDTH) for name, length in zip(names, self.tokens, strict=False)}
        shapes["timestep"] = (BATCH,)
        if self.context:
            shapes["context_embeds"] = (BATCH, 3, WIDTH)
        if any(blocks.holds == "side" for blocks in self.lists) or any(
            work.kind in ("control", "in-place") for work in self.works
        ):
            shapes["control"] = (BATCH, self.tokens[0], WIDTH)
        if any(work.kind == "overwrite" for work in self.works):
            shapes["text_layers"] = (BATCH, 2, WIDTH)
        return shapes


NAMES = {
    1: (("hidden_states",), ("x",), ("tokens",)),
    2: (
        ("hidden_states", "encoder_hidden_states"),
        ("x", "context_tokens"),
        ("x", "c"),
        ("a", "b"),
        ("hidden_states", "text"),
        ("img", "txt"),
    ),
    3: (("hidden_states", "encoder_hidden_states", "audio_hidden_states"), ("x", "c", "v")),
}
PATHS = (("blocks", "single_blocks", "last_blocks"), ("transformer_blocks", "single_transformer_blocks", "layers"))
PLAIN = {1: (("image",),), 2: (("all",),), 3: (("all",),)}
LISTS = {
    1: (("image",), ("image", "image"), ("image", "image", "image")),
    2: (("all", "all"), ("image", "all"), ("image", "all", "all"), ("all", "joint")),
    3: (("all", "all"),),
}
JOINT = {2: (("all", "joint"), ("joint",), ("image", "joint"), ("all", "joint", "joint"), ("image", "all", "joint"))}
# Layouts with lists that the image does not run through.
BESIDE = {
    1: (("side", "image"), ("side", "image", "image")),
    2: (
        *(("text", "all"), ("text", "joint"), ("text", "image"), ("text", "image", "all")),
        *(("side", "all"), ("side", "all", "joint")),
    ),
    3: (("side", "all"),),
}
LAYOUTS = {"lists": LISTS, "joint": JOINT, "beside": BESIDE}  # By feature; the last one that is drawn counts.
WORKS = ("control", "time", "norm", "adapter", "gate", "overwrite")
USUAL = frozenset(("works", "keywords", "order", "uses-text", "context", "lists", "lengths", "late"))
ODD = USUAL | frozenset(
    (
        *("skips", "emits", "beside", "body", "looks", "names", "cast", "again", "in-place", "raw", "no-time"),
        *("returns", "joint", "third", "every"),
    )
)
MOST_FEATURES, MOST_BLOCKS = 5, 12


@st.composite
def specs(draw: st.DrawFn, odd: frozenset[str] = ODD) -> Spec:
    """A model with some of these odd features."""
    size = draw(st.integers(0, min(MOST_FEATURES, len(odd))))
    features = draw(st.frozensets(st.sampled_from(sorted(odd)), min_size=size, max_size=size))
    count = 3 if "third" in features and draw(st.booleans()) else draw(st.integers(1, 2))
    lists = draw(all_lists(count, features))
    total = sum(blocks.depth for blocks in lists if blocks.holds in IMAGE_HOLDERS)
    chosen = {
        name: draw(strategy) for feature in sorted(features) for name, strategy in _details(feature, count, total)
    }
    is_in_place = "in-place" in features
    return Spec(
        **dict(names=NAMES[count][0], works=draw(works(total, features)), lists=lists) | chosen,
        context="context" in features,
        time="no-time" not in features,
        keywords="keywords" in features,
        raw="raw" in features and not is_in_place,  # Otherwise the model would write into its caller's tensors.
        late="late" in features,
        uses_text="uses-text" in features,
    )


def _details(feature: str, count: int, total: int) -> Iterable[tuple[str, st.SearchStrategy[Any]]]:
    """The fields that a feature determines: name -> strategy of the value."""
    any_of, either = st.sampled_from, st.booleans()
    details: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "names": dict(names=any_of(NAMES[count]), inner=either),
        "lengths": dict(tokens=any_of(((5, 5, 5), (4, 7, 4), (6, 3, 6)))),
        "skips": dict(skips=skips(total)),
        "joint": dict(
            joint_name=any_of(("", "joint")), text_first=either, apart=any_of(("image", "both", "split", ""))
        ),
        "beside": dict(hints=any_of(("before", "between")), side_of_image=either),
        "cast": dict(cast=any_of(("float64", "bfloat16"))),
        "again": dict(again=any_of(("twice", "loop", "after", "shared", "same"))),
        "returns": dict(returns=any_of(("text", "emitted"))),
    }
    return details.get(feature, {}).items()


@st.composite
def all_lists(draw: st.DrawFn, count: int, features: frozenset[str]) -> tuple[Blocks, ...]:
    layouts = PLAIN[count]
    for feature, known in LAYOUTS.items():
        if feature in features:
            layouts = known.get(count, layouts)
    layout = draw(st.sampled_from(layouts))
    paths = draw(st.sampled_from(PATHS)) if "names" in features else PATHS[0]
    most = MOST_BLOCKS // len(layout)
    if "image" in layout:  # The reference requires that the results of one line depend on one stream or on none.
        features -= {"looks"}
    return tuple(draw(block_lists(path, holds, features, most)) for path, holds in zip(paths, layout, strict=False))


@st.composite
def works(draw: st.DrawFn, total: int, features: frozenset[str]) -> tuple[Work, ...]:
    """Work between some blocks and after the last, or the same work after every block."""
    kinds = WORKS * bool({"works", "every"} & features) + ("in-place",) * ("in-place" in features)
    if not kinds:
        return ()
    if "every" in features:
        kind = draw(st.sampled_from(kinds))
        return tuple(Work(after, kind) for after in range(total))
    work = st.builds(Work, st.integers(0, total - 1), st.sampled_from(kinds))
    return tuple(draw(st.lists(work, min_size=1, max_size=4, unique=True)))


@st.composite
def block_lists(draw: st.DrawFn, path: str, holds: str, features: frozenset[str], most: int) -> Blocks:
    bodies = ("add",)
    if "body" in features:
        bodies += ("attention", "concat", "post-norm", "expression")
        bodies += ("branch",) * (holds in ("image", "joint") and "emits" not in features)
    if "in-place" in features:
        bodies += ("in-place",)
    is_image = holds in IMAGE_HOLDERS
    chosen: dict[str, Any] = {}
    if "order" in features:
        chosen |= dict(takes_reversed=draw(st.booleans()), returns_reversed=draw(st.booleans()))
    if "looks" in features:
        chosen |= dict(looks=draw(st.sampled_from(("image", "text"))))
    if "emits" in features and is_image:
        chosen |= dict(emits=draw(st.sampled_from(("", "stream", "time"))), emits_first=draw(st.booleans()))
    least = 4 if "beside" in features and is_image else 2  # The image has the most expensive list.
    depth = draw(st.integers(least, max(least, most))) if is_image else draw(st.integers(2, 3))
    return Blocks(path, depth, holds, draw(st.sampled_from(bodies)), **chosen)


@st.composite
def skips(draw: st.DrawFn, total: int) -> tuple[Skip, ...]:
    """Long skips between the blocks: some, or one from every block of the first half to its counterpart."""
    how = st.sampled_from(("add", "merge", "argument"))
    if draw(st.booleans()):
        kind = draw(how)
        return tuple(Skip(i, total - 1 - i, kind) for i in range(total // 2) if i < total - 1 - i)
    found = []
    for _ in range(draw(st.integers(1, 2))):
        source = draw(st.integers(0, total - 1))
        target = draw(st.sampled_from((*range(source + 1, total), END)))
        found.append(Skip(source, target, draw(how)))
    return tuple(found)


@st.composite
def counts(draw: st.DrawFn, spec: Spec) -> tuple[int, int]:
    """Fn_compute_blocks and Bn_compute_blocks; in most cases at least one block remains between them."""
    total = spec.depth
    if draw(st.integers(0, 30)) == 30:
        return total, 0
    fn = draw(st.integers(1, total - 1))
    return fn, draw(st.integers(0, total - 1 - fn))
