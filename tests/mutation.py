"""Which changes to the package no test notices. What survives is listed in MUTATION.md.

    pip install -e ".[tests]" cosmic-ray
    python -m tests.mutation _rows [_lookup ...] [--out mutants.jsonl]

The changes are those of cosmic-ray. Each is made in a copy of the last commit, where the tests of
its module run until one of them fails, those that take seconds last. Python and JAX start once: a
mutant is a fork. With `--one-in 4`, a quarter of the mutants run, in an order without meaning. A
mutant that `--out` has already is not run again.
"""

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

from tqdm import tqdm


# The tests of each module, those that fail first first.
TESTS = {
    "__init__": "types",
    "_beartype": "types",
    "_call": "cross_entropy token_loss score search divergence soft_targets devices/losses",
    "_decode": "decode cross_entropy soft_targets divergence search types inputs table",
    "_inputs": "inputs lookup cross_entropy soft_targets types search devices/search",
    "_lookup": "lookup tying inputs devices/split devices/fully_sharded",
    "_product": "decode tying devices/split",
    "_rows": "rows partition types devices/rows",
    "_safetensors": "safetensors",
    "_sharding": "decode devices/split devices/fully_sharded devices/losses",
    "_suggest": "types",
    "_table": "table lookup decode partition",
    "_tree": "resize rows partition",
    "_blockwise/__init__": "types",
    "_blockwise/_batch": "vmap token_loss cross_entropy devices/divergence devices/losses",
    "_blockwise/_chunks": "cross_entropy token_loss devices/losses",
    "_blockwise/_device_losses": "token_loss cross_entropy devices/losses devices/fully_sharded",
    "_blockwise/_device_scores": "score token_loss devices/losses devices/fully_sharded",
    "_blockwise/_device_total": "token_loss cross_entropy devices/losses devices/fully_sharded",
    "_blockwise/_device_search": "search second_derivatives devices/search",
    "_blockwise/_divergence": "divergence devices/divergence",
    "_blockwise/_function": "token_loss devices/losses",
    "_blockwise/_gradients": "score cross_entropy soft_targets divergence devices/fully_sharded",
    "_blockwise/_logits": "score cross_entropy devices/fully_sharded",
    "_blockwise/_plan": "cross_entropy accelerators memory",
    "_blockwise/_reference": "score token_loss divergence",
    "_blockwise/_search": "search devices/search",
    "_blockwise/_scores": "score soft_targets cross_entropy divergence devices/fully_sharded",
    "_blockwise/_token_scores": "score divergence",
    "_devices/__init__": "types",
    "_devices/_collectives": "token_loss cross_entropy devices/losses devices/fully_sharded",
    "_devices/_gather": "devices/fully_sharded devices/split",
    "_devices/_mesh": "decode devices/split devices/fully_sharded devices/losses",
    "_devices/_primitive": "vmap token_loss second_derivatives devices/fully_sharded",
    "_devices/_raise": "lookup modes devices/raise",
    "_devices/_scatter": "devices/fully_sharded devices/split",
    "_devices/_types": "token_loss cross_entropy devices/losses devices/fully_sharded",
    "_resize/__init__": "types",
    "_resize/_join": "resize devices/resize",
    "_resize/_new_rows": "resize",
    "_resize/_vocabulary": "resize types devices/resize",
}

# One replacement for each operator, the nearest one; every keyword, decorator and number.
OPERATORS = """
    ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_Div
    ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_Mod_Add
    ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_BitAnd_BitOr
    ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq
    ReplaceComparisonOperator_Lt_LtE ReplaceComparisonOperator_LtE_Lt
    ReplaceComparisonOperator_Gt_GtE ReplaceComparisonOperator_GtE_Gt
    ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is
    ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Not
    ReplaceUnaryOperator_Delete_Invert ReplaceTrueWithFalse ReplaceFalseWithTrue
    ReplaceAndWithOr ReplaceOrWithAnd AddNot NumberReplacer ExceptionReplacer RemoveDecorator
    ZeroIterationForLoop
""".split()


@dataclasses.dataclass(frozen=True)
class Mutant:
    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple:
        return self.module, self.operator, self.occurrence, self.before, self.after


def mutants_of(module: str, source: str) -> dict[Mutant, str]:
    """Each mutant of a module, and its source."""
    mutating = importlib.import_module("cosmic_ray.mutating")
    plugins = importlib.import_module("cosmic_ray.plugins")
    lines, found = source.splitlines(), {}
    for name in OPERATORS:
        operator, occurrence = plugins.get_operator(f"core/{name}")(), 0
        while (mutated := mutating.mutate_code(source, operator, occurrence)) is not None:
            changed = [
                (i, one, other)
                for i, (one, other) in enumerate(zip(lines, mutated.splitlines()), 1)
                if one != other
            ]
            # every number has two replacements, one more and one less: the first is enough
            if changed and not (name == "NumberReplacer" and occurrence % 2 == 1):
                line, one, other = changed[0]
                mutant = Mutant(module, name, occurrence, line, one.strip(), other.strip())
                found[mutant] = mutated
            occurrence += 1
    return found


class SlowLast:
    """Runs tests last that took more than a second when the module was not changed."""

    def __init__(self, times: Path):
        self.times, self.slow = times, set()

    def pytest_collection_modifyitems(self, items):
        slow = set(self.times.read_text("utf-8").splitlines()) if self.times.exists() else set()
        items.sort(key=lambda item: item.nodeid in slow)

    def pytest_runtest_logreport(self, report):
        if report.duration > 1:
            self.slow.add(report.nodeid)

    def pytest_sessionfinish(self):
        if not self.times.exists():
            self.times.write_text("\n".join(self.slow), "utf-8")


def run_in_fork(folder: Path, arguments: list[str], times: Path, seconds: float) -> str:
    """How pytest ends: `passed`, `failed` or `timeout`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        output = os.open(folder / ".output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, str(folder))
        sys.modules.pop("tests", None)  # the one that we are in
        try:
            pytest = importlib.import_module("pytest")
            code = int(pytest.main(arguments, plugins=[SlowLast(times)]))
        except BaseException:
            code = 3
        os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "passed" if status == 0 else "failed"
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.02)


def files_of(module: str) -> list[str]:
    paths = map(Path, TESTS[module].split())
    return [f"tests/{path.parent / f'test_{path.name}.py'}" for path in paths]


def arguments_of(module: str) -> list[str]:
    """The arguments of pytest for a module."""
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # modules from before the fork
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-W", imported]
    return ["-n", "0", "-m", "", *quiet, *files_of(module)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="+", choices=list(TESTS))
    parser.add_argument("--one-in", type=int, default=1, help="run one mutant of so many")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    settings = parser.parse_args(arguments)
    os.environ |= {
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same second and size would be taken for
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sys.dont_write_bytecode = True
    settings.out.touch()
    known = [json.loads(line) for line in settings.out.read_text("utf-8").splitlines()]
    known = {Mutant(**line["mutant"]).key: line["outcome"] for line in known}
    with tempfile.TemporaryDirectory() as folder, open(settings.out, "a", encoding="utf-8") as out:
        folder = Path(folder)
        archive = subprocess.run(["git", "archive", "HEAD"], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive.stdout)
        os.environ |= {
            "PYTHONPATH": str(folder),
            "JAX_COMPILATION_CACHE_DIR": str(folder / ".compiled"),
        }
        for name in "jax equinox jaxtyping beartype numpy hypothesis optax penzai.pz".split():
            importlib.import_module(name)  # a backend would not survive the fork, imports do
        for module in settings.modules:
            command, start = arguments_of(module), time.monotonic()
            times = folder / f"{module.replace('/', '.')}.slow"
            if run_in_fork(folder, command, times, 3600) != "passed":
                raise SystemExit((folder / ".output").read_text("utf-8"))
            limit = 60 + 3 * (time.monotonic() - start)
            path = folder / "eqx_embedding" / f"{module}.py"
            source = path.read_text("utf-8")
            mutants, counts = mutants_of(module, source), Counter()
            drawn = sorted(mutants, key=lambda mutant: zlib.crc32(repr(mutant.key).encode()))
            mutants = {m: mutants[m] for m in drawn[: -(-len(drawn) // settings.one_in)]}
            for mutant, mutated in tqdm(mutants.items(), desc=module, mininterval=30):
                outcome = known.get(mutant.key)
                if outcome is None:
                    path.write_text(mutated, "utf-8")
                    outcome = run_in_fork(folder, command, times, limit)
                    line = {"mutant": dataclasses.asdict(mutant), "outcome": outcome}
                    print(json.dumps(line), file=out, flush=True)
                counts[outcome] += 1
                if outcome == "passed":
                    tqdm.write(f"{module}.py:{mutant.line} {mutant.operator}")
                    tqdm.write(f"  - {mutant.before}\n  + {mutant.after}")
            path.write_text(source, "utf-8")
            killed, survived = counts["failed"] + counts["timeout"], counts["passed"]
            counted = f"{len(mutants)} mutants, {killed} killed, {survived} survived"
            print(f"{module}: {counted}", flush=True)


if __name__ == "__main__":
    main()
