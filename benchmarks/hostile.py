"""Hostile clients: what each rule keeps of the accuracy under each attack.

python -m benchmarks.hostile digits
    20 clients, Dirichlet 0.1 and 0.3 and IID, f = 4, and Dirichlet 0.3 with f = 2:
    sixteen rules, one seed, and whether the claims R1 to R5 below hold
python -m benchmarks.hostile fashion
    Fashion-MNIST, 50 clients, Dirichlet 0.1 and 0.3, f = 10 % and 20 %, seven rules
    by seven attacks, three seeds
python -m benchmarks.hostile fashion --rules fltrust,dnc --alphas 0.1
    other rules, in the same directories

Tables are Markdown on stdout, progress is on stderr. Runs in --out (default:
runs/hostile) are read, or gone on with: stop it in any way, and call it again. One
process trains on all cores; two processes may share an --out where --alphas differ.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import print_table
from fedcore import Experiment
from fedcore.stress.examine import examine, prepare
from fedcore.stress.plan import (
    CLEAN,
    DEFAULT_ATTACKS,
    Plan,
    parse_attack,
    parse_rule,
)
from fedcore.stress.report import write
from fedcore.stress.results import Stress
from fedcore.stress.terminal import StressTerminal

DIGITS, FASHION = "benchmarks/hostile-digits.toml", "benchmarks/hostile-fashion.toml"
PROXY = 100  # examples of the server, for FLTrust

ATTACKS = DEFAULT_ATTACKS[:-1]  # without the backdoor
FASHION_ATTACKS = DEFAULT_ATTACKS[1:]
FASHION_RULES = (
    "mean",
    "clip+mean",
    "median",
    "trimmed_mean",
    "multi_krum",
    "geometric_median",
    "nnm+multi_krum",
)
DIGITS_RULES = (
    "mean",
    "clip+mean",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
    "centred_clipping",
    "bucketing+geometric_median",
    "nnm+geometric_median",
    "nnm+trimmed_mean",
    "nnm+multi_krum",
    "dnc",
    "caf",
    "fltrust",
)
MODERATE = (
    "clip+mean",
    "median",
    "trimmed_mean",
    "multi_krum",
    "geometric_median",
    "centred_clipping",
    "nnm+trimmed_mean",
)  # of which R1 speaks
NEEDS_PROXY = "fltrust"
CHANCE = 0.15  # accuracy up to which a model of ten classes knows nothing


class Case(NamedTuple):
    """One table."""

    title: str
    preset: str
    settings: tuple[str, ...]
    fractions: tuple[float, ...]
    seeds: int
    folder: str


class Part(NamedTuple):
    """The rules of a case that share their settings, and their results."""

    stress: Stress
    command: str


class Done(NamedTuple):
    """The results of a case; a rule that needs data of the server is in a part."""

    case: Case
    parts: list[Part]

    def of_rule(self, rule: str) -> Stress | None:
        for part in self.parts:
            if rule in part.stress.rules():
                return part.stress
        return None

    def value(self, fraction: float, rule: str, column: str) -> float | None:
        """The mean over seeds after the last round; None where it is not there."""
        stress = self.of_rule(rule)
        cell = None if stress is None else stress.cell(fraction, rule, column)
        return None if cell is None else cell.mean

    def worst(self, fraction: float, rule: str) -> tuple[float, str] | None:
        """The lowest accuracy of the attacks that leave no backdoor, and its name."""
        found = []
        stress = self.of_rule(rule)
        if stress is None:
            return None
        for attack in stress.attacks():
            if attack in stress.plan.backdoors:
                continue
            cell = stress.cell(fraction, rule, attack)
            if cell is not None:
                found.append((cell.mean or 0.0, attack))
        return min(found) if found else None


def run_case(
    case: Case, rules: Sequence[str], attacks: Sequence[str], out: Path
) -> Done:
    """Run what is not done, or read what is."""
    parts = []
    with_proxy = [rule for rule in rules if rule == NEEDS_PROXY]
    without = [rule for rule in rules if rule != NEEDS_PROXY]
    for names, more in ((without, ()), (with_proxy, (f"proxy={PROXY}",))):
        if names:
            parts.append(_run_part(case, names, attacks, more, out))
    return Done(case, parts)


def _run_part(
    case: Case,
    rules: Sequence[str],
    attacks: Sequence[str],
    more: tuple[str, ...],
    out: Path,
) -> Part:
    settings = (*case.settings, *more)
    folder = out / (f"{case.folder}-proxy" if more else case.folder)
    words = ["fedcore", "stress", case.preset]
    words += ["--rules", ",".join(rules), "--attacks", ",".join(attacks)]
    words += ["--fraction", ",".join(f"{share:g}" for share in case.fractions)]
    words += ["--seeds", str(case.seeds), "--out", str(folder)]
    for setting in settings:
        words += ["--set", setting]
    experiment = Experiment.load(case.preset, list(settings))
    plan = Plan(
        tuple(map(parse_rule, rules)),
        tuple(map(parse_attack, attacks)),
        case.fractions,
        case.seeds,
    )
    prepared = prepare(experiment, case.preset, plan, experiment.build_task())
    with StressTerminal() as terminal:
        stress = examine(prepared, folder, terminal)
    write(stress, words)
    if stress.is_interrupted:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
    return Part(stress, shlex.join(words))


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def print_case(done: Done) -> None:
    """The tables of a case, one a share, and the commands that made them."""
    for fraction in done.case.fractions:
        print(f"### {done.case.title}, {fraction:.0%} malicious\n")
        columns = done.parts[0].stress.plan.columns
        head = ["rule", *columns, "worst (attack)", "backdoor success", "worst tenth"]
        rows = []
        for part in done.parts:
            for rule in part.stress.rules():
                rows.append(_row(done, part.stress, fraction, rule))
        print_table(head, rows)
    for part in done.parts:
        print(f"```sh\n{part.command}\n```\n")


def _row(done: Done, stress: Stress, fraction: float, rule: str) -> list[str]:
    row = [rule.replace("_", " ")]
    for column in stress.plan.columns:
        cell = stress.cell(fraction, rule, column)
        text = "-"
        if cell is not None and cell.is_stuck:
            text = "stuck"
        elif cell is not None:
            text = "ruined" if cell.is_ruined else percent(cell.mean)
            if cell.std is not None:
                text += f" ± {percent(cell.std)}"
        row.append(text)
    worst = done.worst(fraction, rule)
    row.append("-" if worst is None else f"**{percent(worst[0])}** ({worst[1]})")
    successes = []
    for attack in stress.plan.backdoors:
        cell = stress.cell(fraction, rule, attack)
        success = None if cell is None else cell.backdoor_success
        successes.append(percent(success, 0))
    row.append(", ".join(successes) or "-")
    clean = stress.cell(fraction, rule, CLEAN)
    tenth = None if clean is None else clean.last("client_accuracy", "worst_tenth")
    row.append(percent(tenth))
    return row


# Fashion-MNIST


def fashion(out: Path, options: argparse.Namespace) -> None:
    rules = options.rules.split(",") if options.rules else FASHION_RULES
    attacks = options.attacks.split(",") if options.attacks else FASHION_ATTACKS
    for alpha in (options.alphas or "0.1,0.3").split(","):
        case = Case(
            f"Fashion-MNIST, Dirichlet {alpha}",
            FASHION,
            (f"partition.alpha={alpha}",),
            (0.1, 0.2),
            options.seeds or 3,
            f"fashion-{alpha}",
        )
        print_case(run_case(case, rules, attacks, out))


# Digits, and R1 to R5


def digits_cases(seeds: int) -> dict[str, Case]:
    """The settings of the pilot, by name."""

    def case(title: str, settings: tuple[str, ...], share: float, name: str) -> Case:
        return Case(f"Digits, {title}", DIGITS, settings, (share,), seeds, name)

    some = ("partition.alpha=0.3",)
    iid = ('partition={name = "iid"}',)
    return {
        "0.1": case("Dirichlet 0.1", ("partition.alpha=0.1",), 0.2, "digits-0.1"),
        "0.3": case("Dirichlet 0.3", some, 0.2, "digits-0.3"),
        "iid": case("IID", iid, 0.2, "digits-iid"),
        "0.3, f = 2": case("Dirichlet 0.3", some, 0.1, "digits-0.3-few"),
    }


def digits(out: Path, options: argparse.Namespace) -> None:
    rules = options.rules.split(",") if options.rules else DIGITS_RULES
    wanted = options.alphas.split(",") if options.alphas else None
    results: dict[str, Done] = {}
    for name, case in digits_cases(options.seeds or 1).items():
        if wanted is not None and name.partition(",")[0] not in wanted:
            continue
        # With replacement the malicious clients' mean becomes everybody's: n / f.
        replacement = f"backdoor:{1 / case.fractions[0]:g}"
        attacks = (*ATTACKS, "backdoor", replacement)
        if options.attacks:
            attacks = tuple(options.attacks.split(","))
        results[name] = run_case(case, rules, attacks, out)
        print_case(results[name])
    print("### What the pilot claims\n")
    checks: list[Callable[[dict[str, Done]], Claim]] = [r1, r2, r3, r4, r5]
    for check in checks:
        try:
            claim = check(results)
        except (KeyError, ValueError) as error:
            print(f"- {check.__name__.upper()}: not measured ({error})")
            continue
        word = "holds" if claim.holds else "**does not hold**"
        print(f"- {check.__name__.upper()} {word}: {claim.text}")


class Claim(NamedTuple):
    """A claim of the pilot, and the numbers that speak for or against it."""

    holds: bool
    text: str


def known(value: float | None, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


def r1(results: dict[str, Done]) -> Claim:
    """One in five sends -10 times its update: the mean is lost, the others are not."""
    done, share, attack = results["0.3"], 0.2, "sign_flip:10"
    plain = done.value(share, "mean", attack) or 0.0
    lost = {}
    for rule in MODERATE:
        clean = known(done.value(share, rule, CLEAN), rule)
        lost[rule] = 100 * (clean - (done.value(share, rule, attack) or 0.0))
    most = max(lost, key=lambda rule: lost[rule])
    holds = plain <= CHANCE and lost[most] <= 3
    text = f"the mean ends at {percent(plain)} %; of the others {most} loses most, "
    return Claim(holds, f"{text}{lost[most]:.1f} points")


def r2(results: dict[str, Done]) -> Claim:
    """IID: all rules but Krum within 4.5 points of the clean mean."""
    done, share = results["iid"], 0.2
    clean = known(done.value(share, "mean", CLEAN), "mean")
    gaps = {}
    for rule in DIGITS_RULES:
        worst = done.worst(share, rule)
        if rule not in ("mean", "krum") and worst is not None:
            gaps[f"{rule} ({worst[1]})"] = 100 * (clean - worst[0])
    most = max(gaps, key=lambda rule: gaps[rule])
    beyond = [rule for rule, gap in gaps.items() if gap > 4.5]
    text = f"the largest gap is that of {most}, {gaps[most]:.1f} points"
    if beyond:
        text += f"; beyond 4.5 are {', '.join(beyond)}"
    return Claim(not beyond, text)


def r3(results: dict[str, Done]) -> Claim:
    """Dirichlet 0.1: the cost of rules without an attacker; mixing brings some back."""
    done, share = results["0.1"], 0.2
    clean = known(done.value(share, "mean", CLEAN), "mean")
    costs = {}
    for rule in ("median", "trimmed_mean", "krum", "bulyan"):
        costs[rule] = 100 * (clean - known(done.value(share, rule, CLEAN), rule))
    pairs = (
        ("trimmed_mean", "nnm+trimmed_mean"),
        ("median", "nnm+geometric_median"),
        ("median", "bucketing+geometric_median"),
    )
    back = {}
    for plain, mixed in pairs:
        here = known(done.value(share, mixed, CLEAN), mixed)
        back[mixed] = 100 * (here - known(done.value(share, plain, CLEAN), plain))
    holds = min(costs.values()) >= 13 and min(back.values()) > 0
    cost_text = ", ".join(f"{rule} {cost:.1f}" for rule, cost in costs.items())
    back_text = ", ".join(f"{rule} {gain:+.1f}" for rule, gain in back.items())
    return Claim(holds, f"points lost without attack: {cost_text}; back: {back_text}")


def r4(results: dict[str, Done]) -> Claim:
    """Dirichlet 0.1: who lets a backdoor in, and who does not."""
    done, share = results["0.1"], 0.2

    def success(rule: str) -> float:
        stress = done.of_rule(rule)
        found = None if stress is None else stress.backdoor(share, rule)
        return known(found, f"the backdoor against {rule}")

    lets_in = ("clip+mean", "centred_clipping", "geometric_median")
    stops = ("multi_krum", "nnm+trimmed_mean", "nnm+multi_krum", "fltrust")
    opened = {rule: success(rule) for rule in lets_in}
    shut = {rule: success(rule) for rule in stops}
    holds = min(opened.values()) > 0.2 and max(shut.values()) <= 0.2
    texts = [f"{rule} {percent(x, 0)} %" for rule, x in (opened | shut).items()]
    return Claim(holds, f"success: {', '.join(texts)}")


def r5(results: dict[str, Done]) -> Claim:
    """No rule has the best worst case everywhere."""
    best = {}
    for name, done in results.items():
        share, found = done.case.fractions[0], []
        for rule in DIGITS_RULES:
            worst = done.worst(share, rule)
            if worst is not None:
                found.append((worst[0], rule))
        best[name] = max(found)[1]
    text = ", ".join(f"{name}: {rule}" for name, rule in best.items())
    return Claim(len(set(best.values())) > 1, f"the best worst case by setting: {text}")


STUDIES = {"digits": digits, "fashion": fashion}


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--rules", help="instead of the study's, e.g. fltrust,dnc")
    parser.add_argument("--attacks", help="instead of the study's, e.g. ipm:0.5,minsum")
    parser.add_argument("--alphas", help="some of the settings alone, e.g. 0.1,iid")
    parser.add_argument("--seeds", type=int, help="default: digits 1, fashion 3")
    parser.add_argument("--out", type=Path, default=Path("runs/hostile"))
    options = parser.parse_args()
    STUDIES[options.study](options.out, options)


if __name__ == "__main__":
    main()
