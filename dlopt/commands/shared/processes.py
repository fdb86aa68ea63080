"""Commands that divide samples over several processes, started by `parallel.processes`, torchrun or srun."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

from dlopt.basics.errors import UserError
from dlopt.basics.interruption import die_on_signals, print_message
from dlopt.config.choices import config_folder
from dlopt.config.overrides import group_of, key_of, without
from dlopt.machine.world import current
from dlopt.parallel.processes import launch
from dlopt.parallel.processes.rendezvous import end_process, first_to_fail, join_store, leave
from dlopt.run.record import failure

if TYPE_CHECKING:
    import torch

    from dlopt.parallel.mode import Mode
    from dlopt.parallel.processes.process_group import ProcessKeys

Command = Callable[[list[str]], int]


def over_processes(name: str, command: Command, arguments: list[str]) -> int:
    """Runs `command` in as many processes as `parallel.processes` requests; returns the exit code.

    Called in each process of a launcher, runs the command as one of its ranks and ends the process.
    """
    from dlopt.config.saved import typed_values  # with OmegaConf, which the help of the commands does not need

    arguments = without(arguments, "--json")
    typed = [argument for argument in arguments if group_of(argument) == "parallel"]
    if (world := current()) is not None:

        def run() -> int:
            keys = take_process_keys(typed_values(typed), name)
            join_store(world, minutes=keys["timeout_minutes"], address=keys["master_addr"], port=keys["master_port"])
            return command(arguments)

        run_rank(run)
    if not typed:
        return command(arguments)
    keys = take_process_keys(typed_values(typed), name)
    device = typed_values(argument for argument in arguments if key_of(argument) == "device")
    processes = launch.count_processes(keys, str(device.get("device", "auto")))
    if processes == 1:
        return command(arguments)
    return launch.group_code(*launch.run_processes(launch.python_module("dlopt", name, *arguments), processes, {}))


def take_process_keys(values: dict[str, Any], name: str) -> "ProcessKeys":
    """Removes the keys of the group `parallel` from `values` and returns them, checked and with their defaults."""
    from omegaconf import OmegaConf

    from dlopt.config.schema import check_arguments
    from dlopt.parallel.processes.process_group import join

    choice = values.pop("parallel", "ddp")
    if choice not in ("ddp", "single"):
        raise UserError(
            f"parallel={choice}: shards the model, but `dlopt {name}` needs the whole model in each process and shards "
            "the samples; use parallel=ddp"
        )
    typed = {key.removeprefix("parallel."): values.pop(key) for key in [*values] if key.startswith("parallel.")}
    if choice == "single" and typed.get("processes", 1) != 1:
        raise UserError(f"parallel.processes={typed['processes']}: parallel=single has one process; use parallel=ddp")
    defaults = OmegaConf.load(config_folder() / "parallel" / "_process_group.yaml")
    values_of_group = {str(key): value for key, value in defaults.items()} | typed
    checked = check_arguments("parallel", join, values_of_group, frozenset({"mode", "device"}))
    if choice == "single":
        checked["processes"] = 1
    return cast("ProcessKeys", checked)


def join_processes(device: "torch.device", keys: "ProcessKeys") -> "Mode":
    """Returns the mode of this process: one rank of its launcher's, or a single process."""
    from dlopt.parallel.mode import GroupMode, Mode, join_mode

    return Mode(device) if current() is None else join_mode("ddp", device, partial(GroupMode, name="ddp"), keys)


def prepare_rank() -> None:
    """Configures a process of a launcher, before it imports torch."""
    die_on_signals()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # reports a lost peer in one line, without C++ frames
    launch.end_with_torchrun()


def run_rank(run: Callable[[], int]) -> NoReturn:
    """Ends this process, one rank of a command, with the code that `run` returns; one rank reports an error of all."""
    if launch.PARENT in os.environ:
        launch.end_rank_with_parent()
    prepare_rank()
    try:
        code = run()
        leave()
    except Exception as error:
        code, reason = failure(error)
        if first_to_fail(code, reason):
            if reason is None:
                raise
            print_message(reason)
    end_process(code)
