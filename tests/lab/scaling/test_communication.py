"""Bytes sent by collectives; test_command.py checks those of whole updates."""

from dlopt.lab.scaling.communication import _fraction_sent


def test_fraction_sent_by_collective() -> None:
    assert _fraction_sent("allreduce_", 4) == _fraction_sent("all_reduce", 4) == 1.5
    assert _fraction_sent("_allgather_base_", 4) == _fraction_sent("reduce_scatter_tensor", 4) == 0.75
    assert (_fraction_sent("send", 4), _fraction_sent("recv_", 4), _fraction_sent("barrier", 4)) == (1.0, 0.0, 0.0)
    assert _fraction_sent("wait_tensor", 4) == 0
