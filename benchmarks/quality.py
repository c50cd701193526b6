"""Compares the quality of cachedit_fx, cache-dit and fewer steps at equal cost, on two trained models.

The models are the digits (FLUX) and the clips (Wan, with guidance) of `examples`. Every configuration generates the
same images from the same noise. The following is measured: the share of the FLOPs of the uncached model that are
executed (counted, over both guidance branches); PSNR, SSIM and relative L2 to the uncached images; and the share of
images that a classifier recognizes. The configurations next to a PSNR of 45, 40 and 35 dB are then compiled and timed
in alternation with the uncached model. Every family runs in a process of its own with one thread.

    python -m benchmarks.quality --json quality.json --plot quality.svg
    python -m benchmarks.quality --write docs/quality.md         # writes the tables into the page, the plot next to it
    python -m benchmarks.quality --model clips --only "^F1B0"
    python -m benchmarks.quality --quick                         # a short trial run
    python -m benchmarks.quality --from quality.json --write docs/quality.md    # measures nothing
    python -m benchmarks.quality --from quality.json --measure tuned times --json quality.json  # these parts anew

The parts are "images" (the configurations of all families), "tuned" (what `tune` finds on other calls), "shadow" and
"times". Without `--from`, all of them are measured. A part that is named with `--from` replaces that of the file; of
"images", only configurations are measured that are not in the file, so that an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from benchmarks import figures, quality_page
from benchmarks.quality_configs import FAMILIES, tuned_configs
from benchmarks.quality_driver import run
from benchmarks.quality_frontier import worth_timing
from benchmarks.quality_models import MODELS, load_setup, size_of
from benchmarks.quality_plot import draw
from benchmarks.quality_shadow import correlations
from benchmarks.quality_tune import tune_all
from benchmarks.quality_worker import Job

MODULE = "benchmarks.quality"
QUICK = r"^(F1B0 r0\.(12|3) w4, last|(euler|unipc) (8|14))$"
PARTS = ("images", "tuned", "shadow", "times")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=list(MODELS), help="'digits', 'clips', or module:factory (see quality_models.py)"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--only", default="", help="a regular expression that a configuration's name must match")
    parser.add_argument("--measure", nargs="*", choices=PARTS, metavar="PART", help="images, tuned, shadow, times")
    parser.add_argument(
        "--tuned", nargs="+", type=Path, default=[], metavar="FILE", help="saved configurations, among ours"
    )
    parser.add_argument("--images", type=int, help="images to generate (100 digits, 32 clips)")
    parser.add_argument("--batch", type=int, help="images at once (20 digits, 16 clips)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes at once, for the images (2); never for the times"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of the times, an image each (10)")
    parser.add_argument("--inner", default="inductor", help="what compiles, for the times (inductor)")
    parser.add_argument("--quick", action="store_true", help="a few configurations, ten images, no times")
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--from", type=Path, dest="source", help="such a file, instead of measuring")
    parser.add_argument("--plot", type=Path, help="PSNR over the share of FLOPs: .svg, .png, .pdf")
    parser.add_argument("--write", type=Path, help="a page: the tables between its marks, the plot beside it")
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.batch, args.only = 10, 10, args.only or QUICK
    if args.measure is None:
        args.measure = [] if args.source else ["images"] if args.quick else list(PARTS)
    return args


class Run:
    """Measures the parts of one model.

    Args:
        measured: The results of all models, of which those of this one are extended.
    """

    _lock = Lock()

    def __init__(self, args: argparse.Namespace, model: str, measured: dict[str, Any]) -> None:
        self._args, self._model, self._measured = args, model, measured
        num_images, batch = args.images or size_of(model)[0], args.batch or size_of(model)[1]
        self._common = {"model": model, "num_images": num_images, "batch": batch}
        self._common |= {"inner": args.inner, "rounds": args.rounds}
        empty = {"batch": batch, "reference": {}, "nearness": [], "tuned": {}, "times": [], "shadow": [], "errors": {}}
        self.found: dict[str, Any] = measured["models"].setdefault(model, empty)

    def images(self) -> None:
        """Measures the configurations that are not among the results yet, with the families in parallel."""
        setup, known = load_setup(self._model, 1, 1), {(row["family"], row["name"]) for row in self.found["nearness"]}
        jobs = []
        for family in self._args.families:
            names = [config.name for config in FAMILIES[family](setup) if re.search(self._args.only, config.name)]
            names = [name for name in names if (family, name) not in known]
            jobs += [Job(family, "nearness", names=names, **self._common)] if names else []
        with ThreadPoolExecutor(self._args.jobs) as pool:
            list(pool.map(self._measure, jobs))
        if self._args.tuned:
            self._measure_tuned({path.stem: yaml.safe_load(path.read_text("utf-8")) for path in self._args.tuned})

    def tuned(self) -> None:
        """Tunes on other calls, and measures the results."""
        self._measure_tuned(tune_all(self._model))

    def _measure_tuned(self, tuned: dict[str, Any]) -> None:
        self.found["nearness"] = [row for row in self.found["nearness"] if row["group"] != "tuned"]
        self.found["tuned"] = tuned
        names = [config.name for config in tuned_configs(tuned)]
        self._measure(Job("ours", "nearness", names=names, tuned=tuned, **self._common))

    def shadow(self) -> None:
        self.found["shadow"] = correlations(self._model)

    def times(self) -> None:
        """Measures the times of the configurations next to the targets, one after the other."""
        self.found |= {"times": [], "inner": self._args.inner, "rounds": self._args.rounds}
        for family in self._args.families:
            columns = quality_page.rows_by_column(self.found).items()
            names = [name for column, rows in columns if column.startswith(family) for name in worth_timing(rows)]
            if names:
                self._measure(Job(family, "time", names=names, tuned=self.found["tuned"], **self._common))

    def _measure(self, job: Job) -> None:
        rows = self.found["nearness" if job.task == "nearness" else "times"]

        def keep(answer: dict[str, Any]) -> None:
            if "reference" in answer:
                self.found["reference"] = answer["reference"] or self.found["reference"]
            else:
                rows.append(answer)
            self.save()

        error = run(job, keep)
        if error:
            self.found["errors"][job.family] = error

    def save(self) -> None:
        """Writes all results, so that an interrupted run can be continued."""
        if self._args.json:
            with self._lock:
                self._args.json.write_text(as_json(self._measured), encoding="utf-8")


def as_json(measured: Any) -> str:
    """Returns the results as JSON, with a line per configuration and floats of six digits."""
    measured = json.loads(json.dumps(measured), parse_float=lambda text: float(f"{float(text):.6g}"))
    text = json.dumps(measured, indent=1)
    return re.sub(r"\n {5,}|\n {4}(?=\})", " ", text) + "\n"


def measure(args: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Measures the requested parts, and adds them to `measured`."""
    measured["command"] = measured.get("command") or figures.command(MODULE)
    measured |= {"hardware": figures.hardware("cpu"), "versions": figures.versions()}
    for model in args.model:
        one = Run(args, model, measured)
        for part in args.measure:
            if part != "shadow" or "ours" in args.families:
                getattr(one, part)()
                one.save()


def main() -> None:
    args = parse()
    measured: dict[str, Any] = {"models": {}}
    if args.source:
        measured = json.loads(args.source.read_text(encoding="utf-8"))
    if args.measure:
        measure(args, measured)
    if args.json:
        args.json.write_text(as_json(measured), encoding="utf-8")
    print("\n" + quality_page.tables(measured))
    plot = args.plot or (args.write.with_suffix(".svg") if args.write else None)
    if plot:
        draw(measured, plot)
    if args.write and plot:
        quality_page.write_page(args.write, measured, plot.name if plot.parent == args.write.parent else None)
    if any(model["errors"] for model in measured["models"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
