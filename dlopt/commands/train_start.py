"""Starts what `dlopt train` requests, after composing and checking it: a run, one of its ranks, or a sweep."""

import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.errors import DONE, FAILED, USER_ERROR, ReportedError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import killed_by_signals, print_message
from dlopt.basics.status_line import announce_dry_run, waiting
from dlopt.commands.shared.document import Show
from dlopt.commands.shared.processes import prepare_rank
from dlopt.config.compose import Composer
from dlopt.config.flags import show_info
from dlopt.config.inherit import inherit
from dlopt.config.overrides import is_set, parse_overrides, with_folder
from dlopt.config.packages import entries, function, series_of
from dlopt.config.plan import Plan, checked
from dlopt.config.reads import COMPOSITION, refuse_unread_hydra, refuse_untested
from dlopt.config.refusals import refused_together
from dlopt.config.resolve import interpolations_explained, show_config
from dlopt.config.typed import CommandLine, refuse_untyped
from dlopt.machine.world import World, current
from dlopt.parallel.processes.rendezvous import end_process, join_store
from dlopt.run.runner import CODE_OF, follow, release, run_plan

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlopt.sweeps.request import SweepEnd

_READS_OF_HYDRA = (*COMPOSITION, "hydra.run", "hydra.job", "hydra.job_logging", "hydra.verbose")
# How the ranks of torchrun and srun find each other before rank 0 has sent them the run.
_ADDRESS = ("parallel.master_addr", "parallel.master_port", "parallel.timeout_minutes")
_HEAD_START = 10.0  # seconds for rank 0 to refuse a command; torchrun and srun then end the other ranks
_HINTS = dict.fromkeys(("hydra.sweep", "hydra.sweeper", "hydra.launcher"), "add -m")


@interpolations_explained()
def start(parsed: Namespace, show: Show | None) -> int:
    """Starts what the parsed arguments request; `show` prints the JSON document of the result. Raises `UserError`."""
    world = current()
    if world is None:
        return _start(parsed, show, None)
    prepare_rank()
    if world.restarts and not is_set("resume", parsed.overrides):
        parsed.overrides.append("resume=auto")  # torchrun has restarted the run
    if parsed.multirun or parsed.hydra_help or parsed.cfg or parsed.info:
        if world.is_main:
            return _start(parsed, show, None)
        return _refused_by_main() if parsed.multirun else DONE
    try:
        address = _typed_address(parsed.overrides)
    except UserError:
        if not (world.is_main or world.is_started_by_hand):
            _refused_by_main()
        raise
    store = _join_store(address, world)
    if world.is_main:
        _lead(parsed, show, store)
    end_process(follow(store, parsed.overrides))


def _start(parsed: Namespace, show: Show | None, store: "Store | None") -> int:
    """Starts it in this process, or in the ranks that wait at the store. Raises `UserError` and `ReportedError`."""
    typed = parsed.overrides
    composer = Composer(parsed.config_name, parsed.config_dir, typed)
    if parsed.multirun:
        from dlopt.sweeps.branches import branched

        return _sweep(composer, branched(composer, with_folder(typed, multirun=True)), show)
    parsed.overrides = inherit(composer, with_folder(typed, multirun=False))
    with refused_together(composer, parsed.overrides):
        overrides = composer.parse(parsed.overrides)
        config = composer.compose(overrides)
    if parsed.hydra_help or parsed.cfg or parsed.info:  # composed before: Hydra's error messages are less clear
        if parsed.cfg:
            print(show_config(config, parsed.cfg, parsed.package, resolve=parsed.resolve), end="")
        else:
            show_info(parsed, composer.flags)
        return DONE
    if config.hydra.mode == RunMode.MULTIRUN:  # a config file may set the mode
        return _sweep(composer, inherit(composer, with_folder(typed, multirun=True)), show)
    _refuse_document(show, config)
    if config.dry_run:
        announce_dry_run()
    if (key := series_of(config)) is not None:
        code: int = function(entries("dlopt.series")[key])(composer, parsed, config)
        return code
    if store is not None:
        _refuse_address_of_file(config, composer.command_line)
    plan = _planned(composer, config, overrides)
    return DONE if plan is None else _run(plan, show, store)


def _run(plan: Plan, show: Show | None, store: "Store | None" = None) -> int:
    """Runs a plan, and shows its document, also for a run that fails. Raises `UserError`, `ReportedError`."""
    try:
        folder, summary = run_plan(plan, store=store)
    except ReportedError as error:
        if show is not None and error.code != USER_ERROR and plan.config is not None:
            failed = RunFolder(Path(plan.config.hydra.runtime.output_dir))
            show(_of_run(failed, failed.summary(), error.code))
        raise
    code = CODE_OF[summary["status"]]
    if show is not None:
        show(_of_run(folder, summary, code))
    return code


def _sweep(composer: Composer, words: list[str], show: Show | None) -> int:
    """Runs a sweep, and shows its document. Raises `UserError`."""
    from dlopt.sweeps import sweep as sweeps

    request = sweeps.request(composer, words)
    _refuse_document(show, request.config)
    if request.config.dry_run:
        announce_dry_run()
    end = sweeps.run(request)
    if show is not None and request.found:
        show(_of_sweep(request.found[0], end))
    return end.code


def _of_run(folder: RunFolder, summary: Mapping[str, Any] | None, code: int) -> dict[str, Any]:
    return {"folder": os.path.abspath(folder.path), "exit_code": code, "summary": summary}


def _of_sweep(folder: Path, end: "SweepEnd") -> dict[str, Any]:
    from dlopt.results import documents
    from dlopt.results.reading import RunReader

    records, damaged = RunReader().read([folder])
    return {
        "folder": os.path.abspath(folder),
        "exit_code": end.code,
        "jobs": [documents.job_entry(record) for record in records],
        "skipped": documents.skipped_entries(damaged),
        "leaderboard": None if end.board is None else documents.leaderboard_entry(end.board),
        "pareto_front": None if end.front is None else documents.front_entry(end.front),
    }


def _refuse_document(show: Show | None, config: DictConfig) -> None:
    """Raises `UserError` for --json without a run or a sweep."""
    series = series_of(config)
    if show is not None and (config.dry_run or series is not None):
        what = "dry_run=true" if series is None else f"a {series}"
        raise UserError(f"--json: prints the result of a run or a sweep; not available for {what}")


def _planned(composer: Composer, config: DictConfig, overrides: list[Override]) -> Plan | None:
    """Checks a composed config; None if it is only described, and printed. Raises `UserError`."""
    refuse_unread_hydra(overrides, "dlopt train", _READS_OF_HYDRA, _HINTS)
    with waiting("loading PyTorch ..."), refused_together(composer, overrides):
        plan = checked(config, overrides, flags=composer.flags)
    if plan.run_config.settings.dry_run:
        from dlopt.run import dry_run

        refuse_untested(plan.saved, plan.texts)
        dry_run.show(plan)
        return None
    return plan


def _lead(parsed: Namespace, show: Show | None, store: "Store") -> NoReturn:
    """Rank 0 of a launcher's processes: checks the run, chooses the folder and sends the run to the other ranks."""
    code, reason = FAILED, {}
    try:
        code = _start(parsed, show, store)
    except UserError as error:
        print_message(str(error))
        code, reason = USER_ERROR, {"reason": str(error)}
    except ReportedError as error:
        code = error.code
    finally:
        release(store, code, **reason)
    end_process(code)


def _refused_by_main() -> NoReturn:
    """Ends a rank > 0, but after rank 0 has printed why: torchrun ends all ranks as soon as one has ended."""
    with killed_by_signals():
        time.sleep(_HEAD_START)
    end_process(USER_ERROR)


def _refuse_address_of_file(config: DictConfig, command_line: CommandLine) -> None:
    """Raises `UserError` for a store that the other ranks, which compose no config, cannot know."""
    parallel: Any = OmegaConf.to_container(config.parallel, resolve=False)
    values = {key: parallel.get(key.partition(".")[2]) for key in _ADDRESS[:2]}
    refuse_untyped({key: value for key, value in values.items() if value is not None}, command_line)


def _typed_address(overrides: list[str]) -> dict[str, Any]:
    """Returns the typed keys of `_ADDRESS`, without the name of their group. Raises `UserError`."""
    typed = {override.key_or_group: override.value() for override in parse_overrides(overrides)}
    return {key.partition(".")[2]: value for key, value in typed.items() if key in _ADDRESS}


def _join_store(address: Mapping[str, Any], world: World) -> "Store":
    minutes = address.get("timeout_minutes", 10.0)
    is_valid = isinstance(minutes, int | float) and 0 < minutes < 1e6  # else refused with the config
    with killed_by_signals():
        return join_store(
            world,
            minutes=minutes if is_valid else 10.0,
            address=address.get("master_addr"),
            port=address.get("master_port"),
        )
