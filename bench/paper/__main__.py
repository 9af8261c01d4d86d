"""``python -m bench.paper --figure 5 --out DIR``: measure, draw and judge figures of the paper; what is on disk is not done again.

``--page docs/paper.md`` writes the page about the figures in ``--out``; with ``--check`` it says whether the page is what they give.
"""

import argparse
import difflib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from moeify._progress import NO_PROGRESS
from moeify._terminal import make_progress
from moeify.errors import ConfigError, MoeifyError
from moeify.report import check_plots

from .code import check_stages
from .figures import FIGURES, make_figure
from .inputs import INPUTS, check_needs, find_inputs, write_stand_ins
from .jobs import share
from .measure import Run
from .page import check_page, write_page


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    disable_progress_bar()  # ours tells of the stages
    try:
        return _run(options)
    except (MoeifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    numbers = _numbers(options)
    if numbers:
        run, start = _run_of(options, numbers), time.monotonic()
        made = []
        figures = (FIGURES[number] for number in numbers)
        if options.jobs > 1:
            figures = share(tuple(figures), run, jobs=options.jobs)
        with closing(figures):  # ends the processes
            for figure in figures:
                made.append(make_figure(figure, run))
                if not options.json:
                    print(f"figure {figure.number}: {made[-1]['files']['png']}", flush=True)
                    for claim in made[-1]["claims"]:
                        print(f"  {claim['line']}", flush=True)
        run.say(f"{len(made)} figure{'s' * (len(made) > 1)} in {time.monotonic() - start:.0f} s")
        if options.json:
            print(json.dumps({"figures": made}, indent=1))
    if options.page is not None and options.check:
        check_page(options.page, options.out)
    elif options.page is not None:
        write_page(options.page, options.out)
    return 0


def _numbers(options: argparse.Namespace) -> list[str]:
    if options.check and options.page is None:
        raise ConfigError("--check is about a page: give --page, too.")
    if options.all and options.figure:
        raise ConfigError("give --all or --figure, not both.")
    if not (options.all or options.figure or options.page):
        raise ConfigError(f"give --figure NUMBER (one of {', '.join(FIGURES)}), --all, or --page.")
    for number in options.figure:
        if number not in FIGURES:
            near = difflib.get_close_matches(number, FIGURES, n=1)
            raise ConfigError(f"no figure {number!r}; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(FIGURES)}")
    return list(FIGURES) if options.all else list(dict.fromkeys(options.figure))


def _run_of(options: argparse.Namespace, numbers: Sequence[str]) -> Run:
    found = find_inputs(options.inputs, {name: getattr(options, name) for name in INPUTS})
    if options.smoke:
        needed = [name for name in INPUTS if name not in found and any(name in FIGURES[number].needs for number in numbers)]
        found |= write_stand_ins(options.out / "stand_ins", needed)
    else:
        check_needs({number: FIGURES[number].needs for number in numbers}, found)
        if "novels" not in found and any(FIGURES[number].model == "gpt" for number in numbers):
            print("no --novels: the GPT reads builtin:pydoc.", file=sys.stderr)
    check_plots()  # before hours of measuring
    has_stages = any(FIGURES[number].model is not None for number in numbers)
    return Run(
        inputs=found,
        out=options.out,
        seeds=options.seeds or ((0,) if options.smoke else (0, 1, 2)),
        smoke=options.smoke,
        large=options.large,
        device=options.device,
        library=check_stages(options.out / "stages", keep=options.keep_stages) if has_stages else (),
        progress=make_progress() if sys.stderr.isatty() else NO_PROGRESS,
        say=lambda line: print(line, file=sys.stderr),
    )


def _parser() -> _Parser:
    parser = _Parser(prog="python -m bench.paper", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--figure", action="append", default=[], metavar="N", help=f"may be repeated: {', '.join(FIGURES)}")
    parser.add_argument("--all", action="store_true", help="every figure")
    parser.add_argument("--out", type=Path, default=Path("paper-out"), metavar="DIR", help="figures and stages, used again by later calls")
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="default: 0,1,2; of a smoke run 0")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps: does it run; data that is missing is made up")
    parser.add_argument("--large", action="store_true", help="a GPT of 85 M parameters, trained longer: with --device cuda")
    parser.add_argument(
        "--jobs", type=_jobs, default=1, metavar="N", help="processes that share the stages, with an equal part of the threads each"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--keep-stages", action="store_true", help="use stages that other code of moeify made; figures and page say so")
    parser.add_argument("--inputs", type=Path, metavar="FOLDER", help=f"with folders {', '.join(i.folder for i in INPUTS.values())}")
    for name, about in INPUTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=about.content)
    parser.add_argument("--json", action="store_true", help="print what the figures' files hold")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page about the figures in --out")
    parser.add_argument("--check", action="store_true", help="with --page: is it what the figures give? writes nothing")
    return parser


def _jobs(text: str) -> int:
    if (jobs := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {jobs}")
    return jobs


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(","))
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError("different integers >= 0, separated by commas")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
