"""Frozen records that cross borders, each field with its unit, JSON both ways."""

from __future__ import annotations

from noisescale.records.advice import (
    Advice,
    AdviceRow,
    CriticalBatch,
    Limits,
    RateCheck,
    RateTrial,
)
from noisescale.records.audit import Audit, AuditCause, AuditClipping, AuditGroup, AuditReplicas
from noisescale.records.batch import BatchSplit
from noisescale.records.branch import BranchPoint, BranchResult, BranchRow
from noisescale.records.calibration import Calibration
from noisescale.records.conversion import (
    Alternative,
    Change,
    Conversion,
    DataConversion,
    GroupConversion,
    LiveConversion,
)
from noisescale.records.curvature import Curvature, CurvaturePoint
from noisescale.records.noise import (
    Measurement,
    NoiseScale,
    Outcome,
    ParametersSeen,
    TrajectoryRow,
)
from noisescale.records.rate_schedule import RateSchedule, RateSegment
from noisescale.records.recipe import Recipe
from noisescale.records.schedule import BatchPiece, BatchSchedule, PieceRun, ScheduledStep
from noisescale.records.schedule_plan import SchedulePlan, ScheduleRow
from noisescale.records.serial import Record
from noisescale.records.speed import (
    MemoryLimit,
    SpeedCurve,
    SpeedFailure,
    SpeedPoint,
    ThroughputKnee,
)
from noisescale.records.sweep import (
    Collapse,
    CollapseRow,
    Compared,
    EqualBudget,
    PredictedCurve,
    PredictedSteps,
    RateLaw,
    Regimes,
    SweepCurve,
    TimeToTarget,
    TrialCurve,
    TrialRow,
    TunedSteps,
    TuningOutcome,
)
from noisescale.records.sweep_result import SettingSteps, SweepResult
from noisescale.records.target import Target
from noisescale.records.tradeoff import FitQuality, Interval, Tradeoff
from noisescale.records.trial import Crossing, TrialOutcome, TrialPlan, TrialResult

__all__ = [
    "Advice",
    "AdviceRow",
    "Alternative",
    "Audit",
    "AuditCause",
    "AuditClipping",
    "AuditGroup",
    "AuditReplicas",
    "BatchPiece",
    "BatchSchedule",
    "BatchSplit",
    "BranchPoint",
    "BranchResult",
    "BranchRow",
    "Calibration",
    "Change",
    "Collapse",
    "CollapseRow",
    "Compared",
    "Conversion",
    "CriticalBatch",
    "Crossing",
    "Curvature",
    "CurvaturePoint",
    "DataConversion",
    "EqualBudget",
    "FitQuality",
    "GroupConversion",
    "Interval",
    "Limits",
    "LiveConversion",
    "Measurement",
    "MemoryLimit",
    "NoiseScale",
    "Outcome",
    "ParametersSeen",
    "PieceRun",
    "PredictedCurve",
    "PredictedSteps",
    "RateCheck",
    "RateLaw",
    "RateSchedule",
    "RateSegment",
    "RateTrial",
    "Recipe",
    "Record",
    "Regimes",
    "SchedulePlan",
    "ScheduleRow",
    "ScheduledStep",
    "SettingSteps",
    "SpeedCurve",
    "SpeedFailure",
    "SpeedPoint",
    "SweepCurve",
    "SweepResult",
    "Target",
    "ThroughputKnee",
    "TimeToTarget",
    "Tradeoff",
    "TrajectoryRow",
    "TrialCurve",
    "TrialOutcome",
    "TrialPlan",
    "TrialResult",
    "TrialRow",
    "TunedSteps",
    "TuningOutcome",
]
