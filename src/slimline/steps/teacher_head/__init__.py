"""The student ends as its teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Forecast, Handler, StepResult
from slimline.steps.teacher_head.step import TeacherHead

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.training.companions import Company

__all__ = ["TeacherHead", "handler"]


class _Handler(Handler[TeacherHead]):
    config = TeacherHead
    summary = "ends the student in the teacher's last layer, behind a projector"
    reads = (("train", "where there are samples"),)

    def check(self, step: TeacherHead, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.teacher_head.head import head_of

        head_of(model, "student")

    def perform(self, step: TeacherHead, model: Model, context: Context) -> StepResult:
        from slimline.steps.teacher_head.head import with_teacher_head

        return with_teacher_head(model, step, context)

    def forecast(self, step: TeacherHead, model: Model, context: Context) -> Forecast:
        if context.teacher is not None:
            return super().forecast(step, model, context)
        return Forecast(model, f"{self.summary}; the teacher is not known here, so shapes stay", skipped=True)

    def company(self, step: TeacherHead, student: Model, context: Context) -> Company:
        from slimline.steps.teacher_head.head import held_head

        return held_head(step, student)


handler = _Handler()
