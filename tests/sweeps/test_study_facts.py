"""What processes that share a study must have in common."""

from dlopt.sweeps.study import describe_differences, is_fact


def test_facts_of_a_study() -> None:
    facts = ("optimizer.lr", "precision", "seed", "monitor", "epochs", "steps")
    others = ("data.root", "device", "profile", "max_time", "parallel.processes", "resume")
    assert all(map(is_fact, facts)) and not any(map(is_fact, others))


def test_differences_of_facts() -> None:
    saved = {"config": {"profile": False, "optimizer.lr": 0.1}, "space": {"profile": "true,false"}}
    current = {"config": {"optimizer.lr": 0.1}, "space": {"profile": "true,false"}}
    assert describe_differences(saved, current) == ""
    other = {"config": {"optimizer.lr": 0.2}, "space": {"profile": "true"}}
    different = "optimizer.lr: saved 0.1, now 0.2; profile: saved true,false, now true"
    assert describe_differences(saved, other) == different
