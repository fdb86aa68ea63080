"""Runs the trials of a ladder: results of a search decide which trials follow."""

from dlopt.basics.errors import UserError
from dlopt.lab.claimed_trials import ClaimedTrials
from dlopt.lab.ladder.ladder import LadderRequest, Trial
from dlopt.sweeps import branches
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, JobResult, PlanJob
from dlopt.sweeps.pool import Pool
from dlopt.tracking.overview import Overview


class _Ladder(ClaimedTrials[Trial]):
    request: LadderRequest

    def __init__(self, request: LadderRequest, plan_job: PlanJob) -> None:
        overview = Overview(request.expected(), metric="", similar=False)
        super().__init__(request, plan_job, request.is_needed, overview)
        request.remove_unneeded()  # of a command that was killed
        self.overview.update_shared({"finished": len(request.known())}, [])
        self._seen = set(self.waiting)  # a trial whose process died is left to the next command

    def next(self) -> Job | None:
        self._refill()
        job = super().next()
        if job is not None and not isinstance(job.composed, UserError):
            branches.begin([job])
        return job

    def ended(self, job: Job, result: JobResult) -> None:
        super().ended(job, result)
        self.request.remove_unneeded()

    def is_exhausted(self) -> bool:
        """Returns whether no trial can follow. Trials that other processes run decide about others: wait for them."""
        return not self.waiting and not self._refill()

    def _refill(self) -> bool:
        """Adds the trials that results have made possible, in order; returns whether there are any."""
        new = [trial for trial in self.request.waiting() if trial not in self._seen]
        self._seen.update(new)
        if new:
            self.waiting = dict.fromkeys(sorted([*self.waiting, *new], key=self.request.place))
        return bool(new)


def run(request: LadderRequest, plan_job: PlanJob, pool: Pool) -> None:
    """Runs all trials, and waits for other processes' trials. On a signal, raises KeyboardInterrupt."""
    source = _Ladder(request, plan_job)
    pools.run(source, pool, source.overview)
