"""`dlopt train`: runs what is typed, after composing and checking it: a run, one of its ranks, or a sweep.

Imports Hydra and what composes with it late: the help needs neither.
"""

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dlopt.basics.errors import DONE, FAILED, USER_ERROR, ReportedError, UserError
from dlopt.basics.interruption import killed_by_signals, print_message
from dlopt.basics.status_line import announce_dry_run, waiting
from dlopt.commands.shared.document import end_document, error_entry, print_document
from dlopt.config.flags import parse_arguments, show_info
from dlopt.config.overrides import is_set, parse_overrides, with_folder
from dlopt.config.packages import entries, function, series_of
from dlopt.machine.world import current

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlopt.config.compose import Composer
    from dlopt.config.plan import Plan

USAGE = """\
Train a model, or run a sweep with -m

Usage: dlopt train [group=choice] [key=value] [flags]

Examples:
  dlopt train model=mlp optimizer=adamw epochs=5
  dlopt train -m optimizer.lr=0.01,0.03,0.1 seeds=3
  dlopt train -m 'rates=zip(optimizer=[sgd,adamw],optimizer.lr=[0.1,0.001])' # keys that change together
  dlopt train -m optimizer=sgd,adamw space=benchmark trials=5                # each optimizer with its own ranges
  dlopt train resume=auto
"""
_READS_OF_HYDRA = ("hydra.run", "hydra.job", "hydra.job_logging", "hydra.verbose")  # and COMPOSITION
_HINTS = dict.fromkeys(("hydra.sweep", "hydra.sweeper", "hydra.launcher"), "add -m")
# How the ranks of torchrun and srun find each other before rank 0 has sent them the run.
_ADDRESS = ("parallel.master_addr", "parallel.master_port", "parallel.timeout_minutes")
_HEAD_START = 10.0  # seconds for rank 0 to refuse a command; torchrun and srun then end the other ranks


def train(arguments: list[str]) -> int:
    """Runs `dlopt train` with the given arguments; returns the exit code. Raises `UserError` and `ReportedError`."""
    # 1. Parse the flags.
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(help_page(arguments), end="")
        return DONE
    for names in (("run", "multirun", "cfg", "info"), ("json", "cfg"), ("json", "info"), ("json", "hydra_help")):
        typed = [f"--{name.replace('_', '-')}" for name in names if getattr(parsed, name)]
        if len(typed) > 1:
            raise UserError(f"{' with '.join(typed)}: only one of them may be set")
    for name in ("resolve", "package"):
        if getattr(parsed, name) and not parsed.cfg:
            raise UserError(f"--{name}: needs --cfg")

    from dlopt.basics.folders import RunFolder
    from dlopt.config.resolve import interpolations_explained
    from dlopt.config.resuming import how_to_resume
    from dlopt.parallel.processes.rendezvous import end_process
    from dlopt.run.runner import CODE_OF, release, run

    # 2. Join the ranks of torchrun or srun: only rank 0 continues, and sends the run to the others.
    with interpolations_explained(), _rank_0(parsed) as store:
        # 3. Compose and check the run, unless something else is requested.
        plan = _plan(parsed, store)
        if isinstance(plan, int):
            code = plan
        else:
            # 4. Run it, and show its document, also if it fails.
            summary: dict[str, Any] | None
            failure = None
            try:
                folder, summary = run(plan, store=store)
                code = CODE_OF[summary["status"]]
            except ReportedError as error:
                if not parsed.json or error.code == USER_ERROR:
                    raise
                assert plan.config is not None
                folder, code = RunFolder(Path(plan.config.hydra.runtime.output_dir)), error.code
                summary, failure = folder.summary(), error
            if parsed.json:
                document = {"folder": os.path.abspath(folder.path), "exit_code": code, "summary": summary}
                if code != DONE:
                    failure = failure or ReportedError(code, f"interrupted; {how_to_resume(folder)}")
                    document["error"] = error_entry(failure, code, os.path.abspath(folder.path / "train.log"))
                print_document(document)
        if store is not None:
            release(store, code)
            end_process(code)
    return code


def help_page(arguments: list[str]) -> str:
    """Returns the help, with the choices of --config-dir. Raises `UserError`."""
    from dlopt.commands.options import tables_of_train

    return USAGE + tables_of_train(parse_arguments(arguments).config_dir)


def _plan(parsed: Namespace, store: "Store | None") -> "Plan | int":
    """Composes and checks a run; anything else that was requested is done here, and its exit code returned.

    Raises `UserError` and `ReportedError`.
    """
    from hydra.types import RunMode

    from dlopt.config.compose import Composer
    from dlopt.config.inherit import inherit
    from dlopt.config.plan import checked
    from dlopt.config.reads import COMPOSITION, refuse_unread_hydra, refuse_untested
    from dlopt.config.refusals import refused_together
    from dlopt.config.resolve import show_config

    typed = parsed.overrides
    composer = Composer(parsed.config_name, parsed.config_dir, typed)
    if parsed.multirun:
        from dlopt.sweeps.branches import branched

        return _sweep(composer, branched(composer, with_folder(typed, multirun=True)), json=parsed.json)
    parsed.overrides = inherit(composer, with_folder(typed, multirun=False))
    with refused_together(composer, parsed.overrides):
        overrides = composer.parse(parsed.overrides)
        config = composer.compose(overrides)
    if parsed.cfg:  # composed before, as for the flags below: Hydra's error messages are less clear
        print(show_config(config, parsed.cfg, parsed.package, resolve=parsed.resolve), end="")
        return DONE
    if parsed.hydra_help or parsed.info:
        show_info(parsed, composer.flags)
        return DONE
    if config.hydra.mode == RunMode.MULTIRUN:  # a config file may set the mode
        return _sweep(composer, inherit(composer, with_folder(typed, multirun=True)), json=parsed.json)
    if config.dry_run:
        announce_dry_run()
    if (key := series_of(config)) is not None:
        if parsed.json or config.notify is not None:
            name = "--json" if parsed.json else "notify"
            raise UserError(f"{name}: gives the result of a run or a sweep; not available for a {key}")
        code: int = function(entries("dlopt.series")[key])(composer, parsed, config)
        return code
    if store is not None:
        from omegaconf import OmegaConf

        from dlopt.config.typed import refuse_untyped

        # Of a file, which the other ranks do not read.
        parallel: Any = OmegaConf.to_container(config.parallel, resolve=False)
        values = {key: parallel.get(key.partition(".")[2]) for key in _ADDRESS[:2]}
        refuse_untyped({key: value for key, value in values.items() if value is not None}, composer.command_line)
    refuse_unread_hydra(overrides, "dlopt train", (*COMPOSITION, *_READS_OF_HYDRA), _HINTS)
    with waiting("loading PyTorch ..."), refused_together(composer, overrides):
        plan = checked(config, overrides, flags=composer.flags)
    if not plan.run_config.settings.dry_run:
        return plan
    from dlopt.run import dry_run

    refuse_untested(plan.saved, plan.texts)
    dry_run.show(plan)
    return DONE


def _sweep(composer: "Composer", words: list[str], *, json: bool) -> int:
    """Runs a sweep, and shows its document. Raises `UserError`."""
    from dlopt.sweeps import sweep as sweeps

    request = sweeps.request(composer, words)
    if request.config.dry_run:
        announce_dry_run()
    end = sweeps.run(request)
    if json and request.found:
        print_document(end.document(request.found[0]))
    return end.code


@contextlib.contextmanager
def _rank_0(parsed: Namespace) -> Iterator["Store | None"]:
    """Yields the store through which rank 0 of torchrun or srun sends the run to the others, which end here.

    None in a single process, and if there is no run to send. Passes errors on to the other ranks. Raises `UserError`.
    """
    from dlopt.commands.shared.processes import prepare_rank
    from dlopt.parallel.processes.rendezvous import end_process, join_store
    from dlopt.run.runner import follow, release

    world = current()
    if world is not None:
        prepare_rank()
        if world.restarts and not is_set("resume", parsed.overrides):
            parsed.overrides.append("resume=auto")  # torchrun has restarted the run
    sends = not (parsed.multirun or parsed.hydra_help or parsed.cfg or parsed.info)
    if world is None or (world.is_main and not sends):
        yield None
        return
    if not sends:
        if parsed.multirun:
            _refused_by_main()
        end_process(DONE)
    try:
        typed: dict[str, Any] = {each.key_or_group: each.value() for each in parse_overrides(parsed.overrides)}
    except UserError:
        if not (world.is_main or world.is_started_by_hand):
            _refused_by_main()
        raise
    host, port, minutes = (typed.get(key) for key in _ADDRESS)
    if not isinstance(minutes, int | float) or not 0 < minutes < 1e6:
        minutes = 10.0  # an invalid one is refused with the config
    with killed_by_signals():
        store = join_store(world, minutes=minutes, address=host, port=port)
    if not world.is_main:
        end_process(follow(store, parsed.overrides))
    try:
        yield store
    except UserError as error:
        print_message(str(error))
        end_document(error.code, error)
        release(store, error.code, str(error))
        end_process(error.code)
    except ReportedError as error:
        end_document(error.code, error)
        release(store, error.code)
        end_process(error.code)
    except BaseException:
        release(store, FAILED)
        raise


def _refused_by_main() -> NoReturn:
    """Ends a rank > 0, but after rank 0 has printed why: torchrun ends all ranks as soon as one has ended."""
    from dlopt.parallel.processes.rendezvous import end_process

    with killed_by_signals():
        time.sleep(_HEAD_START)
    end_process(USER_ERROR)
