"""Laboratory: its additions to dlopt, by the protocol of any package (`dlopt.config.packages`)."""

ENTRY_POINTS = {
    "dlopt": {"lab": "dlopt.lab"},
    "dlopt.commands": {
        "benchmark": "dlopt.lab.benchmark.command:benchmark",
        "ladder": "dlopt.lab.ladder.command:ladder",
        "trajectory": "dlopt.lab.trajectory.command:trajectory",
        "diagnose": "dlopt.lab.diagnosis.command:diagnose",
        "scaling": "dlopt.lab.scaling.command:scaling",
        "judge": "dlopt.lab.judge.command:judge",
        "verify": "dlopt.lab.verify.command:verify",
    },
    "dlopt.renamed": {"bench": "scaling"},
    "dlopt.series": {"comparison": "dlopt.lab.comparison.command:compare"},
    "dlopt.spaces": {"benchmark": "dlopt.lab.benchmark.trials:space_of"},
    "dlopt.reports": {
        "claims": "dlopt.lab.comparison.frozen:section",
        "diagnosis": "dlopt.lab.diagnosis.report:section",
    },
    "dlopt.configurable": {
        "data": "dlopt.lab.data",
        "optimizers": "dlopt.lab.optimizers",
        "functions": "dlopt.lab.trajectory.functions",
    },
}
