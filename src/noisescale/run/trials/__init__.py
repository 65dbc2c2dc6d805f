"""Trials of a sweep: trained one by one or many as one stacked model, with equal results."""

from noisescale.run.trials.alone import train_trial
from noisescale.run.trials.engine import train_trials
from noisescale.run.trials.judge import Judge, TrialProgress
from noisescale.run.trials.processes.pool import TrialProcesses

__all__ = ["Judge", "TrialProcesses", "TrialProgress", "train_trial", "train_trials"]
