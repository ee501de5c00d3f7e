"""Second moments of feature rows: three representations behind one interface, pure torch.

| kind | holds | exact | memory |
| --- | --- | --- | --- |
| `full` | `S` itself | always | d_in² |
| `rows` | a factor `R`, `S = RᵀR` | until more rows are seen than it may keep | rows · d_in |
| `sketch` | Frequent Directions of `S` | within a bound it states | 2 · size · d_in |
| `mean` | the mean row of a task (granularity `task_mean`) | always | d_in |
"""

from orthomerge.moments.choose import DEFAULT_BUDGET, KINDS, Representation, choose
from orthomerge.moments.combine import combine, leave_one_out
from orthomerge.moments.full import SecondMoment
from orthomerge.moments.mean import MeanMoment
from orthomerge.moments.moment import Moment, as_moment
from orthomerge.moments.rows import RowMoment
from orthomerge.moments.sketch import SketchMoment

__all__ = [
    "DEFAULT_BUDGET",
    "KINDS",
    "MeanMoment",
    "Moment",
    "Representation",
    "RowMoment",
    "SecondMoment",
    "SketchMoment",
    "as_moment",
    "choose",
    "combine",
    "leave_one_out",
]
