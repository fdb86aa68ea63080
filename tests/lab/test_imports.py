"""The laboratory uses the runner as any package does, by `dlopt.extend`. What else it imports may only shrink."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules of dlopt. A new analysis needs none: take a name of `dlopt.extend`, or add one there that others need, too.
STILL_IMPORTED = """
_version basics.errors basics.folders basics.formats basics.locks basics.plain_values basics.random basics.scratch
basics.status_line commands.shared.command_line commands.shared.processes commands.shared.usage config.choices
config.run_config config.flags config.keys config.overrides config.parameters config.parsing config.plan config.reads
config.early_checks config.resolve config.resuming config.rules config.saved config.schema data.batches data.division
data.generated data.images.digits data.samples instruments.curvature instruments.diagnostics instruments.layers
instruments.lr_range instruments.profiling instruments.measuring_ranks machine.device machine.world machine.memory
machine.threads metrics.measures metrics.names metrics.shown models.order models.gpt models.layers
models.locally_connected models.recurrent models.vit optim optim.adam optim.common optim.newton optim.parameters
optim.traits parallel.collectives parallel.mode parallel.modes.chain parallel.processes.launch
parallel.processes.process_group parallel.processes.rendezvous results.drawing results.intervals results.leaderboard
results.page results.reading results.tables run.environment run.runner schedules sweeps.jobs sweeps.pool sweeps.sweep
sweeps.samplers sweeps.search sweeps.space tracking.console tracking.terminal_text tracking.metrics tracking.overview
tracking.tensorboard trained.distillation trained.restore training.averaging training.builders.dataset
training.budget training.builders.model_check training.builders.optimizer training.builders.speed
training.builders.workload
training.checkpoint.checkpoints training.clipping training.evaluate training.length training.progress training.step
training.stopping sweeps.branches sweeps.matching sweeps.series sweeps.submitting
"""


def imported(path: Path) -> set[str]:
    """Returns the modules that a file imports, also within functions; `from dlopt.a import b` may name a.b, or a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {module(f"{node.module}.{each.name}", node.module) for each in node.names}
    return {name.removeprefix("dlopt.") for name in found if name.split(".")[0] == "dlopt"}


def module(name: str, parent: str) -> str:
    path = ROOT.joinpath(*name.split("."))
    return name if path.is_dir() or path.with_suffix(".py").is_file() else parent


def test_the_laboratory_imports_no_more_of_the_runner() -> None:
    used = set().union(*(imported(path) for path in (ROOT / "dlopt/lab").rglob("*.py")))
    used = {name for name in used if name != "extend" and name.split(".")[0] != "lab"}
    allowed = set(STILL_IMPORTED.split())
    assert not used - allowed, "new: import it from dlopt.extend"
    assert not allowed - used, "no longer used: take it off the list"
