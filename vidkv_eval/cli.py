"""`vidkv run | plan | table | reproduce | roundtrip`: parses, calls, prints."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from vidkv_eval.judge import JudgeUnavailable
from vidkv_eval.report.progress import describe_plan
from vidkv_eval.report.record import keep_cells, write_table
from vidkv_eval.report.render import to_markdown
from vidkv_eval.report.table import build_table
from vidkv_eval.run import Outcome, measure, open_runs
from vidkv_eval.settings import GROUPS, SettingsError, options, read_option
from vidkv_eval.store import ResultStore, StoreError
from vidkv_eval.suite import Plan, plan_cells, plan_suite

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
EXAMPLES = """examples:
  vidkv run model=mini_qwen2_5_vl benchmark=video_dc recipe=kivi_k2_v2 limit=8
  vidkv run -m recipe=fp16,kivi_k2_v2 model=mini_qwen2_5_vl benchmark=video_dc
  vidkv roundtrip recipe=kivi_k2_v2 states=states.npz out=read_back.npz prompt_tokens=150
  vidkv reproduce table1 profile=paper model.pretrained=/path/to/llava-onevision-qwen2-7b-ov-hf"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a cell failed or a table has no number; 2 for a mistake in the arguments or a judge that does not answer;
        130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options_given = parse(arguments)
    try:
        return options_given.command(options_given)
    except (SettingsError, JudgeUnavailable, StoreError) as error:
        print(f"vidkv: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print(f"\nstopped; every answer so far is kept. To go on: vidkv {shlex.join(arguments)}", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse arguments; settings may stand anywhere among them."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("vidkv", description=__doc__, epilog=EXAMPLES, formatter_class=keep_lines)
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, command, help in (
        ("run", run, "measure the cells that settings name, or those of suite=NAME"),
        ("plan", plan, "list the cells of a suite: done, partial, failed or missing, and the time left"),
        ("table", table, "write and print the table of a suite from what was measured"),
        ("reproduce", reproduce, "measure what is missing of a suite, then write and print its table"),
        ("roundtrip", roundtrip, "what a recipe makes of key and value [B, H, T, D] of states=FILE.npz; written to out=FILE.npz"),
    ):
        subparser = commands.add_parser(name, help=help, description=help, formatter_class=keep_lines)
        if name == "run":
            subparser.add_argument("-m", "--multirun", action="store_true", help="expand sweeps: a,b  glob(vidkv*)  range(1,4)")
        elif name != "roundtrip":
            subparser.add_argument("suite", metavar="suite", help=", ".join(options("suite")))
        subparser.add_argument("settings", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
        subparser.set_defaults(command=command)
    if set(arguments) & {"-h", "--help"}:
        for shown in (parser, *commands.choices.values()):
            shown.epilog = f"{choices()}\n\n{EXAMPLES}"
    given, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            parser.error(f"unknown option {word}")
    given.settings += rest
    return given


def choices() -> str:
    """List what each config group and the suites offer, with labels."""
    parts = []
    for group in (*GROUPS, "suite"):
        names = options(group)
        width = max(map(len, names), default=0)
        parts.append("\n".join([f"{group}:", *(f"  {name:{width}}  {label(group, name)}" for name in names)]))
    return "\n\n".join(parts)


def label(group: str, name: str) -> str:
    """Return what an option of a config group calls itself."""
    option = read_option(group, name)
    return option[group]["label"] if group in option else option.get("label") or option["title"]


def run(given: argparse.Namespace) -> int:
    """Measure cells."""
    suites = [setting.removeprefix("suite=") for setting in given.settings if setting.startswith("suite=")]
    settings = [setting for setting in given.settings if not setting.startswith("suite=")]
    planned = plan_suite(suites[-1], settings) if suites else plan_cells(settings, sweep=given.multirun)
    return report_outcome(planned, measure(planned))


def plan(given: argparse.Namespace) -> int:
    """Print the cells of a suite."""
    planned = plan_suite(given.suite, given.settings)
    print(describe_plan(planned, open_runs(planned)))
    return DONE


def table(given: argparse.Namespace) -> int:
    """Write and print a table."""
    return make_table(plan_suite(given.suite, given.settings), command_of(given))


def reproduce(given: argparse.Namespace) -> int:
    """Measure, then write and print a table."""
    planned = plan_suite(given.suite, given.settings)
    measured = report_outcome(planned, measure(planned))
    return max(measured, make_table(planned, command_of(given)))


def roundtrip(given: argparse.Namespace) -> int:
    """Check a recipe on tensors of the user's own."""
    from vidkv_eval.recipe import RecipeError  # these two load torch, which no other command needs
    from vidkv_eval.roundtrip import RoundtripError, run_roundtrip

    try:
        settings = dict(word.split("=", 1) for word in given.settings)
    except ValueError:
        raise SettingsError(f"roundtrip takes key=value; found: {' '.join(word for word in given.settings if '=' not in word)}") from None
    try:
        print(run_roundtrip(settings))
    except (RecipeError, RoundtripError) as error:
        raise SettingsError(str(error)) from error
    return DONE


def command_of(given: argparse.Namespace) -> str:
    """Return the command that makes a table from nothing."""
    return shlex.join(["vidkv", "reproduce", given.suite, *given.settings])


def make_table(planned: Plan, command: str) -> int:
    """Write and print the table of a plan from this machine's cells, or from the record where it has none."""
    runs, record = open_runs(planned), ResultStore(planned.results)
    source = runs if any(runs.is_done(cell) for cell in planned.cells) else record
    made = build_table(planned, source)
    print(to_markdown(made, command))
    if not made.done:
        print(f"nothing of {planned.suite.name} was measured with these settings; no file written. To measure: {command}", file=sys.stderr)
        return FAILED
    home = record if planned.suite.record else runs
    paths = write_table(made, home.root / "tables", command)
    if home is not source:
        keep_cells(made, source, home)
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return DONE


def report_outcome(planned: Plan, outcome: Outcome) -> int:
    """Print what a run measured and what failed."""
    already = len(planned.cells) - len(outcome.measured) - len(outcome.failed)
    counts = f"{len(outcome.measured)} cell(s) measured, {already} already done, {len(outcome.failed)} failed"
    print(f"{counts}; cells in {planned.runs / 'cells'}", file=sys.stderr)
    for address, reason in outcome.failed.items():
        print(f"  {address}: {reason}", file=sys.stderr)
    for log in outcome.logs:
        print(f"  log: {log}", file=sys.stderr)
    return FAILED if outcome.failed else DONE


if __name__ == "__main__":
    sys.exit(main())
